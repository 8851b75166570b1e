"""What a run reports while it goes: a progress bar, and one JSON object per line.

Values reach the host one step late, so that reading them never holds up the device.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from smoa_jax.sharding.processes import is_first, progressed
from smoa_jax.training.growing import GrowingFiles
from smoa_jax.training.trackers import TRACKER_FILES, Tracker

METRICS_FILE = "metrics.jsonl"
#: (directory that trackers may write to) -> trackers
OpenTrackers: TypeAlias = Callable[[Path], Sequence[Tracker]]


def read_metrics(directory: Path, event: str) -> Iterator[dict[str, Any]]:
    """The records of one event in order, but lines that a killed process left unfinished."""
    path = directory / METRICS_FILE
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if record["event"] == event:
                yield record


class MetricsWriter:
    """Appends metrics to ``metrics.jsonl``, and hands their numbers to trackers.

    Of several processes the first one writes; the others' writers do nothing.

    Args:
        directory: Of the run.
        trackers: Opens whatever else is to have the numbers, in the directory to write to.
    """

    def __init__(self, directory: Path, trackers: OpenTrackers = lambda _: ()):
        self._file: TextIO | None = None
        self._trackers: Sequence[Tracker] = ()
        if not is_first():
            return
        self._files = GrowingFiles(directory, [METRICS_FILE, *TRACKER_FILES])
        path = self._files.path / METRICS_FILE
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if torn:  # by a process that was killed; its half line must not swallow ours
            self._file.write("\n")
        self._trackers = trackers(self._files.path)

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """One line: ``{"event", "step", "time", ...values}``."""
        if self._file is None:
            return
        record = {"event": event, "step": step, "time": time.time(), **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for tracker in self._trackers if numbers else ():
            tracker.log(event, step, numbers)
        if event in ("train", "save"):
            self._files.push_soon()
        else:  # rare, and a resumed run reads some of them
            self._files.push()

    def close(self) -> None:
        """Flush and close the file and the trackers."""
        if self._file is None:
            return
        self._file.close()
        for tracker in self._trackers:
            tracker.close()
        self._files.close()


class ProgressReport(contextlib.AbstractContextManager):
    """A bar with loss, tokens/s, step time and ETA on a terminal; plain lines elsewhere.

    Of several processes the first one alone shows anything.
    """

    def __init__(self, title: str, total: int, *, start: int = 0, console: Console | None = None):
        self._console = console or Console(quiet=not is_first())
        self._live = self._console.is_terminal
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task(title, total=total, completed=start, note="")
        self._title, self._total = title, total
        self._last_line = time.monotonic()

    def __enter__(self) -> ProgressReport:
        self._bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.stop()

    def update(self, completed: int, note: str) -> None:
        """Show progress; off a terminal at most one line every ten seconds, and the last."""
        progressed()
        self._bar.update(self._task, completed=completed, note=note)
        now = time.monotonic()
        if not self._live and (now - self._last_line >= 10 or completed == self._total):
            line = f"{self._title} {completed}/{self._total}  {note}".rstrip()
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._last_line = now

    def resize(self, completed: int, total: int, note: str = "") -> None:
        """Show progress towards a total that was not known at the start."""
        self._total = total
        self._bar.update(self._task, total=total)
        self.update(completed, note)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
