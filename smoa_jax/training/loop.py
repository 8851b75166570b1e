"""The ``for`` of a run, and the clock beside it; nothing else.

State goes in and comes out: every step donates the state that it was given and hands on another, so
whoever keeps an old one holds nothing. ``on_step`` is the seam between two steps: metrics,
evaluation, checkpoints and stopping hang on it, and so does any test that wants to look inside.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax

from smoa_jax.training.step import Metrics, State

#: (state, batch on this host) -> (state, metrics); the state that goes in is donated.
TakeStep: TypeAlias = Callable[[State, Any], tuple[State, Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taken:
    """What is known once a step has been dispatched; it may not have been computed yet.

    Attributes:
        step: Its number, from 1.
        state: After it; donated to the next step as soon as ``on_step`` returns.
        metrics: Of it, on the devices; reading one waits for the step.
        position: In the data, after its batch.
    """

    step: int
    state: State
    metrics: Metrics
    position: dict[str, Any]


#: Called after every step; returns whether to go on.
OnStep: TypeAlias = Callable[[Taken], bool]


def train(
    take_step: TakeStep,
    state: State,
    stream: Iterator[tuple[Any, dict[str, Any]]],
    *,
    start: int,
    steps: int,
    on_step: OnStep,
) -> State:
    """Take steps ``start + 1`` to ``steps``, or until ``on_step`` says to stop.

    Args:
        take_step: One step; the state that it is given is of no use afterwards.
        state: Before the first step; donated.
        stream: Of (batch, position after it), without end.
        start: Steps taken already.
        steps: Steps in all.
        on_step: What happens between two steps.

    Returns:
        The state after the last step taken.
    """
    for step in range(start + 1, steps + 1):
        batch, position = next(stream)
        state, metrics = take_step(state, batch)
        if not on_step(Taken(step=step, state=state, metrics=metrics, position=position)):
            break
    return state


class CompletionClock:
    """The seconds of each step, from the completion of the one before to its own.

    Steps are dispatched before those in front of them are done, so the time from a dispatch to a
    completion spans more than one step. Between two completions lies exactly one.

    >>> clock.restart()  # before the first step, and after anything that is no step
    >>> ...  # wait for a step
    >>> seconds = clock.lap()
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self.restart()

    def restart(self) -> None:
        """What came before belongs to no step."""
        self._last = self._now()

    def lap(self) -> float:
        """Seconds since the last lap or restart."""
        last, self._last = self._last, self._now()
        return self._last - last


def compilations() -> int:
    """Programs that XLA has compiled in this process since this was first called."""
    return len(_compiled())


@functools.cache
def _compiled() -> list[str]:
    """One entry for each compilation that JAX reports from now on."""
    seen: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen
