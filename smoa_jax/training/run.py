"""The training run, from a configuration to a checkpoint, an adapter and a summary.

It reads top to bottom: prepare, resume, loop, finish. Metrics of a step are read while the next one
runs. What a run writes::

    output_dir/
      config.yaml     as resolved, enough to run it again
      metrics.jsonl   one object per step, evaluation and event; a run that was killed takes the
                      steps since its last checkpoint again, after another "start"
      checkpoints/    training state; resuming from it is bit-exact
      adapter/        the trained adapter, as of the last step
      summary.json    what the table at the end shows
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from smoa_jax.adapter.tree import combine, count_trainable, partition, strip_smoa
from smoa_jax.adapter.types import Params
from smoa_jax.checkpoint.base import abstract_base
from smoa_jax.checkpoint.native.directory import save_adapter
from smoa_jax.data.config import Data, build_data
from smoa_jax.data.pipeline import ExamplesIndex, eval_batches
from smoa_jax.data.tokenizer import load_tokenizer
from smoa_jax.evaluation.scoring import answer_questions
from smoa_jax.sharding.mesh import batch_sharding
from smoa_jax.sharding.processes import batch_share, initialize, is_first, together
from smoa_jax.training.checkpoints import Restored, TrainingCheckpoints
from smoa_jax.training.checks import (
    CONFIG_FILE,
    RunError,
    changed_settings,
    check_data,
    check_directory,
    check_steps,
    describe_data,
    eval_batch_size,
    open_checkpoints,
    write_config,
)
from smoa_jax.training.config import RunConfig
from smoa_jax.training.metrics import (
    MetricsWriter,
    ProgressReport,
    read_metrics,
    require_tensorboard,
)
from smoa_jax.training.model import LoadedModel, load_model
from smoa_jax.training.optimizer import make_schedule
from smoa_jax.training.state import (
    Training,
    resume_training,
    saved_state,
    start_training,
    whole_adapter,
)
from smoa_jax.training.step import State, make_eval_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a finished (or interrupted) run has to show.

    ``finished`` is False after SIGTERM; losses and accuracies are NaN where not measured.
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
    adapter_dir: str


def run(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> Summary:
    """Train, from a configuration alone.

    Args:
        config: The run.
        resume: Continue the run in ``train.output_dir`` from its last checkpoint, bit for bit.
        overwrite: Delete the run that ``train.output_dir`` holds and start again.

    Raises:
        ValueError: (``RunError`` among them) for anything in the way, in one line.
    """
    started = time.monotonic()
    initialize(config.distributed)
    directory = Path(config.train.output_dir)
    with together(), ProgressReport("loading", 1) as report:
        check_directory(config, resume=resume, overwrite=overwrite)
        if config.train.tensorboard:
            require_tensorboard()
        tokenizer = load_tokenizer(abstract_base(config.model.path).source)
        data = build_data(config.data, tokenizer)
        report.say(describe_data(data))
        steps = config.train.steps or math.ceil(
            config.train.epochs * len(data.train) / config.train.batch_size
        )
        loaded = load_model(config)
        check_data(config, loaded, data)
        report.update(1, str(config.model.path))
    restored = None
    with ProgressReport("planning spectra", 1) as report:
        checkpoints = open_checkpoints(config, loaded, directory) if resume else None
        # A run that was killed before its first checkpoint resumes from its beginning.
        latest = checkpoints.latest_step() if checkpoints is not None else None
        if checkpoints is not None and latest is not None:
            check_steps(steps, latest)
            training, restored = resume_training(
                config, loaded, steps, checkpoints, progress=report.resize
            )
            for change in changed_settings(config, directory / CONFIG_FILE):
                report.say(f"resuming with another setting, {change}")
        else:
            training = start_training(config, loaded, steps, progress=report.resize)
            # Nothing is written or deleted before everything that can be refused has been seen.
            with together():
                if is_first():
                    if overwrite and directory.exists():
                        shutil.rmtree(directory)
                    directory.mkdir(parents=True, exist_ok=True)
                    write_config(config, directory / CONFIG_FILE)
            checkpoints = checkpoints or open_checkpoints(config, loaded, directory)
    with _Runner(config, loaded, training, data, tokenizer, checkpoints, steps) as runner:
        return runner.run(restored, started=started)


class _Runner(contextlib.AbstractContextManager):
    """The parts of one run, held together so that the loop reads plainly."""

    def __init__(
        self,
        config: RunConfig,
        loaded: LoadedModel,
        training: Training,
        data: Data,
        tokenizer: Any,
        checkpoints: TrainingCheckpoints,
        steps: int,
    ):
        self._config, self._loaded, self._training = config, loaded, training
        self._data, self._tokenizer, self._checkpoints = data, tokenizer, checkpoints
        self._directory = Path(config.train.output_dir)
        self._steps = steps
        self._state: State = training.state
        self._schedule = make_schedule(config, steps)
        index, count = batch_share(loaded.mesh)
        self._stream = data.train_stream(
            config.train.batch_size, process_index=index, process_count=count
        )
        self._position: dict[str, Any] = self._stream.state
        self._writer = MetricsWriter(self._directory, tensorboard=config.train.tensorboard)
        self._stopping = threading.Event()

    def __exit__(self, *exception: Any) -> None:
        self._stream.close()
        self._checkpoints.close()
        self._writer.close()

    def run(self, restored: Restored | None, *, started: float) -> Summary:
        """Everything after preparation."""
        start = 0
        if restored is not None:
            start, self._position = restored.step, restored.data_position
            self._stream.restore(restored.data_position)
            if is_first():
                write_config(self._config, self._directory / CONFIG_FILE)
        self._writer.write("start", start, {"data": self._data.counts, "steps": self._steps})
        first = self._before(start)
        with _on_terminate(self._stopping):
            step, loss = self._loop(start)
        finished = step >= self._steps
        if not finished:
            return self._summary(finished, step, first, (math.nan, math.nan), started)
        if not math.isfinite(loss):
            loss = self._evaluate(step)
        last = (loss, self._accuracy(self._params(), "after"))
        adapter = self._save_adapter()
        summary = self._summary(finished, step, first, last, started, adapter)
        self._write("summary.json", json.dumps(_jsonable(dataclasses.asdict(summary)), indent=2))
        self._writer.write("finished", step, _jsonable(dataclasses.asdict(summary)))
        return summary

    def _before(self, start: int) -> tuple[float, float]:
        """Loss and accuracy of the base; a resumed run takes them from its own record."""
        if start:
            for record in read_metrics(self._directory, "before"):
                return _number(record["eval_loss"]), _number(record["accuracy"])
            return math.nan, math.nan  # the record is gone, and so is the untrained adapter
        loss = self._evaluate(0, event="eval_before")
        accuracy = math.nan
        if self._config.evaluation.before:
            accuracy = self._accuracy(strip_smoa(self._params()), "before")
        values = {"eval_loss": _number(loss), "accuracy": _number(accuracy)}
        self._writer.write("before", 0, _jsonable(values))
        return loss, accuracy

    def _loop(self, start: int) -> tuple[int, float]:
        """Steps until the end or SIGTERM; (last step, its held-out loss or NaN)."""
        train, step, eval_loss = self._config.train, start, math.nan
        pending: tuple[int, dict[str, jax.Array], float] | None = None
        saved = start
        with ProgressReport("training", self._steps, start=start) as report:
            while step < self._steps and not self._stop_asked(step):
                begun = time.monotonic()
                batch, position = next(self._stream)
                self._state, metrics = self._training.train_step(
                    self._state, self._training.frozen, put_batch(batch, self._loaded)
                )
                step += 1
                self._position = position
                if pending is not None:
                    self._report(report, *pending)
                pending = (step, metrics, begun)
                eval_loss = math.nan
                if train.eval_every and step % train.eval_every == 0:
                    self._report(report, *pending)
                    pending = None
                    eval_loss = self._evaluate(step)
                    report.say(f"step {step}: held-out loss {eval_loss:.4f}")
                if train.save_every and step % train.save_every == 0:
                    self._save(step, eval_loss)
                    saved = step
            if pending is not None:
                self._report(report, *pending)
            if step >= self._steps and not math.isfinite(eval_loss):
                eval_loss = self._evaluate(step)
            if step > saved:
                self._save(step, eval_loss)
            self._checkpoints.wait()
            if self._stopping.is_set() and step < self._steps:
                report.say(f"stopped at step {step}, saved; --resume goes on from there")
        return step, eval_loss

    def _stop_asked(self, step: int) -> bool:
        """Whether SIGTERM came; several processes agree on the step after which they stop."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._stopping.set()
        return self._stopping.is_set()

    def _report(
        self, report: ProgressReport, step: int, metrics: dict[str, jax.Array], begun: float
    ) -> None:
        """Read one step's metrics on the host, write them, and stop a run that has gone bad."""
        values = {name: float(value) for name, value in metrics.items()}
        seconds = time.monotonic() - begun
        taken = step - int(values["skipped"])
        values["learning_rate"] = float(np.asarray(self._schedule(max(taken - 1, 0))))
        values["seconds"] = seconds
        values["tokens_per_second"] = values["tokens"] / seconds
        self._writer.write("train", step, _jsonable(values))
        report.update(
            step,
            f"loss {values['loss']:.4f}  {values['tokens_per_second']:.0f} tok/s  "
            f"{seconds:.2f} s/step",
        )
        if values["skipped"] > self._config.train.max_skipped:
            raise RunError(
                f"got {int(values['skipped'])} steps whose loss or gradient is not finite by step "
                f"{step}; expected at most train.max_skipped={self._config.train.max_skipped}; "
                "lower optimizer.learning_rate, or look at the data"
            )

    def _evaluate(self, step: int, event: str = "eval") -> float:
        """Mean loss per held-out target token; NaN without held-out rows."""
        if self._data.eval is None:
            return math.nan
        loss = _mean_loss(
            self._config,
            self._loaded,
            self._data.eval,
            lambda batch: self._training.eval_step(
                self._state["trainable"], self._training.frozen, batch
            ),
        )
        self._writer.write(event, step, _jsonable({"eval_loss": loss}))
        return loss

    def _accuracy(self, params: Params, which: str) -> float:
        settings = self._config.evaluation
        if not settings.rows:
            return math.nan
        with ProgressReport(f"answering {which}", settings.rows) as report:
            answers = answer_questions(
                self._loaded.model,
                params,
                self._data.questions,
                self._tokenizer,
                rows=settings.rows,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                protocol=settings.answer,
                progress=lambda done, _: report.update(done, ""),
            )
        score = answers.score
        self._writer.write(
            f"accuracy_{which}",
            int(self._state["step"]),
            {"accuracy": score.accuracy, "correct": score.correct, "rows": score.total}
            | {"unanswered": score.unanswered},
        )
        lines = [
            json.dumps({"question": q, "reference": r, "response": a, "right": ok})
            for q, r, a, ok in zip(
                self._data.questions.questions,
                self._data.questions.references,
                answers.responses,
                score.right,
                strict=False,
            )
        ]
        self._write(f"answers_{which}.jsonl", "\n".join(lines))
        return score.accuracy

    def _write(self, name: str, text: str) -> None:
        """A file of the run, by the first process."""
        if is_first():
            (self._directory / name).write_text(text + "\n", encoding="utf-8")

    def _params(self) -> Params:
        return combine(self._state["trainable"], self._training.frozen)

    def _save(self, step: int, eval_loss: float) -> None:
        metrics = {"eval_loss": eval_loss} if math.isfinite(eval_loss) else None
        state = saved_state(self._state, self._training.frozen)
        self._checkpoints.save(step, state, self._position, metrics)
        self._writer.write("save", step, {})

    def _save_adapter(self) -> str:
        directory = self._directory / "adapter"
        params = whole_adapter(self._params())
        with together():
            if is_first():
                save_adapter(
                    params,
                    self._config.adapter,
                    directory,
                    base_fingerprint=self._loaded.base.fingerprint,
                    base_name=str(self._config.model.path),
                    template=self._config.data.template,
                    overwrite=True,
                )
        return str(directory)

    def _summary(self, finished, step, before, after, started, adapter="") -> Summary:
        base = strip_smoa(self._params())
        return Summary(
            finished=finished,
            steps=step,
            skipped=int(self._state["skipped"]),
            trainable=count_trainable(base, self._config.adapter),
            total=sum(leaf.size for leaf in jax.tree.leaves(base)),
            loss_before=before[0],
            loss_after=after[0],
            accuracy_before=before[1],
            accuracy_after=after[1],
            scored_rows=self._config.evaluation.rows,
            seconds=time.monotonic() - started,
            adapter_dir=adapter,
        )


