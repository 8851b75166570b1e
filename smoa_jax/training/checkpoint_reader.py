"""Reading a run's checkpoints: whose they are, what they hold, and which can be read.

A checkpoint is refused if it is another adapter's or base's, before its arrays are read. One that
can't be read is passed over for the one before it, unless it was asked for by its number.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from smoa_jax.checkpoint.errors import CheckpointError, listed, require
from smoa_jax.sharding.processes import anywhere
from smoa_jax.training.checkpoint_leaves import (
    as_key,
    check_restored,
    check_targets,
    differences,
    flatten,
    leaf_name,
)
from smoa_jax.training.checkpoint_steps import DamagedCheckpoint, KeepBest, Steps

FORMAT_VERSION = 1

T = TypeVar("T")


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


class CheckpointReader:
    """What can be read of the checkpoints of a run.

    Args:
        directory: Of them.
        steps: Those in it.
        identity: Of the run; None: whose they are is to be found in them.
        best: Learns which is best, from what was measured at each.
        best_metric: Key of ``metrics`` that says so.
        read_only: Nothing is written or removed.
    """

    def __init__(
        self,
        directory: epath.Path,
        steps: Steps,
        *,
        identity: Identity | None,
        best: KeepBest,
        best_metric: str,
        read_only: bool,
    ):
        self.directory = directory
        #: What there is to tell people of checkpoints that could not be read or written.
        self.notes: list[str] = []
        self._steps, self._identity, self._read_only = steps, identity, read_only
        self._best, self._best_metric = best, best_metric
        self._own_steps: set[int] = set()
        for step in self.all_steps():
            try:
                self._best.note(step, self._checked_record(step)["metrics"].get(best_metric))
            except DamagedCheckpoint:  # restoring will tell, and take the one before it
                pass
            except CheckpointError:  # a run that goes on may have deleted it by now
                if not read_only or self._steps.exists(step):
                    raise

    def latest_step(self) -> int | None:
        """The newest step, one that is being saved included; None if there is none."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best metric among those kept; None if none has one."""
        ranked = self._best.ranked(self.all_steps())
        return ranked[0] if ranked else None

    def all_steps(self) -> list[int]:
        """Every step kept, in ascending order."""
        return self._steps.all()

    def restore(self, step: int | None, abstract_state: Any) -> Restored:
        """Read a checkpoint onto the devices that ``abstract_state`` names.

        Args:
            step: None for the latest that can be read; ``notes`` tells of others.
            abstract_state: The state's structure, every leaf a ``ShapeDtypeStruct`` with a sharding
                (or an array that has them): of this mesh, not of the one that saved.

        Raises:
            CheckpointError: if there is no such step, if it is damaged or belongs to another
                adapter or base, or if its tensors aren't those of ``abstract_state``.
        """
        targets = flatten(abstract_state)
        step, (record, found) = self._first_whole(step, lambda step: self._read(step, targets))
        leaves = []
        for name, target in targets.items():
            if target.size:
                leaf = as_key(found[name], record["tensors"][name])
            else:  # the storage format has no empty arrays
                leaf = jax.device_put(jnp.zeros(target.shape, target.dtype), target.sharding)
            check_restored(f"{self.directory / str(step)}", name, leaf, target)
            leaves.append(leaf)
        self._own_steps.add(step)
        return Restored(
            state=jax.tree.unflatten(jax.tree.structure(abstract_state), leaves),
            data_position=record["data_position"],
            step=step,
            metrics=record["metrics"],
        )

    def _read(self, step: int, targets: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The record and the arrays of a step, checked before they are read."""
        record = self._checked_record(step)
        check_targets(f"{self.directory / str(step)}", targets, record["tensors"])
        wanted = {name: leaf for name, leaf in targets.items() if leaf.size}
        return record, self._steps.arrays(step, wanted)

    def _first_whole(self, step: int | None, read: Callable[[int], T]) -> tuple[int, T]:
        """What ``read`` gives of a step, or for None of the newest that all processes can read."""
        if step is not None:
            step = self._known(step)
            return step, read(step)
        self._known(None)
        damaged: list[DamagedCheckpoint] = []
        passed: list[int] = []
        for candidate in reversed(self.all_steps()):
            found = None
            try:
                found = read(candidate)
            except DamagedCheckpoint as error:
                damaged.append(error)
            if not anywhere(found is None):
                assert found is not None
                break
            passed.append(candidate)
        else:
            raise (
                damaged[0]
                if damaged
                else CheckpointError(
                    f"{self.directory}: got no checkpoint that every process can read; expected one"
                )
            )
        if passed:
            told = str(damaged[0]).split("; ")[0] if damaged else "another process can't read it"
            self.notes.append(f"passed over step {listed(passed)} for step {candidate}: {told}")
            if not self._read_only:
                self._steps.set_aside(passed)
        return candidate, found

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
        step, (record, stored) = self._first_whole(step, self._adapter_of)
        leaves = {}
        for name, entry in record["tensors"].items():
            if (ours := leaf_name(name)) is not None:
                empty = np.zeros(entry["shape"], entry["dtype"])
                leaves[ours] = np.asarray(stored[name]) if name in stored else empty
        return Identity(**record["identity"]), step, dict(sorted(leaves.items()))

    def _adapter_of(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        record = self._checked_record(step)
        abstract = {
            name: jax.ShapeDtypeStruct(entry["shape"], entry["dtype"])
            for name, entry in record["tensors"].items()
            # The storage format has no empty arrays.
            if leaf_name(name) is not None and math.prod(entry["shape"])
        }
        return record, self._steps.arrays(step, abstract)

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

    def _checked_record(self, step: int) -> dict[str, Any]:
        """The JSON of a step, refused if it is another run's."""
        record = self._steps.record(step)
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
