"""A training run, from a configuration to a checkpoint, an adapter and a summary.

It reads top to bottom: prepare and begin (``prepare.py``), loop, finish. ``directory.py`` says what
a run writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
import time
from typing import Any

import jax

from smoa_jax.adapter.tree import count_trainable, strip_smoa
from smoa_jax.adapter.types import Params
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.sharding.memory import exhaustion_explained
from smoa_jax.sharding.processes import batch_share, end_if_another_is_lost, initialize
from smoa_jax.training.checks import (
    describe_dropped,
)
from smoa_jax.training.config import RunConfig
from smoa_jax.training.directory import RunDirectory, RunError, jsonable, plain
from smoa_jax.training.environment import (
    record_environment,
)
from smoa_jax.training.facts import facts_at, facts_at_start
from smoa_jax.training.held_out import held_out_answers, mean_loss
from smoa_jax.training.loop import OnStep, train
from smoa_jax.training.metrics import (
    MetricsWriter,
    ProgressReport,
    read_metrics,
)
from smoa_jax.training.on_step import BetweenSteps, stop_on_signals
from smoa_jax.training.optimizer import make_schedule
from smoa_jax.training.prepare import Begun, Prepared, begin, prepare, tell
from smoa_jax.training.state import (
    whole_adapter,
)
from smoa_jax.training.step import State
from smoa_jax.training.trackers import open_trackers

__all__ = ["RunError", "Summary", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a finished (or interrupted) run has to show.

    ``finished`` is False for a run that was asked to stop; losses and accuracies are NaN where not
    measured.
    """

    finished: bool
    steps: int
    skipped: int
    trainable: int
    total: int
    loss_before: float
    loss_after: float
    accuracy_before: float
    accuracy_after: float
    scored_rows: int
    seconds: float
    tokens_per_second: float
    adapter_dir: str


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
) -> Summary:
    """Train, from a configuration alone.

    >>> summary = run(config, on_step=lambda taken: float(taken.metrics["loss"]) > 0.01)

    Args:
        config: The run.
        resume: Continue the run in ``train.output_dir`` from its last checkpoint: bit for bit on a
            CPU with as many devices; elsewhere the same rows, keys and state, and the rounding of
            the device.
        overwrite: Delete the run that ``train.output_dir`` holds and start again.
        on_step: Called after every step, in every process; False asks the run to save and stop.

    Raises:
        ValueError: (``RunError`` among them) for anything in the way, in one line.
    """
    started = time.monotonic()
    initialize(config.distributed)
    with exhaustion_explained(_to_lower(config)), contextlib.ExitStack() as stack:
        directory = stack.enter_context(RunDirectory(config.train.output_dir))
        prepared = prepare(config, directory, resume=resume, overwrite=overwrite)
        begun = begin(prepared, resume=resume, overwrite=overwrite)
        stack.callback(begun.checkpoints.close)
        writer = MetricsWriter(
            directory.path,
            lambda path: open_trackers(config.train, path, plain(prepared.config)),
        )
        stack.callback(writer.close)
        stack.push(end_if_another_is_lost)
        return _Run(prepared, begun, writer, on_step).run(started)


