"""A program for the tests: one of several processes that run a command of ``smoa`` together.

python commands_in_processes.py ADDRESS COUNT INDEX COMMAND [OPTION ...]
"""

from __future__ import annotations

import contextlib
import io
import sys

from smoa_jax.cli import main
from tests.processes import report


def run() -> None:
    address, count, index, *words = sys.argv[1:]
    together = [
        "--distributed.initialize=true",
        f"--distributed.coordinator_address={address}",
        f"--distributed.num_processes={count}",
        f"--distributed.process_id={index}",
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main([*words, *together])
    report({"status": status, "printed": printed.getvalue()})


if __name__ == "__main__":
    run()
