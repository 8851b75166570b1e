"""The steps of a run's checkpoints in a bucket.

Orbax writes them on this machine, and each goes up when it is whole, ``complete.json`` last; that
file names all others with their sizes, and is deleted first. So a step counts or it doesn't,
whenever a process is killed, by the same code for every kind of bucket: Orbax itself knows none but
Google's, and deletes there in no order.

Of several processes the first one writes everything: it is what an adapter trains, little beside
its base, and is brought together over the network that the gradients take.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from smoa_jax.sharding.processes import fetch, is_first
from smoa_jax.storage import StorageError, explained, filesystem, remove_tree, upload
from smoa_jax.training.checkpoint_steps import (
    STATE,
    DamagedCheckpoint,
    KeepBest,
    LocalSteps,
    read_arrays,
    read_record,
    unreadable,
)

#: In each whole step: {"files": {name: bytes}}.
COMPLETE = "complete.json"


class BucketSteps:
    """``Steps`` in a bucket.

    Args:
        directory: In the bucket.
        keep_last: How many of the newest are kept.
        best: Which others are.
        read_only: Nothing is written or removed in the bucket.
    """

    def __init__(
        self, directory: epath.Path, *, keep_last: int, best: KeepBest, read_only: bool = False
    ):
        self._remote: Any = directory
        self._read_only = read_only
        self._folder = tempfile.TemporaryDirectory(prefix="smoa-checkpoints-")
        self._here = epath.Path(self._folder.name)
        self._whole = self._listed()
        for step in self._whole:
            with contextlib.suppress(DamagedCheckpoint):  # whoever reads it is told
                self._get(step, with_state=False)
        self._writer: LocalSteps | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._saving: Future[None] | None = None
        self._last: int | None = None
        if is_first() and not read_only:
            self._writer = LocalSteps(self._here, keep_last=keep_last, best=best, alone=True)
            self._pool = ThreadPoolExecutor(1, "checkpoints")
            self._clear(keep=self._whole)

    def all(self) -> list[int]:
        return sorted(self._whole)

    def exists(self, step: int) -> bool:
        with explained(self._remote):
            return (self._remote / str(step) / COMPLETE).exists()

    @property
    def busy(self) -> bool:
        return self._saving is not None and not self._saving.done()

    def save(self, step: int, stored: dict[str, Any], record: dict[str, Any]) -> None:
        host = {name: np.array(value) for name, value in fetch(stored).items()}
        self._whole.append(step)
        self._last = step
        if self._pool is not None:
            self._saving = self._pool.submit(self._write, step, host, record)

    def wait(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def recover(self) -> None:
        if self._writer is not None:
            self._writer.recover()
        try:
            self._whole = self._listed()
        except StorageError:  # it can't be reached still: what was whole before the save is
            self._whole = [step for step in self._whole if step != self._last]
        if self._writer is not None:
            for step in set(self._writer.all()) - set(self._whole):
                shutil.rmtree(self._here / str(step), ignore_errors=True)
            self._writer.recover()

    def record(self, step: int) -> dict[str, Any]:
        self._get(step, with_state=False)
        return read_record(self._here / str(step))

    def arrays(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        self._get(step, with_state=True)
        return read_arrays(self._here / str(step), targets)

    def set_aside(self, steps: Sequence[int]) -> None:
        """Without its marker a step counts no more; the rest goes when the next one is whole."""
        if is_first():
            with explained(self._remote):
                for step in steps:
                    (self._remote / str(step) / COMPLETE).unlink(missing_ok=True)
                    shutil.rmtree(self._here / str(step), ignore_errors=True)
        self._whole = [step for step in self._whole if step not in steps]
        if self._writer is not None:
            self._writer.recover()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        if self._writer is not None:
            self._writer.close()
        self._folder.cleanup()

    def _write(self, step: int, host: dict[str, Any], record: dict[str, Any]) -> None:
        """In the background: here, then up, then away with what is kept no more."""
        assert self._writer is not None
        self._writer.save(step, host, record)
        self._writer.wait()
        source, target = Path(self._here / str(step)), self._remote / str(step)
        with explained(target):
            remove_tree(target)  # what a killed process has left of it
            sizes = {
                path.relative_to(source).as_posix(): path.stat().st_size
                for path in source.rglob("*")
                if path.is_file()
            }
            upload(source, target)
            (target / COMPLETE).write_text(json.dumps({"files": sizes}, indent=1))
            self._clear(keep=self._writer.all())
        shutil.rmtree(source / STATE, ignore_errors=True)  # it can be had from there again

    def _clear(self, keep: Sequence[int]) -> None:
        """Delete every other step of the bucket, the marker first."""
        with explained(self._remote):
            for name in self._names():
                if name.isdigit() and int(name) not in keep:
                    (self._remote / name / COMPLETE).unlink(missing_ok=True)
                    remove_tree(self._remote / name)
        self._whole = [step for step in self._whole if step in keep]

    def _names(self) -> list[str]:
        return [path.name for path in self._remote.iterdir()] if self._remote.exists() else []

    def _listed(self) -> list[int]:
        """The whole steps in the bucket."""
        with explained(self._remote):
            numbers = [int(name) for name in self._names() if name.isdigit()]
            return sorted(n for n in numbers if (self._remote / str(n) / COMPLETE).exists())

    def _get(self, step: int, *, with_state: bool) -> None:
        """Bring a step here, but for its arrays if they aren't wanted."""
        here, remote = Path(self._here / str(step)), self._remote / str(step)
        if (here / STATE).exists() or (here.exists() and not with_state):
            return
        try:
            sizes = json.loads((remote / COMPLETE).read_text())["files"]
            files = filesystem(remote)
            for name, size in sizes.items():
                place = here / name
                if place.exists() or (name.startswith(f"{STATE}/") and not with_state):
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(f"{remote}/{name}", str(place))
                if place.stat().st_size != size:
                    raise ValueError(f"{name} has {place.stat().st_size} bytes instead of {size}")
        except DamagedCheckpoint:
            raise
        except Exception as error:
            shutil.rmtree(here, ignore_errors=True)
            raise unreadable(remote, error) from error
