"""Several processes that form one JAX cluster on this machine, for tests of what spans hosts.

A test starts a program of its own with ``run_processes``; the program calls ``join`` first and
``report`` last::

    (left, right) = run_processes(PROGRAM, [directory], devices=4)

Collectives go over loopback, every process has forced host devices of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_MARK = "outcome: "


def xla_flags(devices: int) -> str:
    """So many forced devices, and quick compilation, which takes most of the suite's time.

    The same everywhere: what is compiled otherwise may round otherwise.
    """
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"


def compilation_cache() -> str:
    """Where compiled programs are kept from one run of the tests to the next."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return str(home / "smoa_jax" / "xla-tests")


def run_processes(
    program: Path, arguments: Sequence[object] = (), *, count: int = 2, devices: int = 4
) -> list[Any]:
    """What each of ``count`` processes of ``program`` reports; fails with the output of all."""
    finished = start_processes(program, arguments, count=count, devices=devices)
    shown = "\n".join(f"-- process {n}: {out}{err}" for n, (_, out, err) in enumerate(finished))
    assert all(status == 0 for status, _, _ in finished), shown
    lines = [[x for x in out.splitlines() if x.startswith(_MARK)] for _, out, _ in finished]
    assert all(len(found) == 1 for found in lines), shown
    return [json.loads(found[0].removeprefix(_MARK)) for found in lines]


def start_processes(
    program: Path, arguments: Sequence[object] = (), *, count: int = 2, devices: int = 4
) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each of ``count`` processes of ``program``."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        "PYTHONPATH": str(ROOT),
    }
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(index) for index in range(2 * count)]
        children = []
        for index in range(count):
            words = [sys.executable, str(program), address, str(count), str(index)]
            with files[2 * index].open("w") as out, files[2 * index + 1].open("w") as err:
                children.append(
                    subprocess.Popen(
                        [*words, *map(str, arguments)],
                        stdout=out,
                        stderr=err,
                        cwd=ROOT,
                        env=environment,
                    )
                )
        try:
            for child in children:
                child.wait(timeout=300)
        finally:
            for child in children:
                child.kill()
        texts = [file.read_text() for file in files]
    return [(c.returncode, *texts[2 * n : 2 * n + 2]) for n, c in enumerate(children)]


def join() -> list[str]:
    """Make this process part of the cluster; returns the program's own arguments."""
    import jax

    address, count, index, *arguments = sys.argv[1:]
    jax.distributed.initialize(address, int(count), int(index))
    return arguments


def report(outcome: Any) -> None:
    """Hand ``outcome`` to the test."""
    print(_MARK + json.dumps(outcome), flush=True)
