"""A program for the tests: one of several processes of a whole run, as its configuration says.

    python train_in_processes.py ADDRESS COUNT INDEX BASE OUTPUT SIZE MODE

SIZE is a key of ``CHANGES``, MODE whole, interrupted, resumed, killed or hung. Interrupted, the
last process gets SIGTERM while the others know of nothing; killed, it dies; hung, it sleeps. Which
rows a process has taken at which step goes into ``OUTPUT.rows-INDEX``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from smoa_jax.training import run as training_run
from smoa_jax.training.loop import Taken
from smoa_jax.training.run import run
from tests.processes import report
from tests.training.tiny_run import run_config

#: What a single process must come to as well. In the full run every axis is divided, ``data`` spans
#: the processes and questions are answered; the small one is for speed.
CHANGES = {
    "small": {"train_steps": 3, "adapter_target_modules": ["q_proj", "up_proj"]},
    "saving": {
        "train_steps": 6,
        "train_save_every": 2,
        "adapter_target_modules": ["q_proj", "up_proj"],
    },
    "full": {
        "train_steps": 6,
        "train_save_every": 5,
        "mesh_data": 2,
        "mesh_fsdp": 2,
        "mesh_tensor": 2,
        "evaluation_rows": 3,
        "evaluation_max_new_tokens": 2,
    },
}


#: Whoever is killed or hangs takes so many steps first.
LAST_STEP = 4


def log_rows(path: Path) -> None:
    """From here on every row that a run of this process takes is noted, with its step."""
    original = training_run.train

    def train(take_step, state, stream, *, start, **options):
        def noted():
            for number, (batch, position) in enumerate(stream, start + 1):
                rows = [hashlib.sha256(row.tobytes()).hexdigest()[:12] for row in batch["tokens"]]
                with path.open("a") as file:
                    file.write(json.dumps([number, rows]) + "\n")
                yield batch, position

        return original(take_step, state, noted(), start=start, **options)

    training_run.train = train


def main() -> None:
    address, count, index, base, output, size, mode = sys.argv[1:]
    changes = {**CHANGES[size], **json.loads(os.environ.get("RUN_CHANGES", "{}"))}
    config = run_config(
        base,
        output,
        distributed_initialize=True,
        distributed_coordinator_address=address,
        distributed_num_processes=int(count),
        distributed_process_id=int(index),
        distributed_heartbeat_timeout=10,
        distributed_step_timeout=20.0 if mode == "hung" else 300.0,
        **changes,
    )
    log_rows(Path(f"{output}.rows-{index}"))
    last = int(index) == int(count) - 1

    def on_step(taken: Taken) -> bool:
        if mode == "interrupted" and index != "0" and taken.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if mode == "killed" and last and taken.step == LAST_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "hung" and last and taken.step == 2:
            time.sleep(200)
        return True

    summary = run(config, resume=mode == "resumed", on_step=on_step)
    report(dataclasses.asdict(summary))


if __name__ == "__main__":
    main()
