"""Where a run's metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases.

Both are ``Tracker``s; whoever writes metrics knows no more of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from smoa_jax.checks import how_to_install
from smoa_jax.training.config import TrainConfig
from smoa_jax.training.directory import RunError

#: Holds the name under which Weights & Biases knows a run, so that a resumed one goes on there.
_WANDB_ID = "wandb_id.txt"
#: What trackers leave in a run's directory.
TRACKER_FILES = ("tensorboard", "wandb", _WANDB_ID)


class Tracker(Protocol):
    """Takes the numbers of a run as they come."""

    def log(self, event: str, step: int, values: Mapping[str, float]) -> None:
        """The numbers of one event, such as ``train`` or ``eval``, after ``step`` steps."""

    def close(self) -> None:
        """Send or write what is still waiting."""


def check_trackers(settings: TrainConfig) -> None:
    """Refuse what is asked for and not installed.

    Raises:
        ImportError: in one line, which names the extra ``track``.
    """
    if settings.tensorboard:
        _library("tensorboardX", "train.tensorboard=true")
    if settings.wandb:
        _library("wandb", f"train.wandb={settings.wandb}")


def open_trackers(
    settings: TrainConfig, directory: Path, config: Mapping[str, Any]
) -> list[Tracker]:
    """The trackers that a run asks for.

    Args:
        settings: Of the run.
        directory: Of the run; they keep what they write on disk in it.
        config: The whole configuration, to show beside the curves.

    Raises:
        RunError: if Weights & Biases can't start.
    """
    trackers: list[Tracker] = []
    if settings.tensorboard:
        trackers.append(_TensorBoard(directory))
    if settings.wandb:
        trackers.append(_Wandb(settings.wandb, directory, config))
    return trackers


class _TensorBoard:
    """Event files in ``tensorboard/``."""

    def __init__(self, directory: Path):
        library = _library("tensorboardX", "train.tensorboard=true")
        self._board = library.SummaryWriter(str(directory / "tensorboard"))

    def log(self, event: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        self._board.close()


class _Wandb:
    """A run of Weights & Biases; account, server and mode come from its own environment."""

    def __init__(self, project: str, directory: Path, config: Mapping[str, Any]):
        wandb = _library("wandb", f"train.wandb={project}")
        known = directory / _WANDB_ID
        try:
            self._run = wandb.init(
                project=project,
                name=directory.name,
                dir=str(directory),
                config=dict(config),
                id=known.read_text(encoding="utf-8").strip() if known.exists() else None,
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # it has a dozen kinds, down to those of its requests
            reason = " ".join(str(error).split())
            raise RunError(
                f"got train.wandb={project}, and Weights & Biases cannot start ({reason}); "
                "expected an account or WANDB_MODE=offline; run `wandb login` and start again "
                "with --resume, or leave train.wandb out"
            ) from error
        known.write_text(f"{self._run.id}\n", encoding="utf-8")
        # A resumed run takes steps again that were logged already: steps are an axis, not a count.
        self._run.define_metric("*", step_metric="step")

    def log(self, event: str, step: int, values: Mapping[str, float]) -> None:
        named = {f"{event}/{name}": value for name, value in values.items()}
        self._run.log({"step": step, **named})

    def close(self) -> None:
        self._run.finish()


def _library(name: str, asked: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"got {asked} without the library {name}; expected the extra 'track'; "
            f"{how_to_install('track')}, or leave it out"
        ) from error
