"""A run's configuration is read and refused before any framework is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_reading_a_configuration_loads_no_framework():
    program = (
        "import sys, smoa_jax.training.config\n"
        "heavy = {'flax', 'transformers', 'torch', 'orbax', 'optax', 'grain', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
