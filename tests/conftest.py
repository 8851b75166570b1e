"""Every test runs on eight forced host devices, with rank promotion an error.

The environment is set before JAX is imported: afterwards it would silently have no effect.
"""

import gc
import os
import sys
from pathlib import Path

from tests.processes import compilation_cache, xla_flags

if "jax" in sys.modules:
    raise RuntimeError("JAX was imported before tests/conftest.py could set its device count")
os.environ["JAX_PLATFORMS"] = os.environ.get("SMOA_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}".strip()
# What one process has compiled, no other compiles again: workers, processes of tests, later runs,
# and those of other clones on this machine.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compilation_cache())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["SMOA_JAX_CACHE"] = "off"  # what a test plans is its own

import jax
import jaxtyping
import pytest

import tests.shapes  # noqa: F401 (the hook looks the checker up by name)

jax.config.update("jax_numpy_rank_promotion", "raise")
# Before the package is imported: what its annotations say of shapes holds in every test.
jaxtyping.install_import_hook(["smoa_jax.adapter", "smoa_jax.models"], "tests.shapes.check_shapes")

#: Of memory, above which a worker forgets what it has compiled; two had grown to 7 GiB each.
LARGEST_WORKER = 3 * 2**30


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Let go of compiled programs between modules; the cache on disk has them still."""
    yield
    statm = Path("/proc/self/statm")
    if statm.exists():
        resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if resident > LARGEST_WORKER:
            jax.clear_caches()
            gc.collect()
