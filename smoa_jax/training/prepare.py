"""What frames a run before its first step: everything that can be refused, then where it starts.

``prepare`` writes nothing and deletes nothing; ``begin`` gives the state of the beginning, or of
the last checkpoint, in a directory that says which run it holds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from smoa_jax.checkpoint.base import abstract_base
from smoa_jax.checks import require
from smoa_jax.data.build import Data, build_data
from smoa_jax.data.pipeline import unchecked
from smoa_jax.data.preview import preview
from smoa_jax.data.tokenizer import load_tokenizer
from smoa_jax.sharding.processes import together
from smoa_jax.training.checkpoints import Identity, TrainingCheckpoints
from smoa_jax.training.checks import (
    advice_on_length,
    advice_on_steps,
    check_data,
    check_directory,
    check_steps,
    describe_data,
)
from smoa_jax.training.config import RunConfig
from smoa_jax.training.directory import RunDirectory, RunError
from smoa_jax.training.environment import (
    describe_environment,
    unused_accelerator,
)
from smoa_jax.training.metrics import (
    ProgressReport,
)
from smoa_jax.training.model import LoadedModel, adapter_config, load_model
from smoa_jax.training.optimizer import warmup_steps
from smoa_jax.training.state import (
    Programs,
    resume_state,
    start_state,
)
from smoa_jax.training.step import State
from smoa_jax.training.trackers import check_trackers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run works on; nothing of it changes while it trains."""

    config: RunConfig
    steps: int
    directory: RunDirectory
    data: Data
    tokenizer: Any
    loaded: LoadedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Begun:
    """Where a run starts from: its beginning, or its last checkpoint."""

    step: int
    state: State
    position: dict[str, Any] | None
    programs: Programs
    checkpoints: TrainingCheckpoints


def prepare(
    config: RunConfig, directory: RunDirectory, *, resume: bool, overwrite: bool
) -> Prepared:
    """Load data and model, and refuse whatever can be refused; nothing is written."""
    with together(), ProgressReport("loading", 1) as report:
        check_directory(config, directory, resume=resume, overwrite=overwrite)
        if directory.is_occupied:
            directory.lock()
        require(
            config.train.steps > 0 or not config.data.stream,
            "data.stream=true without train.steps",
            "a number of steps, since packed rows are not known beforehand",
            "set train.steps",
            error=RunError,
        )
        check_trackers(config.train)
        tokenizer = load_tokenizer(abstract_base(config.model.path).source)
        data = build_data(config.data, tokenizer)
        assert data.train is not None
        config = dataclasses.replace(config, data=data.config)
        report.say(describe_data(data))
        report.say(preview(data.train.examples, 0, tokenizer))
        steps = config.train.steps or math.ceil(
            config.train.epochs * len(data.train) / config.train.batch_size
        )
        for advice in (
            advice_on_length(config, data),
            advice_on_steps(config, steps),
            unused_accelerator(),
        ):
            if advice:
                report.say(advice)
        loaded = load_model(config)
        config = dataclasses.replace(config, adapter=adapter_config(config.adapter, loaded.base))
        report.say(describe_environment(loaded))
        check_data(config, loaded, data)
        warmup = warmup_steps(config, steps)
        if warmup < config.optimizer.warmup_steps:
            report.say(
                f"warm-up: {warmup} of {steps} steps, cut from optimizer.warmup_steps="
                f"{config.optimizer.warmup_steps} by optimizer.max_warmup_share="
                f"{config.optimizer.max_warmup_share}"
            )
        report.update(1, str(config.model.path))
    return Prepared(
        config=config,
        steps=steps,
        directory=directory,
        data=data,
        tokenizer=tokenizer,
        loaded=loaded,
    )


def begin(prepared: Prepared, *, resume: bool, overwrite: bool) -> Begun:
    """The state to start from, and a directory that says which run it holds."""
    config, loaded, directory = prepared.config, prepared.loaded, prepared.directory
    with ProgressReport("planning spectra", 1) as report:
        checkpoints = _open_checkpoints(prepared) if resume else None
        # A run that was killed before its first checkpoint resumes from its beginning.
        latest = checkpoints.latest_step() if checkpoints is not None else None
        if checkpoints is not None and latest is not None:
            check_steps(prepared.steps, latest)
            state, programs, restored = resume_state(
                config, loaded, prepared.steps, checkpoints, progress=report.resize
            )
            if note := unchecked(restored.data_position):
                report.say(note)
            tell(checkpoints, report)
            report.say(f"resuming after step {restored.step} of {prepared.steps}")
            for change in directory.changed_settings(config):
                report.say(f"resuming with another setting, {change}")
            return Begun(
                step=restored.step,
                state=state,
                position=restored.data_position,
                programs=programs,
                checkpoints=checkpoints,
            )
        state, programs = start_state(config, loaded, prepared.steps, progress=report.resize)
    if checkpoints is not None:
        directory.write_config(config)
    else:  # nothing is written or deleted before everything that can be refused has been seen
        directory.begin(config, overwrite=overwrite)
        checkpoints = _open_checkpoints(prepared)
    return Begun(step=0, state=state, position=None, programs=programs, checkpoints=checkpoints)


def _open_checkpoints(prepared: Prepared) -> TrainingCheckpoints:
    """The checkpoints of a run; refused if they are another adapter's or base's."""
    config = prepared.config
    return TrainingCheckpoints(
        prepared.directory.checkpoints,
        keep_last=config.train.keep_last,
        keep_best=config.train.keep_best,
        identity=Identity(
            adapter_config=config.adapter.to_fields(),
            base_fingerprint=prepared.loaded.base.fingerprint,
        ),
    )


def tell(checkpoints: TrainingCheckpoints, report: ProgressReport) -> None:
    """Say what became of checkpoints that could not be read or written; the run goes on."""
    while checkpoints.notes:
        report.say(checkpoints.notes.pop(0))
