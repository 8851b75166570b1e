"""The loop and its clock, against a device that is only simulated."""

from __future__ import annotations

import math
import os
import signal
import threading

import numpy as np
import pytest

from smoa_jax.training.config import TrainConfig
from smoa_jax.training.directory import RunError
from smoa_jax.training.loop import CompletionClock, train
from smoa_jax.training.metrics import ProgressReport
from smoa_jax.training.on_step import BetweenSteps, stop_on_signals

STEP_S, DISPATCH_S, EVALUATION_S, SAVE_S = 0.1, 0.002, 5.0, 7.0


class Device:
    """Runs what is dispatched to it in order, 0.1 s a step, while its host goes on."""

    def __init__(self):
        self.now = 0.0
        self.busy_until = 0.0
        self.reads: list[tuple[int, float]] = []

    def take_step(self, state, batch):
        self.now += DISPATCH_S
        self.busy_until = max(self.now, self.busy_until) + STEP_S
        step = state + 1
        values = {"loss": 1.0 / step, "tokens": 50.0, "skipped": 0.0}
        return step, {name: Value(self, self.busy_until, x) for name, x in values.items()}

    def work(self, seconds):
        """Something that waits for the device, and takes a while."""
        self.now = max(self.now, self.busy_until) + seconds


class Value:
    """A number on the device; reading it waits until it is there."""

    def __init__(self, device, ready, value):
        self.device, self.ready, self.value = device, ready, value

    def __float__(self):
        self.device.now = max(self.device.now, self.ready)
        return self.value


class Writer:
    def __init__(self):
        self.records = []

    def write(self, event, step, values):
        self.records.append({"event": event, "step": step, **values})

    def of(self, event):
        return [record for record in self.records if record["event"] == event]


def batches():
    position = 0
    while True:
        position += 1
        yield None, {"rows": position}


def between_steps(
    device, steps, *, start=0, also=None, stopping=None, scores=None, losses=(), **settings
):
    """A run's ``on_step`` over a simulated device, with everything it wrote and saved."""
    writer, saved = Writer(), []

    def evaluate(state, step):
        device.work(EVALUATION_S)
        return 1.0 / step if scores is None else scores[step]

    def save(step, state, position, loss):
        device.work(SAVE_S)
        saved.append((step, state, position["rows"], loss))

    on_step = BetweenSteps(
        TrainConfig(output_dir="unused", **settings),
        start=start,
        steps=steps,
        schedule=lambda taken: np.float32(0.5**taken),
        writer=writer,  # type: ignore[arg-type]
        report=ProgressReport("training", steps),
        evaluate=evaluate,
        save=save,
        stopping=stopping or threading.Event(),
        also=also,
        losses=losses,
        clock=CompletionClock(lambda: device.now),
    )
    return on_step, writer, saved


def test_seconds_of_a_step_are_those_that_the_device_takes_though_steps_overlap():
    device = Device()
    on_step, writer, _ = between_steps(device, 12)
    train(device.take_step, 0, batches(), start=0, steps=12, on_step=on_step)
    seconds = [record["seconds"] for record in writer.of("train")]
    assert [record["step"] for record in writer.of("train")] == list(range(1, 13))
    np.testing.assert_allclose(seconds[0], STEP_S + DISPATCH_S)
    np.testing.assert_allclose(seconds[1:], STEP_S)
    rates = [record["tokens_per_second"] for record in writer.of("train")]
    np.testing.assert_allclose(rates[1:], 500.0)


def test_no_step_is_charged_for_an_evaluation_or_a_save():
    device = Device()
    on_step, writer, saved = between_steps(device, 11, eval_every=3, save_every=4)
    train(device.take_step, 0, batches(), start=0, steps=11, on_step=on_step)
    seconds = [record["seconds"] for record in writer.of("train")]
    assert len(seconds) == 11
    assert max(seconds) < STEP_S + 2 * DISPATCH_S
    assert min(seconds) > STEP_S - 2 * DISPATCH_S
    assert [step for step, *_ in saved] == [4, 8, 11]
    losses = [loss for *_, loss in saved]
    assert math.isnan(losses[0])
    assert math.isnan(losses[1])
    assert losses[2] == pytest.approx(1 / 11)  # the last step is evaluated before it is saved


