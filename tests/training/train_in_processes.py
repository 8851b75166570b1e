"""A program for the tests: one of several processes of a whole run, as its configuration says.

    python train_in_processes.py ADDRESS COUNT INDEX BASE OUTPUT SIZE MODE

SIZE is small or full, MODE whole, interrupted or resumed. Interrupted, the last process gets
SIGTERM while the others know of nothing.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys

from smoa_jax.training.loop import Taken
from smoa_jax.training.run import run
from tests.processes import report
from tests.training.tiny_run import run_config

#: What a single process must come to as well. In the full run every axis is divided, ``data`` spans
#: the processes and questions are answered; the small one is for speed.
CHANGES = {
    "small": {"train_steps": 3, "adapter_target_modules": ["q_proj", "up_proj"]},
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


def main() -> None:
    address, count, index, base, output, size, mode = sys.argv[1:]
    config = run_config(
        base,
        output,
        distributed_initialize=True,
        distributed_coordinator_address=address,
        distributed_num_processes=int(count),
        distributed_process_id=int(index),
        **CHANGES[size],
    )

    def on_step(taken: Taken) -> bool:
        if mode == "interrupted" and index != "0" and taken.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return True

    summary = run(config, resume=mode == "resumed", on_step=on_step)
    report(dataclasses.asdict(summary))


if __name__ == "__main__":
    main()
