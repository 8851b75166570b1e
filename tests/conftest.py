"""Every test runs on eight forced host devices, with rank promotion an error.

The environment is set before JAX is imported: afterwards it would silently have no effect.
"""

import os
import sys

if "jax" in sys.modules:
    raise RuntimeError("JAX was imported before tests/conftest.py could set its device count")
os.environ["JAX_PLATFORMS"] = os.environ.get("SMOA_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["SMOA_JAX_CACHE"] = "off"  # what a test plans is its own

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