class _Run:
    """A run that has begun: the loop, and what frames it."""

    def __init__(
        self, prepared: Prepared, begun: Begun, writer: MetricsWriter, on_step: OnStep | None
    ):
        self._prepared, self._begun, self._writer = prepared, begun, writer
        self._on_step = on_step
        self._config, self._data = prepared.config, prepared.data
        self._programs = begun.programs

    def run(self, started: float) -> Summary:
        """Measure the base, train, and finish unless the run was asked to stop."""
        start, steps = self._begun.step, self._prepared.steps
        index, count = batch_share(self._prepared.loaded.mesh)
        stream = self._data.train_stream(
            self._config.train.batch_size, process_index=index, process_count=count
        )
        with contextlib.closing(stream):
            if self._begun.position is not None:
                stream.restore(self._begun.position)
                self._prepared.directory.write_config(self._config)
            facts = facts_at_start(self._config, self._data)
            self._writer.write(
                "start", start, {"data": self._data.counts, "steps": steps, "facts": facts}
            )
            state = self._begun.state
            before = self._before(state)
            stopping = threading.Event()
            with (
                stop_on_signals(stopping),
                ProgressReport("training", steps, start=start) as report,
            ):
                if math.isfinite(before[0]):
                    report.say(f"step 0: held-out loss {before[0]:.4f}, the base's own")
                between = BetweenSteps(
                    self._config.train,
                    start=start,
                    steps=steps,
                    schedule=make_schedule(self._config, steps),
                    writer=self._writer,
                    report=report,
                    evaluate=self._evaluate,
                    save=functools.partial(self._save, report),
                    stopping=stopping,
                    losses=self._earlier_losses(start),
                    also=self._on_step,
                    busy=lambda: self._begun.checkpoints.busy,
                )
                if not between.finished:
                    state = train(
                        self._programs.take_step,
                        state,
                        stream,
                        start=start,
                        steps=steps,
                        on_step=between,
                    )
                self._wait_for_saves(between.finished, report)
                if dropped := describe_dropped(self._data):
                    report.say(dropped)
                if not between.finished:
                    report.say(
                        f"stopped at step {between.step}, saved; --resume goes on from there"
                    )
        return self._finish(state, between, before, started)

    def _finish(
        self, state: State, between: BetweenSteps, before: tuple[float, float], started: float
    ) -> Summary:
        """The adapter first, since it is what a user would miss; then answers and a summary."""
        step = between.step
        after, adapter = (math.nan, math.nan), ""
        if between.finished:
            params, directory = self._programs.params(state), self._prepared.directory
            directory.write_adapter(
                whole_adapter(self._programs.stored_params(state)),
                self._config,
                self._prepared.loaded.base.fingerprint,
                facts_at(directory.path, step, between.eval_loss),
            )
            adapter = str(directory.adapter)
            loss = between.eval_loss
            loss = loss if math.isfinite(loss) else self._evaluate(state, step)
            after = (loss, self._accuracy(params, "after", step))
        base = strip_smoa(self._programs.params(state))
        summary = Summary(
            finished=between.finished,
            steps=step,
            skipped=int(state["skipped"]),
            trainable=count_trainable(base, self._config.adapter),
            total=sum(leaf.size for leaf in jax.tree.leaves(base)),
            loss_before=before[0],
            loss_after=after[0],
            accuracy_before=before[1],
            accuracy_after=after[1],
            scored_rows=self._config.evaluation.rows,
            seconds=time.monotonic() - started,
            tokens_per_second=between.tokens_per_second,
            adapter_dir=adapter,
        )
        if summary.finished:
            made_with = record_environment(self._prepared.loaded.mesh)
            self._prepared.directory.write_summary(
                {**dataclasses.asdict(summary), **made_with, "data": self._data.identity}
            )
            self._writer.write("finished", step, jsonable(dataclasses.asdict(summary)))
        return summary

    def _earlier_losses(self, start: int) -> list[float]:
        """Held-out losses up to a step, each step's once, though it may have been taken again."""
        records = read_metrics(self._prepared.directory.path, "eval") if start else []
        losses = {record["step"]: _number(record["eval_loss"]) for record in records}
        return [loss for step, loss in sorted(losses.items()) if step <= start]

    def _before(self, state: State) -> tuple[float, float]:
        """Loss and accuracy of the base; a resumed run takes them from its own record."""
        if self._begun.step:
            for record in read_metrics(self._prepared.directory.path, "before"):
                return _number(record["eval_loss"]), _number(record["accuracy"])
            return math.nan, math.nan  # the record is gone, and so is the untrained adapter
        loss = self._evaluate(state, 0, event="eval_before")
        accuracy = math.nan
        if self._config.evaluation.before:
            accuracy = self._accuracy(strip_smoa(self._programs.params(state)), "before", 0)
        self._writer.write("before", 0, jsonable({"eval_loss": loss, "accuracy": accuracy}))
        return loss, accuracy

    def _evaluate(self, state: State, step: int, event: str = "eval") -> float:
        """Mean loss per held-out target token; NaN without held-out rows."""
        if self._data.eval is None:
            return math.nan
        mesh = self._prepared.loaded.mesh
        loss = mean_loss(
            self._config, mesh, self._data.eval, lambda batch: self._programs.evaluate(state, batch)
        )
        self._writer.write(event, step, jsonable({"eval_loss": loss}))
        return loss

    def _wait_for_saves(self, finished: bool, report: ProgressReport) -> None:
        """Of a run that is finished the adapter is still to be had, if not its last checkpoint."""
        try:
            self._begun.checkpoints.wait()
        except CheckpointError:
            if not finished:
                raise
        tell(self._begun.checkpoints, report)

    def _save(
        self,
        report: ProgressReport,
        step: int,
        state: State,
        position: dict[str, Any],
        eval_loss: float,
    ) -> None:
        metrics = {"eval_loss": eval_loss} if math.isfinite(eval_loss) else None
        self._prepared.directory.check_lock()
        saved = self._programs.saved(state)
        if self._begun.checkpoints.save(step, saved, position, metrics):
            self._writer.write("save", step, {})
        tell(self._begun.checkpoints, report)

    def _accuracy(self, params: Params, which: str, step: int) -> float:
        """Share of held-out questions answered right; NaN if none is asked."""
        rows = self._config.evaluation.rows
        if not rows:
            return math.nan
        with ProgressReport(f"answering {which}", rows) as report:
            answers = held_out_answers(
                self._config,
                self._prepared.loaded,
                self._data,
                params,
                self._prepared.tokenizer,
                progress=lambda done, _: report.update(done, ""),
            )
        score = answers.score
        values = {"accuracy": score.accuracy, "correct": score.correct, "rows": score.total}
        self._writer.write(f"accuracy_{which}", step, values | {"unanswered": score.unanswered})
        self._prepared.directory.write_answers(which, self._data.questions, answers)
        return score.accuracy


def _to_lower(config: RunConfig) -> str:
    """What makes a run that does not fit smaller, and how it is set now."""
    parts = config.train.batch_size // config.train.accumulate
    return (
        f"raise train.accumulate={config.train.accumulate} (now {parts} rows at a time), set "
        f"model.remat={config.model.remat} to full, lower data.max_length="
        f"{config.data.max_length} or train.loss_chunk={config.train.loss_chunk}, or spread the "
        f"weights over more devices by mesh.fsdp"
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