def put_batch(batch: dict[str, np.ndarray], loaded: LoadedModel) -> dict[str, jax.Array]:
    """This process's rows of a global batch, on its devices."""
    sharding = batch_sharding(loaded.mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def held_out_loss(
    config: RunConfig, loaded: LoadedModel, rows: ExamplesIndex, params: Params
) -> float:
    """Mean loss per target token of any params, adapted or not, on held-out rows."""
    step = jax.jit(make_eval_step(loaded.model, chunk=config.train.loss_chunk))
    trainable, frozen = partition(params)
    return _mean_loss(config, loaded, rows, lambda batch: step(trainable, frozen, batch))


def _mean_loss(
    config: RunConfig,
    loaded: LoadedModel,
    rows: ExamplesIndex,
    step: Callable[[dict[str, jax.Array]], tuple[jax.Array, jax.Array]],
) -> float:
    index, count = batch_share(loaded.mesh)
    batches = eval_batches(rows, eval_batch_size(config), process_index=index, process_count=count)
    sums = [step(put_batch(batch, loaded)) for batch in batches]
    total, tokens = (float(sum(part)) for part in zip(*jax.device_get(sums), strict=True))
    return total / tokens if tokens else math.nan


@contextlib.contextmanager
def _on_terminate(stopping: threading.Event) -> Iterator[None]:
    """SIGTERM asks the loop to save and stop after the step it is in.

    With several processes JAX itself catches it, and tells the others.
    """
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    """NaN is not JSON: null stands for what was not measured or not finite."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
