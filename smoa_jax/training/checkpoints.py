"""The state of a training run on disk: saved in the background, whole or not at all.

A checkpoint holds what a run has changed or could not make again: trained tensors, the frozen
leaves of the adapter (never the base, nor its spectral bands), the optimizer's state, counters,
keys, and as JSON the position in the data and the identity of adapter and base. Each step is
written to a temporary directory and renamed when it is complete, and a step to be deleted is
renamed away first: whatever moment a process is killed at, every directory named by a step number
is whole.

On disk a state is flat: every leaf under its path, such as
``trainable/layers/self_attn/q_proj/smoa/a``, with a table of shapes and dtypes beside it, which a
restore is checked against before anything is read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    LatestN,
    PreservationContext,
    PreservationPolicy,
)

from smoa_jax import checks
from smoa_jax.checkpoint.errors import CheckpointError, listed, require
from smoa_jax.training.checkpoint_leaves import (
    absolute,
    as_json,
    as_key,
    check_restored,
    check_saveable,
    check_targets,
    describe,
    differences,
    flatten,
    key_data,
    key_data_target,
    leaf_name,
)

FORMAT_VERSION = 1

_STATE, _RECORD, _TRASH = "state", "record", "deleted"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """Which adapter on which base a checkpoint belongs to.

    Args:
        adapter_config: The fields of the ``SmoaConfig``, as its ``to_fields`` gives them.
        base_fingerprint: Of the base model.
    """

    adapter_config: Mapping[str, Any]
    base_fingerprint: str

    def as_json(self) -> dict[str, Any]:
        """With tuples as lists, as JSON gives them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint in memory."""

    state: Any
    data_position: dict[str, Any]
    step: int
    metrics: dict[str, float]


class TrainingCheckpoints:
    """The checkpoints of one run: the last few and the best.

    >>> with TrainingCheckpoints("run/checkpoints", identity=identity) as checkpoints:
    ...     checkpoints.save(step, state, position, {"eval_loss": 1.2})
    ...     restored = checkpoints.restore(None, abstract_state)

    All processes of a run make the same calls. Opening a directory removes what a killed process
    left half-written in it, unless ``read_only``.

    Args:
        directory: Made if there is none; local, or a bucket.
        identity: Of this run; checkpoints of another adapter or base are refused. None, for
            reading alone: whose they are is then to be found in them.
        keep_last: How many of the newest are kept.
        keep_best: How many of the best are kept beside them.
        best_metric: Key of ``metrics`` that says which is best; a step without it, or where it is
            not finite, is never the best.
        best_mode: Whether less or more is better.
        read_only: Nothing is written or removed; for reading a run that may still be going on.

    Raises:
        CheckpointError: if the directory holds checkpoints of another adapter, base or format.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        identity: Identity | None,
        keep_last: int = 3,
        keep_best: int = 1,
        best_metric: str = "eval_loss",
        best_mode: Literal["min", "max"] = "min",
        read_only: bool = False,
    ):
        checks.require(
            keep_last >= 1 and keep_best >= 0 and best_mode in ("min", "max"),
            f"keep_last={keep_last}, keep_best={keep_best}, best_mode={best_mode!r}",
            "at least 1, at least 0, and min or max",
        )
        checks.require(
            identity is not None or read_only,
            "no identity",
            "one, unless read_only",
            "give the run's own",
        )
        self.directory = absolute(directory)
        require(
            not read_only or self.directory.is_dir(),
            "what is no directory",
            "the checkpoints of a run",
            where=self.directory,
        )
        self._identity = identity
        self._best_metric = best_metric
        self._read_only = read_only
        self._own_steps: set[int] = set()
        self._best = _KeepBest(keep_best, best_mode)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep_last), self._best]),
                cleanup_tmp_directories=not read_only,
                todelete_subdir=None if read_only else _TRASH,
                read_only=read_only,
                save_interval_steps=0 if read_only else 1,
                create=not read_only,
            ),
            item_names=(_STATE, _RECORD),
        )
        self._empty_trash()
        for step in self.all_steps():
            try:
                self._best.note(step, self._checked_record(step)["metrics"].get(best_metric))
            except CheckpointError:  # a run that goes on may have deleted it by now
                if not read_only or (self.directory / str(step)).exists():
                    raise

    # -------------------------------------------------------------------------------- the steps

    def latest_step(self) -> int | None:
        """The newest step, one that is being saved included; None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best metric among those kept; None if none has one."""
        ranked = self._best.ranked(self.all_steps())
        return ranked[0] if ranked else None

    def all_steps(self) -> list[int]:
        """Every step kept, in ascending order."""
        return sorted(self._manager.all_steps())

    # --------------------------------------------------------------------------- saving, waiting

    def save(
        self,
        step: int,
        state: Any,
        data_position: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> bool:
        """Save one step in the background; waits only for the save before it.

        The arrays may be donated or deleted as soon as this returns.

        Args:
            step: Later than every step there is, or one that this object has saved or restored.
            state: A pytree of ``jax.Array``; None holes are fine.
            data_position: What the data pipeline needs to go on; small and plain JSON.
            metrics: Numbers of this step, the best metric perhaps among them.
            wait: Whether to return only when the checkpoint is on disk.

        Returns:
            Whether anything was written: False for a step this object has saved or restored,
            whose state is there already.

        Raises:
            ValueError: for a state that can't be saved, or holds base weights.
            CheckpointError: if a later step of another run is there.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened read-only; expected no saves")
        leaves = flatten(state)
        check_saveable(leaves)
        if step in self._own_steps and step in self._manager.all_steps():
            if wait:
                self.wait()
            return False
        latest = self.latest_step()
        require(
            latest is None or step > latest,
            f"step {step} to save after step {latest}",
            "a later one: resume from the latest step, or use a new directory",
            where=self.directory,
        )
        record = {
            "format_version": FORMAT_VERSION,
            "step": int(step),
            "identity": self._identity.as_json() if self._identity is not None else {},
            "data_position": as_json(data_position),
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "tensors": {name: describe(leaf) for name, leaf in leaves.items()},
        }
        self._best.note(step, record["metrics"].get(self._best_metric))
        stored = {name: key_data(leaf) for name, leaf in leaves.items() if leaf.size}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{_STATE: ocp.args.PyTreeSave(stored), _RECORD: ocp.args.JsonSave(record)}
            ),
            force=True,
        )
        self._own_steps.add(step)
        if wait:
            self.wait()
        return True

    def wait(self) -> None:
        """Return when everything saved is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._empty_trash()

    def close(self) -> None:
        """Wait, then give up threads; the object is of no use afterwards."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --------------------------------------------------------------------------------- restoring

    def restore(self, step: int | None, abstract_state: Any) -> Restored:
        """Read a checkpoint onto the devices that ``abstract_state`` names.

        Args:
            step: None for the latest.
            abstract_state: The state's structure, every leaf a ``ShapeDtypeStruct`` with a sharding
                (or an array that has them): of this mesh, not of the one that saved.

        Raises:
            CheckpointError: if there is no such step, if it is damaged or belongs to another
                adapter or base, or if its tensors aren't those of ``abstract_state``.
        """
        self.wait()
        step = self._known(step)
        record = self._checked_record(step)
        targets = flatten(abstract_state)
        where = f"{self.directory / str(step)}"
        check_targets(where, targets, record["tensors"])
        stored = self._read(step, {name: leaf for name, leaf in targets.items() if leaf.size})
        leaves = []
        for name, target in targets.items():
            if target.size:
                leaf = as_key(stored[name], record["tensors"][name])
            else:  # the storage format has no empty arrays
                leaf = jax.device_put(jnp.zeros(target.shape, target.dtype), target.sharding)
            check_restored(where, name, leaf, target)
            leaves.append(leaf)
        self._own_steps.add(step)
        return Restored(
            state=jax.tree.unflatten(jax.tree.structure(abstract_state), leaves),
            data_position=record["data_position"],
            step=step,
            metrics=record["metrics"],
        )

    def metrics(self, step: int | None = None) -> dict[str, float]:
        """What was measured at a step (None: the latest), as it was saved.

        Raises:
            CheckpointError: if there is no such step or its record is damaged.
        """
        return self._checked_record(self._known(step))["metrics"]

    def read_adapter(self, step: int | None = None) -> tuple[Identity, int, dict[str, np.ndarray]]:
        """The adapter of a checkpoint on the host, by the names of ``adapter_leaves``.

        Reads neither the optimizer's state nor anything else, and needs no device.

        Args:
            step: None for the latest.

        Returns:
            Whose it is, its step, and every leaf that an adapter directory holds.

        Raises:
            CheckpointError: if there is no such step or it is damaged.
        """
        step = self._known(step)
        record = self._checked_record(step)
        names = {name: leaf_name(name) for name in record["tensors"]}
        chosen = {name: leaf for name, leaf in names.items() if leaf is not None}
        tensors = {name: record["tensors"][name] for name in chosen}
        abstract = {
            name: jax.ShapeDtypeStruct(entry["shape"], entry["dtype"])
            for name, entry in tensors.items()
            if math.prod(entry["shape"])  # the storage format has no empty arrays
        }
        args = ocp.args.PyTreeRestore(
            abstract,
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in abstract},
            partial_restore=True,
        )
        stored = self._restore_item(step, _STATE, args)
        leaves = {
            chosen[name]: np.asarray(stored[name])
            if name in abstract
            else np.zeros(entry["shape"], entry["dtype"])
            for name, entry in tensors.items()
        }
        return Identity(**record["identity"]), step, dict(sorted(leaves.items()))

    def _known(self, step: int | None) -> int:
        """``step``, or the latest for None."""
        steps = self.all_steps()
        require(
            bool(steps),
            "no checkpoint in it",
            "at least one",
            "train with train.save_every, or to the end",
            where=self.directory,
        )
        require(
            step is None or step in steps,
            f"no checkpoint of step {step}",
            f"one of {listed(steps)}",
            where=self.directory,
        )
        return steps[-1] if step is None else step

    def _read(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        abstract = {name: key_data_target(leaf) for name, leaf in targets.items()}
        arguments = {
            name: ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True
            )
            for name, leaf in abstract.items()
        }
        args = ocp.args.PyTreeRestore(abstract, restore_args=arguments)
        return self._restore_item(step, _STATE, args)

    def _checked_record(self, step: int) -> dict[str, Any]:
        """The JSON of a step, refused if it is another run's."""
        record = self._restore_item(step, _RECORD, ocp.args.JsonRestore())
        where = self.directory / str(step)
        require(
            record.get("format_version") == FORMAT_VERSION,
            f"checkpoint format {record.get('format_version')}",
            f"{FORMAT_VERSION}",
            "read it with the version of smoa_jax that wrote it",
            where=where,
        )
        if self._identity is None:
            return record
        different = differences(record["identity"], self._identity.as_json())
        if different:
            raise CheckpointError(
                f"{where} belongs to another run: got {'; got '.join(different)}; resume with the "
                "adapter and base that it was saved with, or use a new directory"
            )
        return record

    def _restore_item(self, step: int, item: str, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # whatever the storage layers below raise means: unreadable
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{self.directory / str(step)}: can't be read ({reason[:300]}); expected a whole "
                "checkpoint; remove that directory to go on from an earlier step"
            ) from error

    def _empty_trash(self) -> None:
        """Delete what has been renamed away; the first process does it for all."""
        if not self._read_only and jax.process_index() == 0:
            trash = self.directory / _TRASH
            if trash.exists():
                for entry in trash.iterdir():
                    entry.rmtree(missing_ok=True)


class _KeepBest(PreservationPolicy):
    """Preserves the best steps among those with a finite metric."""

    def __init__(self, number: int, mode: Literal["min", "max"]):
        self._number = number
        self._sign = 1.0 if mode == "min" else -1.0
        self._values: dict[int, float] = {}

    def note(self, step: int, value: float | None) -> None:
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
