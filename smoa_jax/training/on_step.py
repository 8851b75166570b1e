"""What a run does between two steps: read metrics, evaluate, save, and see whether to stop.

Metrics of a step are read while the next one runs, so that reading them never holds up the device;
before an evaluation or a checkpoint they are read at once, and the clock starts afresh after it.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from smoa_jax.checks import require
from smoa_jax.training.config import TrainConfig
from smoa_jax.training.directory import RunError, jsonable
from smoa_jax.training.loop import CompletionClock, OnStep, Taken, compilations
from smoa_jax.training.metrics import MetricsWriter, ProgressReport
from smoa_jax.training.step import Metrics, State


class BetweenSteps:
    """The ``on_step`` of a run.

    Attributes:
        step: The last step taken.
        eval_loss: Held-out loss after it, or NaN where it was not measured.
        finished: Whether there is nothing left to train: all steps are taken, or patience ran out.
        tokens_per_second: Over the steps of this process that compiled nothing; NaN without any.

    Args:
        settings: Of the loop.
        start: Steps taken before.
        steps: Steps in all.
        schedule: Learning rate by optimizer step.
        writer: Where metrics go.
        report: What shows progress.
        evaluate: (state, step) -> held-out loss.
        save: (step, state, position in the data, held-out loss or NaN).
        stopping: Set when the run shall save and stop.
        losses: Held-out losses of the evaluations before ``start``, for patience.
        also: Called after every step; False asks for the same.
        busy: Whether a save is under way. One that falls due meanwhile is made up for after the
            next step that finds none, so that slow storage holds up no step.
        clock: Of the steps.
    """

    def __init__(
        self,
        settings: TrainConfig,
        *,
        start: int,
        steps: int,
        schedule: optax.Schedule,
        writer: MetricsWriter,
        report: ProgressReport,
        evaluate: Callable[[State, int], float],
        save: Callable[[int, State, dict[str, Any], float], None],
        stopping: threading.Event,
        losses: Sequence[float] = (),
        also: OnStep | None = None,
        busy: Callable[[], bool] = lambda: False,
        clock: CompletionClock | None = None,
    ):
        self.step, self.eval_loss = start, math.nan
        self._settings, self._steps, self._schedule = settings, steps, schedule
        self._writer, self._report_line = writer, report
        self._evaluate, self._save, self._stopping, self._also = evaluate, save, stopping, also
        self._busy, self._owed = busy, False
        self._losses = list(losses)
        self._tokens, self._seconds = 0.0, 0.0
        self._unread: tuple[int, Metrics, bool] | None = None
        self._clock = clock or CompletionClock()
        self._start_clock()

    def __call__(self, taken: Taken) -> bool:
        """All that is due after a step; whether to go on."""
        compiled = compilations() > self._compiled
        stop, last = self._stop_asked(taken), taken.step == self._steps
        self._read()
        self._unread = (taken.step, taken.metrics, compiled)
        self.step, self.eval_loss = taken.step, math.nan
        evaluates = last or _is_due(self._settings.eval_every, taken.step)
        due = self._saves_now(taken.step, must=last or stop or evaluates)
        if evaluates or due:
            self._read()
        if evaluates:
            self.eval_loss = self._evaluate(taken.state, taken.step)
            self._losses.append(self.eval_loss)
            if not last and math.isfinite(self.eval_loss):
                self._report_line.say(f"step {taken.step}: held-out loss {self.eval_loss:.4f}")
        if due or self.finished:
            self._save(taken.step, taken.state, taken.position, self.eval_loss)
        if evaluates or due:
            self._start_clock()
        self._compiled = compilations()
        if self.finished and not last:
            self._report_line.say(
                f"no lower held-out loss in {self._settings.patience} evaluations: the run ends at "
                f"step {taken.step}; --checkpoint best takes the adapter of the lowest"
            )
        return not (stop or self.finished)

    def _saves_now(self, step: int, *, must: bool) -> bool:
        """Whether to save after a step: it is due, or was and had to wait, and nothing is saving.

        Args:
            step: That was taken.
            must: Wait for a save under way sooner than put off another.
        """
        last_or_asked = step == self._steps or self._stopping.is_set()
        due = self._owed or last_or_asked or _is_due(self._settings.save_every, step)
        self._owed = due and not must and self._busy()
        return due and not self._owed

    @property
    def finished(self) -> bool:
        return self.step >= self._steps or out_of_patience(self._losses, self._settings.patience)

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else math.nan

    def _start_clock(self) -> None:
        self._clock.restart()
        self._compiled = compilations()

    def _stop_asked(self, taken: Taken) -> bool:
        """Whether a signal came; several processes agree on the step after which they stop."""
        if self._also is not None and not self._also(taken):
            self._stopping.set()
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(taken.step):
            self._stopping.set()
        return self._stopping.is_set()

    def _read(self) -> None:
        """Read the waiting step's metrics, write them, and stop a run that has gone bad."""
        if self._unread is None:
            return
        (step, metrics, compiled), self._unread = self._unread, None
        values: dict[str, Any] = {name: float(value) for name, value in metrics.items()}
        seconds = self._clock.lap()
        taken = step - int(values["skipped"])
        values["learning_rate"] = float(np.asarray(self._schedule(max(taken - 1, 0))))
        values["seconds"] = seconds
        values["tokens_per_second"] = values["tokens"] / seconds if seconds else math.nan
        values["compiled"] = compiled
        if not compiled:
            self._tokens += values["tokens"]
            self._seconds += seconds
        self._writer.write("train", step, jsonable(values))
        note = "  (compiled)" if compiled else ""
        self._report_line.update(
            step,
            f"loss {values['loss']:.4f}  {values['tokens_per_second']:.0f} tok/s  "
            f"{seconds:.2f} s/step{note}",
        )
        require(
            values["skipped"] <= self._settings.max_skipped,
            f"{int(values['skipped'])} steps whose loss or gradient is not finite by step {step}",
            f"at most train.max_skipped={self._settings.max_skipped}",
            "lower optimizer.learning_rate, or look at the data",
            error=RunError,
        )


def out_of_patience(losses: Sequence[float], patience: int) -> bool:
    """Whether the last ``patience`` losses all are no lower than the lowest before them."""
    if not patience or len(losses) <= patience:
        return False
    return not min(losses[-patience:]) < min(losses[:-patience])


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def stop_on_signals(stopping: threading.Event) -> Iterator[None]:
    """SIGTERM and the first SIGINT ask the run to save and stop; the second SIGINT aborts it.

    With several processes JAX itself catches SIGTERM and tells the others, so SIGINT becomes one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    several = jax.process_count() > 1

    def ask(number: int, _: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.process_index() == 0:
            again = "; Ctrl-C again aborts" if number == signal.SIGINT else ""
            print(f"\nstopping: steps under way end first, then it saves{again}", flush=True)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            stopping.set()

    signals = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, ask) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
