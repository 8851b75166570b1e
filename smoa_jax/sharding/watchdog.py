"""The end of a job whose processes wait for one that is gone.

A process that dies is missed by JAX's own heartbeats, after ``distributed.heartbeat_timeout``. One
that hangs still has a heart: what gives it away is that no process gets on, since all wait for it.
So each watches its own progress and ends by itself, at once and whatever it is waiting for.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

#: Exit status where another process of the job died or hangs: the run can be resumed from its last
#: checkpoint. It is EX_PROTOCOL of sysexits.h.
LOST_PROCESS = 76


def end_now(message: str) -> None:
    """Say why, and end this process without the farewells that would wait for the others."""
    print(f"smoa: error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(LOST_PROCESS)


class Watchdog:
    """Ends this process when it has made no progress for too long.

    Args:
        seconds: How long.
        name: Of this process, for the message.
        end: What ends it.
    """

    def __init__(self, seconds: float, name: str, end: Callable[[str], None] = end_now):
        self._seconds, self._name, self._end = seconds, name, end
        self._last = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def progress(self) -> None:
        """Something was done."""
        self._last = time.monotonic()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                self._end(
                    f"got no progress in {self._name} for distributed.step_timeout="
                    f"{self._seconds:g} s; expected a step, an evaluation or a part of a plan in "
                    "that time; another process hangs, or the time is too short; --resume goes on "
                    "from the last checkpoint"
                )
                return
