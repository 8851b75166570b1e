"""The state of a training run on disk: saved in the background, whole or not at all.

A checkpoint holds what a run has changed or could not make again: trained tensors, the frozen
leaves of the adapter (never the base, nor its spectral bands), the optimizer's state, counters,
keys, and as JSON the position in the data and the identity of adapter and base. Each step is
written to a temporary directory and renamed when it is complete, and a step to be deleted is
renamed away first: whatever moment a process is killed at, every directory named by a step number
is whole. In a bucket one is whole when ``complete.json`` is in it.

A checkpoint that can't be read all the same is passed over for the one before it, and set aside as
``damaged-STEP``. A save that fails costs no more than itself: the run is told, and goes on.

On disk a state is flat: every leaf under its path, such as
``trainable/layers/self_attn/q_proj/smoa/a``, with a table of shapes and dtypes beside it, which a
restore is checked against before anything is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from smoa_jax import checks
from smoa_jax.checkpoint.errors import CheckpointError, require
from smoa_jax.sharding.processes import anywhere, together
from smoa_jax.storage import explained, is_remote, located, reason
from smoa_jax.training.bucket_steps import BucketSteps
from smoa_jax.training.checkpoint_leaves import (
    absolute,
    as_json,
    check_saveable,
    describe,
    flatten,
    key_data,
)
from smoa_jax.training.checkpoint_reader import FORMAT_VERSION, CheckpointReader, Identity, Restored
from smoa_jax.training.checkpoint_steps import KeepBest, LocalSteps

__all__ = ["Identity", "Restored", "TrainingCheckpoints"]


class TrainingCheckpoints(CheckpointReader):
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
        path = absolute(directory)
        with explained(located(directory)):
            there = not read_only or path.is_dir()
        require(there, "what is no directory", "the checkpoints of a run", where=path)
        self._saving: int | None = None
        best = KeepBest(keep_best, best_mode)
        kind = BucketSteps if is_remote(directory) else LocalSteps
        super().__init__(
            path,
            kind(path, keep_last=keep_last, best=best, read_only=read_only),
            identity=identity,
            best=best,
            best_metric=best_metric,
            read_only=read_only,
        )

    # --------------------------------------------------------------------------- saving, waiting

    @property
    def busy(self) -> bool:
        """Whether a save is under way, in any process; all of them ask together."""
        return anywhere(self._steps.busy)

    def save(
        self,
        step: int,
        state: Any,
        data_position: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> bool:
        """Save one step in the background; waits only for the save before it.

        The arrays may be donated or deleted as soon as this returns. If the save before it failed,
        ``notes`` says so.

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
        self._settle()
        if step in self._own_steps and step in self.all_steps():
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
        self._saving = step
        try:
            with together():
                self._steps.save(step, stored, record)
        except Exception as error:  # storage layers have many kinds
            self._give_up(error)
            if wait:
                raise self._failure(step, error) from error
            return False
        self._own_steps.add(step)
        if wait:
            self.wait()
        return True

    def wait(self) -> None:
        """Return when everything saved is on disk.

        Raises:
            CheckpointError: if it could not be written; the checkpoint before it stands.
        """
        error = self._settle()
        if error is not None:
            raise error

    def _settle(self) -> CheckpointError | None:
        """Wait for the save under way; what went wrong with it is noted, and returned."""
        if self._saving is None:
            return None
        try:
            with together():
                self._steps.wait()
        except Exception as error:  # of this process or another one
            step = self._saving
            self._give_up(error)
            return self._failure(step, error)
        self._saving = None
        return None

    def _give_up(self, error: Exception) -> None:
        """Forget a save that failed."""
        step, self._saving = self._saving, None
        self.notes.append(str(self._failure(step, error)))
        if step is not None:
            self._own_steps.discard(step)
            self._best.note(step, None)
        self._steps.recover()

    def _failure(self, step: int | None, error: Exception) -> CheckpointError:
        steps = [known for known in self.all_steps() if known != step]
        stands = f"that of step {steps[-1]} stands" if steps else "there is none before it"
        return CheckpointError(
            f"{self.directory}: got no checkpoint of step {step} ({reason(error)}); expected room "
            f"and rights to write it; {stands}"
        )

    def restore(self, step: int | None, abstract_state: Any) -> Restored:
        """As a reader does, once everything saved is on disk."""
        self.wait()
        return super().restore(step, abstract_state)

    def close(self) -> None:
        """Wait, then give up threads; the object is of no use afterwards."""
        try:
            self.wait()
        finally:
            self._steps.close()

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