def test_metrics_of_a_step_are_read_while_the_next_one_runs():
    device, seen = Device(), []

    def also(taken):
        seen.append((taken.step, [record["step"] for record in writer.of("train")]))
        return True

    on_step, writer, _ = between_steps(device, 4, also=also)
    train(device.take_step, 0, batches(), start=0, steps=4, on_step=on_step)
    assert seen == [(1, []), (2, []), (3, [1]), (4, [1, 2])]


def test_the_state_that_comes_out_is_that_of_the_last_step_and_goes_into_the_next():
    device, given = Device(), []

    def take_step(state, batch):
        given.append(state)
        return device.take_step(state, batch)

    on_step, writer, saved = between_steps(device, 9, start=5)
    state = train(take_step, 5, batches(), start=5, steps=9, on_step=on_step)
    assert (state, on_step.step, given) == (9, 9, [5, 6, 7, 8])
    assert saved == [(9, 9, 4, pytest.approx(1 / 9))]
    rates = [record["learning_rate"] for record in writer.of("train")]
    np.testing.assert_allclose(rates, [0.5**taken for taken in (5, 6, 7, 8)])


def test_a_hook_that_says_no_saves_and_stops():
    device = Device()
    on_step, writer, saved = between_steps(device, 9, also=lambda taken: taken.step < 3)
    assert train(device.take_step, 0, batches(), start=0, steps=9, on_step=on_step) == 3
    assert [step for step, *_ in saved] == [3]
    assert [record["step"] for record in writer.of("train")] == [1, 2, 3]


@pytest.mark.parametrize("allowed", [0, 2])
def test_steps_that_are_not_finite_are_skipped_only_so_often(allowed):
    device = Device()

    def take_step(state, batch):
        step, metrics = device.take_step(state, batch)
        return step, metrics | {"skipped": Value(device, 0.0, float(step))}

    on_step, writer, _ = between_steps(device, 9, max_skipped=allowed)
    with pytest.raises(RunError, match=f"got {allowed + 1} steps .* by step {allowed + 1};"):
        train(take_step, 0, batches(), start=0, steps=9, on_step=on_step)
    assert [record["step"] for record in writer.of("train")] == list(range(1, allowed + 2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_run_to_save_and_stop(number):
    device, stopping = Device(), threading.Event()

    def also(taken):
        if taken.step == 2:
            os.kill(os.getpid(), number)
        return True

    on_step, _, saved = between_steps(device, 9, also=also, stopping=stopping)
    before = signal.getsignal(number)
    with stop_on_signals(stopping):
        assert train(device.take_step, 0, batches(), start=0, steps=9, on_step=on_step) == 2
    assert [step for step, *_ in saved] == [2]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("scores", "ends"),
    [
        ([5, 4, 4.5, 4.2, 3], 8),  # steps 2, 4, 6, 8: two in a row are no lower than 4
        ([5, 4, 4.5, 3, 3.5, 3], 12),  # an equal one is no lower
        ([5, 4, 3, 2, 1, 0.5], 12),  # all steps are taken
    ],
)
def test_a_run_ends_when_its_patience_does(scores, ends):
    device = Device()
    by_step = {2 * (n + 1): score for n, score in enumerate(scores)}
    on_step, _, saved = between_steps(
        device, 12, scores=by_step, eval_every=2, patience=2, save_every=5
    )
    last = train(device.take_step, 0, batches(), start=0, steps=12, on_step=on_step)
    assert (last, on_step.step, on_step.finished) == (ends, ends, True)
    assert saved[-1][0] == ends
    assert saved[-1][3] == by_step[ends]
    # A run that goes on remembers what its evaluations have found.
    begun, _, _ = between_steps(
        device, 12, start=4, losses=scores[:2], scores=by_step, eval_every=2, patience=2
    )
    assert not begun.finished
    assert train(device.take_step, 4, batches(), start=4, steps=12, on_step=begun) == ends
    over, _, _ = between_steps(
        device, 99, start=ends, losses=scores[: ends // 2], eval_every=2, patience=2
    )
    assert over.finished is (ends < 12 or scores[-1] == 3)


def test_the_second_interruption_aborts():
    stopping = threading.Event()

    def interrupted_twice():
        with stop_on_signals(stopping):
            os.kill(os.getpid(), signal.SIGINT)
            assert stopping.is_set()
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(5)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    assert signal.getsignal(signal.SIGINT) is before
