"""What loading costs the host beside the arrays that come of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import pytest

from tests.checkpoint.hf_files import CONFIG, llama_tensors, write_directory
from tests.processes import run_processes

ROOT = Path(__file__).parents[2]
#: Kernels of 6 MiB a layer in float32 and little else, so that stacks are large beside the noise.
WIDE = {
    **CONFIG,
    "vocab_size": 256,
    "hidden_size": 1024,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


def anonymous_bytes(pid: int) -> int:
    """``RssAnon`` of a process: memory that no file backs."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert match is not None
    return int(match.group(1)) * 1024


def peak_of(program: str, arguments: Sequence[object]) -> tuple[int, str]:
    """Bytes of a program's peak over what was there when it was ``ready``, and what it says then.

    The program prints ``ready``, waits for a line, works, prints a line and waits again.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": "",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / program), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        start = peak = anonymous_bytes(child.pid)
        finished = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not finished.is_set():
                peak = max(peak, anonymous_bytes(child.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        print("go", file=child.stdin, flush=True)
        outcome = child.stdout.readline()
        finished.set()
        watcher.join()
        print("stop", file=child.stdin, flush=True)
    return peak - start, outcome


def peak_of_loading(directory: Path, dtype: str, layout: str) -> dict[str, int]:
    """Bytes: the peak over what was there before, the arrays, the largest shard of a stack."""
    peak, outcome = peak_of("load_memory.py", [directory, dtype, layout])
    return {"peak": peak, **json.loads(outcome)}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The same model at two depths, in bf16 over several files."""
    made = {}
    for depth in (4, 12):
        config = {**WIDE, "num_hidden_layers": depth}
        tensors = {
            name: weight.astype(ml_dtypes.bfloat16)
            for name, weight in llama_tensors(config).items()
        }
        made[depth] = write_directory(tmp_path_factory.mktemp("deep"), config, tensors, 5)
    return made


@pytest.mark.parametrize("depth", [4, 12])
@pytest.mark.parametrize("layout", ["fsdp", "single"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_holds_no_more_than_one_shard_and_a_half(directories, dtype, layout, depth):
    used = peak_of_loading(directories[depth], dtype, layout)
    size = {"bfloat16": 2, "float32": 4}[dtype]
    largest = depth * WIDE["hidden_size"] * WIDE["intermediate_size"] * size
    assert used["largest_shard"] == largest // (8 if layout == "fsdp" else 1)
    assert used["peak"] > 0.95 * used["arrays"], "the watcher saw the arrays come into being"
    assert used["peak"] - used["arrays"] <= 1.5 * used["largest_shard"]


def test_each_process_reads_only_what_its_devices_hold(tmp_path):
    tensors = llama_tensors(CONFIG)
    directory = write_directory(tmp_path / "m", CONFIG, tensors, 3)
    outcomes = run_processes(Path(__file__).with_name("load_in_processes.py"), [directory])
    assert [outcome["devices"] for outcome in outcomes] == [8, 8]
    assert outcomes[0]["fingerprint"] == outcomes[1]["fingerprint"]
    for outcome in outcomes:  # halves of what is divided, and all of what every device holds
        shares = {name: size / tensors[name].nbytes for name, size in outcome["read"].items()}
        assert shares == {name: 1.0 if "norm" in name else 0.5 for name in tensors}
