"""The adapter that a user means by a directory: one of its own, a run's, or a run's at some step.

Whatever is named, the commands get an adapter directory; one that has to be taken out of a training
checkpoint is written to a temporary place, so that every reader of adapters is a reader of runs.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smoa_jax import checks
from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.checkpoint.base import abstract_base
from smoa_jax.checkpoint.directories import put_back
from smoa_jax.checkpoint.errors import CheckpointError, require
from smoa_jax.checkpoint.huggingface.directory import download, is_hub_name
from smoa_jax.checkpoint.native.directory import ADAPTER_FILE, save_adapter
from smoa_jax.checkpoint.native.leaves import attach_leaves
from smoa_jax.storage import is_remote, located
from smoa_jax.training.checkpoints import TrainingCheckpoints
from smoa_jax.training.directory import RunDirectory
from smoa_jax.training.facts import facts_at


@contextlib.contextmanager
def adapter_directory(path: str | Path, checkpoint: str, model: str) -> Iterator[Path]:
    """The directory of the adapter that ``path`` and ``checkpoint`` mean.

    >>> with adapter_directory("runs/mine", "best", "MODEL") as adapter:
    ...     params = load_adapter(adapter, base.params, base_fingerprint=base.fingerprint)

    Args:
        path: An adapter's directory, a run's, or ``organisation/adapter`` on the hub.
        checkpoint: Empty: the adapter as it stands there. ``best`` (by held-out loss), ``last`` or
            a step's number: of the run's checkpoints.
        model: The base, of which names and shapes alone are read.

    Raises:
        CheckpointError: if there is no such adapter, run or checkpoint.
    """
    given = locate(path)
    run = _run_of(given)
    if not checkpoint:
        yield given if run is None or (given / ADAPTER_FILE).is_file() else _finished(run)
        return
    if run is None:
        checks.refuse(
            f"--checkpoint {checkpoint} for what is no run",
            "the directory of a run (with config.yaml and checkpoints), or the adapter in one",
            "leave it out",
            where=given,
            error=CheckpointError,
        )
    with tempfile.TemporaryDirectory(prefix="smoa-adapter-") as folder:
        yield write_checkpoint_adapter(run, checkpoint, model, Path(folder) / "adapter")


def write_checkpoint_adapter(
    run: RunDirectory, checkpoint: str, model: str, directory: Path
) -> Path:
    """Write the adapter of a run's checkpoint as a directory of its own.

    Raises:
        CheckpointError: if there is no such checkpoint.
        ValueError: for a word that is no checkpoint.
    """
    with TrainingCheckpoints(run.checkpoints, identity=None, read_only=True) as checkpoints:
        identity, step, leaves = checkpoints.read_adapter(_step(checkpoints, checkpoint))
        loss = checkpoints.metrics(step).get("eval_loss", math.nan)
        for note in checkpoints.notes:
            warnings.warn(note, stacklevel=2)
    settings = run.settings()
    config = SmoaConfig(**identity.adapter_config)
    base = abstract_base(model)
    return save_adapter(
        attach_leaves(base.params, config, leaves),
        config,
        directory,
        base_fingerprint=identity.base_fingerprint,
        base_name=settings["model"]["path"],
        template=settings["data"]["template"],
        facts=facts_at(run.path, step, loss),
    )


def locate(path: str | Path) -> Path:
    """The directory that is meant by a path, or by ``organisation/adapter`` on the hub.

    Raises:
        CheckpointError: if nothing is there.
    """
    given = located(path)
    put_back(given)
    # Beside directories that are here, a name is one that was mistyped, not one of the hub.
    if not given.exists() and is_hub_name(str(path)) and not given.parent.exists():
        return download(str(path), weights=True)
    require(
        given.exists(),
        "a path that does not exist",
        "the directory of an adapter or a run",
        "correct it",
        where=path,
    )
    return given


def run_settings(path: str | Path) -> dict[str, Any]:
    """The configuration of the run that a directory, or the one around it, holds; {} if none."""
    run = _run_of(located(path))
    return {} if run is None else run.settings()


def _run_of(path: Path) -> RunDirectory | None:
    """The run that lies in a directory, or that an adapter's directory lies in."""
    around = path.parent if is_remote(path) else path.absolute().parent
    for candidate in (RunDirectory(path), RunDirectory(around)):
        if candidate.holds_run and candidate.checkpoints.is_dir():
            return candidate
    return None


def _finished(run: RunDirectory) -> Path:
    put_back(run.adapter)
    require(
        (run.adapter / ADAPTER_FILE).is_file(),
        "a run that isn't finished, so it holds no adapter",
        "a finished one",
        "resume it, or name one of its checkpoints (--checkpoint last)",
        where=run.path,
    )
    return run.adapter


def _step(checkpoints: TrainingCheckpoints, checkpoint: str) -> int | None:
    if checkpoint == "last":
        return None
    if checkpoint == "best":
        best = checkpoints.best_step()
        require(
            best is not None,
            "--checkpoint best, and none with a held-out loss",
            "a run that evaluates",
            "use --checkpoint last, or a step's number",
            where=checkpoints.directory,
        )
        return best
    checks.require(
        checkpoint.isdigit(), f"--checkpoint {checkpoint}", "best, last or a step's number"
    )
    return int(checkpoint)
