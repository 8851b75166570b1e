"""A program for the tests: saves checkpoints and kills itself at a chosen moment, several times.

    python kill_during_save.py DIRECTORY COUNT

Runs once to the end in DIRECTORY/whole, counting what Python does to files there, then COUNT times
in DIRECTORY/0, 1, ..., each ending by SIGKILL at another of those moments. Each run notes in
``finished`` the last step that was certainly on disk.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from smoa_jax.training.checkpoints import Identity, TrainingCheckpoints

IDENTITY = Identity(adapter_config={"rank": 4}, base_fingerprint="base")
NUM_STEPS = 4
_WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def state_of(step: int) -> dict[str, jax.Array]:
    """Arrays that tell which step they are of."""
    return {f"weights_{n}": jnp.full((64, 64), 10.0 * step + n) for n in range(6)}


def run(directory: Path, kill_at: int | None) -> None:
    events = 0
    checkpoints = str(directory / "checkpoints")

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal events
        if event in _WATCHED and str(arguments[0]).startswith(checkpoints):
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    with TrainingCheckpoints(checkpoints, identity=IDENTITY, keep_last=2) as saver:
        for step in range(1, NUM_STEPS + 1):
            saver.save(step, state_of(step), {"row": 10 * step}, {"eval_loss": float(step)})
            if step % 2 == 0:  # the odd ones overlap with what comes after them
                saver.wait()
                (directory / "finished").write_text(str(step))
    (directory / "events").write_text(str(events))


def fork(directory: Path, kill_at: int | None) -> int:
    directory.mkdir()
    child = os.fork()  # before JAX has started a backend, or any thread
    if child == 0:
        status = 1
        try:
            run(directory, kill_at)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    directory, count = Path(sys.argv[1]), int(sys.argv[2])
    assert fork(directory / "whole", None) == 0
    events = int((directory / "whole" / "events").read_text())
    for number in range(count):
        status = fork(directory / str(number), 1 + number * (events - 1) // (count - 1))
        print(number, status)


if __name__ == "__main__":
    main()
