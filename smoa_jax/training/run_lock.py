"""What keeps a second run out of a directory while the first is under way.

Here it is a lock of the file system, which the system lets go of when a run dies. A bucket has
none: there a run writes an object again and again while it lives. Whoever finds one waits until it
has changed, and is refused, or has not changed for some beats, and takes its place; a run that
finds another's name in it stops before it saves again.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from smoa_jax.storage import explained, filesystem, is_remote

#: Seconds between two signs of life, and how many may be missed.
BEAT_S, MISSED = 10.0, 2.5


class Taken(Exception):  # noqa: N818 (it is no error of the lock)
    """Another run is under way."""


class RunLock(Protocol):
    """The lock of one run."""

    def acquire(self) -> None:
        """Take it; nothing happens if it is held already. Raises ``Taken``."""

    def check(self) -> None:
        """Raises ``Taken`` if another run has taken it in the meantime."""

    def release(self) -> None:
        """Let go of it."""


def run_lock(path: Path) -> RunLock:
    """The lock that a file, or an object of a bucket, stands for."""
    return _BucketLock(path) if is_remote(path) else _FileLock(path)


class _FileLock:
    def __init__(self, path: Path):
        self._lock = FileLock(path, timeout=0)

    def acquire(self) -> None:
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire()
        except Timeout as error:
            raise Taken from error

    def check(self) -> None:
        pass

    def release(self) -> None:
        self._lock.release(force=True)


class _BucketLock:
    def __init__(self, path: Path, beat_s: float | None = None):
        self._path, self._beat_s = path, BEAT_S if beat_s is None else beat_s
        self._name = uuid.uuid4().hex
        self._ended = threading.Event()
        self._held, self._lost, self._beats = False, False, 0
        self._thread = threading.Thread(target=self._live, daemon=True)

    def acquire(self) -> None:
        if self._held:
            return
        with explained(self._path):
            silent = self._is_silent()
            if silent:
                self._write()
        if not silent:
            raise Taken
        self._held = True
        self._thread.start()

    def check(self) -> None:
        if self._held:
            with contextlib.suppress(Exception):  # a bucket that fails for a moment is no other run
                self._look()
        if self._lost:
            raise Taken

    def release(self) -> None:
        self._ended.set()
        if not self._held:
            return
        self._thread.join()
        self._held = False
        with contextlib.suppress(Exception):  # what is left is taken over after some beats
            found = self._read()
            if found is not None and found["run"] == self._name:
                self._path.unlink()

    def _is_silent(self) -> bool:
        """Whether no other run gives a sign of life."""
        first = self._read()
        if first is None:
            return True
        seconds = MISSED * self._beat_s
        print(
            f"{self._path} is there: waiting {seconds:.0f} s to see whether the run of process "
            f"{first.get('process')} on {first.get('host')} still goes on",
            flush=True,
        )
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(self._beat_s / 5)
            now = self._read()
            if now is None:
                return True
            if now != first:
                return False
        return True

    def _live(self) -> None:
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(Exception):  # the next beat may come through
                self._look()
                if not self._lost:
                    self._write()

    def _look(self) -> None:
        found = self._read()
        self._lost = self._lost or (found is not None and found["run"] != self._name)

    def _read(self) -> dict[str, Any] | None:
        try:
            # At one go: a file that is opened to be read may have been written anew in between.
            return json.loads(filesystem(self._path).cat_file(str(self._path)))
        except FileNotFoundError:
            return None
        except ValueError:  # no lock of ours
            return {"run": ""}

    def _write(self) -> None:
        self._beats += 1
        sign = {"run": self._name, "beat": self._beats, "host": platform.node()}
        self._path.write_text(json.dumps({**sign, "process": os.getpid()}), encoding="utf-8")
