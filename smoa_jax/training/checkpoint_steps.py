"""The steps of a run's checkpoints where they lie: written by Orbax, read by each process alone.

``TrainingCheckpoints`` knows what a checkpoint means; this knows how one comes onto a disk, whole
or not at all. Each step is written to a temporary directory and renamed when it is complete, and a
step to be deleted is renamed away first. Reading waits for no other process, so that one which
can't read a damaged file keeps none waiting.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    LatestN,
    PreservationContext,
    PreservationPolicy,
)

from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.sharding.processes import together
from smoa_jax.storage import check_writable, reason
from smoa_jax.training.checkpoint_leaves import key_data_target

STATE, RECORD = "state", "record"
_RECORD_FILE = "metadata"  # as Orbax calls it
_TRASH = "deleted"


class DamagedCheckpoint(CheckpointError):  # noqa: N818
    """A checkpoint that can't be read; the one before it may be whole."""


class KeepBest(PreservationPolicy):
    """Preserves the best steps among those with a finite metric."""

    def __init__(self, number: int, mode: Literal["min", "max"]):
        self._number = number
        self._sign = 1.0 if mode == "min" else -1.0
        self._values: dict[int, float] = {}

    def note(self, step: int, value: float | None) -> None:
        self._values.pop(step, None)
        if value is not None and math.isfinite(value):
            self._values[step] = self._sign * value

    def ranked(self, steps: Sequence[int]) -> list[int]:
        """Those with a metric, best first; of equals the later first."""
        known = [step for step in steps if step in self._values]
        return sorted(known, key=lambda step: (self._values[step], -step))

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: PreservationContext
    ) -> Sequence[bool]:
        best = self.ranked([info.step for info in checkpoints])[: self._number]
        return [info.step in best for info in checkpoints]


class Steps(Protocol):
    """Where the steps of a run lie. All processes make the same calls."""

    def all(self) -> list[int]:
        """Every step there, one that is being saved included, in ascending order."""
        ...

    def exists(self, step: int) -> bool:
        """Whether it is there now, whatever was there before."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a save is under way in this process."""
        ...

    def save(self, step: int, stored: dict[str, Any], record: dict[str, Any]) -> None:
        """Save a step in the background; the one before has been waited for."""
        ...

    def wait(self) -> None:
        """Return when everything saved is there; raises what went wrong in the background."""
        ...

    def recover(self) -> None:
        """After a save that failed: clear up what is left of it, and be ready for another."""
        ...

    def record(self, step: int) -> dict[str, Any]:
        """What the JSON of a step says; ``DamagedCheckpoint`` if it can't be read."""
        ...

    def arrays(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays of a step where ``targets`` say, or on the host where they say nothing."""
        ...

    def set_aside(self, steps: Sequence[int]) -> None:
        """Take damaged steps out of the way of later ones; nothing of them is deleted."""
        ...

    def close(self) -> None:
        """Wait, and give up threads."""
        ...


class LocalSteps:
    """Steps in a directory that all processes see.

    Args:
        directory: Made if there is none, unless ``read_only``.
        keep_last: How many of the newest are kept.
        best: Which others are.
        read_only: Nothing is written or removed.
        alone: This process writes without the others.
    """

    def __init__(
        self,
        directory: epath.Path,
        *,
        keep_last: int,
        best: KeepBest,
        read_only: bool = False,
        alone: bool = False,
    ):
        self._directory, self._read_only, self._alone = directory, read_only, alone
        self._policy = AnyPreservationPolicy([LatestN(keep_last), best])
        self._manager = self._open()
        self._empty_trash()

    def all(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def exists(self, step: int) -> bool:
        return (self._directory / str(step)).exists()

    @property
    def busy(self) -> bool:
        return self._manager.is_saving_in_progress()

    def save(self, step: int, stored: dict[str, Any], record: dict[str, Any]) -> None:
        if jax.process_index() == 0:
            # Orbax's threads would wait for minutes for a directory that can't be made.
            check_writable(Path(self._directory))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{STATE: ocp.args.PyTreeSave(stored), RECORD: ocp.args.JsonSave(record)}
            ),
            force=True,
        )

    def wait(self) -> None:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._empty_trash()

    def recover(self) -> None:
        manager, self._manager = self._manager, self._open()  # opening clears up
        with contextlib.suppress(Exception):  # the save that failed says so again
            manager.close()

    def record(self, step: int) -> dict[str, Any]:
        return read_record(self._directory / str(step))

    def arrays(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        return read_arrays(self._directory / str(step), targets)

    def set_aside(self, steps: Sequence[int]) -> None:
        with together():
            if jax.process_index() == 0:
                for step in steps:
                    path = self._directory / str(step)
                    target, number = self._directory / f"damaged-{step}", 1
                    while target.exists():
                        number += 1
                        target = self._directory / f"damaged-{step}-{number}"
                    path.rename(target)
        self._manager.reload()

    def close(self) -> None:
        self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        options = _by_itself("write") if self._alone else ocp.options.MultiprocessingOptions()
        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                cleanup_tmp_directories=not self._read_only,
                todelete_subdir=None if self._read_only else _TRASH,
                read_only=self._read_only,
                save_interval_steps=0 if self._read_only else 1,
                # Of one process alone Orbax does not make it by itself.
                create=not self._read_only and not self._alone,
                multiprocessing_options=options,
            ),
            item_names=(STATE, RECORD),
        )

    def _empty_trash(self) -> None:
        """Delete what has been renamed away; the first process does it for all."""
        if not self._read_only and jax.process_index() == 0:
            trash = self._directory / _TRASH
            if trash.exists():
                for entry in trash.iterdir():
                    entry.rmtree(missing_ok=True)


def _by_itself(prefix: str) -> ocp.options.MultiprocessingOptions:
    """Orbax's word for a process that waits for no other."""
    me = jax.process_index()
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{prefix}{me}"
    )


def read_record(step: epath.Path) -> dict[str, Any]:
    """The JSON of a step's directory."""
    try:
        record = json.loads((step / RECORD / _RECORD_FILE).read_text())
        if not isinstance(record, dict):
            raise ValueError(f"a record that is a {type(record).__name__}")
        return record
    except Exception as error:  # whatever the storage layers below raise means: unreadable
        raise unreadable(step, error) from error


def read_arrays(step: epath.Path, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of a step's directory, by their names there.

    Args:
        step: The directory.
        targets: Of those to read: shape, dtype, and the sharding to put it under; of arrays
            without one, an array on the host.
    """
    abstract, arguments = {}, {}
    for name, target in targets.items():
        if getattr(target, "sharding", None) is None:
            abstract[name] = jax.ShapeDtypeStruct(target.shape, target.dtype)
            arguments[name] = ocp.RestoreArgs(restore_type=np.ndarray)
            continue
        leaf = abstract[name] = key_data_target(target)
        arguments[name] = ocp.ArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True
        )
    alone = _by_itself("read")
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            args = ocp.args.PyTreeRestore(abstract, restore_args=arguments, partial_restore=True)
            return reader.restore(step / STATE, args=args)
    except Exception as error:
        raise unreadable(step, error) from error


def unreadable(step: Any, error: Exception) -> DamagedCheckpoint:
    """What to say of a step that can't be read."""
    return DamagedCheckpoint(
        f"{step}: can't be read ({reason(error)}); expected a whole checkpoint; remove that "
        "directory to go on from an earlier step"
    )
