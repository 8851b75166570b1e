"""The output directory of a run: everything that is written there, and who may write.

    output_dir/
      config.yaml     as resolved, enough to run it again
      metrics.jsonl   one object per step, evaluation and event; a run that was killed takes the
                      steps since its last checkpoint again, after another "start"
      checkpoints/    training state; resuming from it is bit-exact on a CPU
      adapter/        the trained adapter, as of the last step
      answers_*.jsonl held-out questions and what was answered, before and after
      summary.json    what the table at the end shows, on which data, devices and versions
      tensorboard/, wandb/  what was asked for by train.tensorboard and train.wandb
      .lock           held while a run is under way; the system lets go of it when the run dies

In a bucket (``gs://``, ``s3://``) it is the same, but that files which grow go up whole now and
then, that a checkpoint is complete when ``complete.json`` is in it, and that ``.lock`` is written
again every ten seconds by the run that holds it: a run that was killed is known by its silence.

Of several processes the first one alone writes, but for the checkpoints, which all of them do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from smoa_jax.adapter.types import Params
from smoa_jax.checkpoint.native.directory import save_adapter
from smoa_jax.checks import require
from smoa_jax.evaluation.scoring import Answers
from smoa_jax.sharding.processes import is_first, together
from smoa_jax.storage import explained, is_remote, located, remove_tree
from smoa_jax.training.config import RunConfig
from smoa_jax.training.run_lock import Taken, run_lock

_CONFIG, _LOCK = "config.yaml", ".lock"


class RunError(ValueError):
    """A run that cannot start or go on, in one line for people."""


class RunDirectory(contextlib.AbstractContextManager):
    """One run's directory; as a context it lets go of the lock at the end.

    Args:
        path: ``train.output_dir``; need not exist.
    """

    def __init__(self, path: str | Path):
        self.path = located(path)
        self.config_file = self.path / _CONFIG
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self._lock = run_lock(self.path / _LOCK)

    def __exit__(self, *exception: Any) -> None:
        self._lock.release()

    @property
    def holds_run(self) -> bool:
        """Whether a run has begun here."""
        with explained(self.path):
            return self.config_file.exists()

    @property
    def is_occupied(self) -> bool:
        """Whether anything but a lock lies here."""
        with explained(self.path):
            return self.path.exists() and any(entry.name != _LOCK for entry in self.path.iterdir())

    def lock(self) -> None:
        """Keep other runs out until this one ends, however it ends; once is enough.

        Raises:
            RunError: if another run is under way here.
        """
        if not is_first():
            return
        try:
            self._lock.acquire()
        except Taken as error:
            raise RunError(
                f"got train.output_dir={self.path}, where another run is under way; expected a "
                "directory of its own; wait for that run to end, or choose another"
            ) from error

    def check_lock(self) -> None:
        """Stop a run whose directory another has taken; all processes call it.

        Raises:
            RunError: in all of them.
        """
        if not is_remote(self.path):  # where the system itself keeps others out
            return
        with together():
            if is_first():
                try:
                    self._lock.check()
                except Taken as error:
                    raise RunError(
                        f"got train.output_dir={self.path}, which another run has taken over since "
                        "this one was silent for too long; expected one run; end one of them"
                    ) from error

    def begin(self, config: RunConfig, *, overwrite: bool) -> None:
        """Make the directory, or empty it, and say in it which run it holds.

        Raises:
            RunError: if another run began here in the meantime.
        """
        with together():
            if not is_first():
                return
            if not is_remote(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            require(
                not self.is_occupied or overwrite,
                f"train.output_dir={self.path}, where another run began meanwhile",
                "a directory of its own",
                "choose another",
                error=RunError,
            )
            with explained(self.path):
                for entry in self.path.iterdir():
                    if entry.name != _LOCK:
                        remove_tree(entry)
            self.write_config(config)

    def write_config(self, config: RunConfig) -> None:
        """The resolved configuration, as YAML, to run again."""
        if not is_first():
            return
        text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=100)
        if is_remote(self.path):  # where a file appears whole or not at all
            self._write(_CONFIG, text.rstrip("\n"))
            return
        draft = self.path / f".{_CONFIG}.draft"
        draft.write_text(text, encoding="utf-8")
        draft.replace(self.config_file)

    def settings(self) -> dict[str, Any]:
        """What ``config.yaml`` holds; {} if it can't be read or somebody wrote another there."""
        try:
            found = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return found if isinstance(found, dict) else {}

    def changed_settings(self, config: RunConfig) -> list[str]:
        """Settings that differ from those written here, as "name: was, is"; [] if unreadable."""
        written = self.settings()
        if not isinstance(written.get("train"), dict):
            return []
        before, now = dict(_flat(written)), dict(_flat(plain(config)))
        return [
            f"{name}: {before.get(name, 'nothing')} before, {now.get(name, 'nothing')} now"
            for name in sorted({*before, *now})
            if before.get(name, "nothing") != now.get(name, "nothing")
        ]

    def write_answers(self, which: str, questions: Any, answers: Answers) -> None:
        """Questions, references and responses, one object a line."""
        rows = zip(
            questions.questions,
            questions.references,
            answers.responses,
            answers.score.right,
            strict=False,  # the first rows alone are answered
        )
        lines = [
            json.dumps({"question": q, "reference": r, "response": a, "right": ok})
            for q, r, a, ok in rows
        ]
        self._write(f"answers_{which}.jsonl", "\n".join(lines))

    def write_adapter(
        self,
        params: Params,
        config: RunConfig,
        base_fingerprint: str,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """The adapter of ``params``, in the place of an earlier one; all processes call it."""
        with together():
            if is_first():
                save_adapter(
                    params,
                    config.adapter,
                    self.adapter,
                    base_fingerprint=base_fingerprint,
                    base_name=str(config.model.path),
                    template=config.data.template,
                    facts=facts,
                    overwrite=True,
                )

    def write_summary(self, values: Mapping[str, Any]) -> None:
        """What the table at the end shows and what it was made with, as JSON."""
        self._write("summary.json", json.dumps(jsonable(values), indent=2))

    def _write(self, name: str, text: str) -> None:
        if is_first():
            with explained(self.path):
                (self.path / name).write_text(text + "\n", encoding="utf-8")


def jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """NaN is not JSON: null stands for what was not measured or not finite."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def plain(config: RunConfig) -> dict[str, Any]:
    """A configuration of lists, dicts, texts and numbers alone."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=list))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value
