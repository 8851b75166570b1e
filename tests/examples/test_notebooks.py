"""Notebooks run top to bottom, and what was kept of their outputs is fit to be shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, xla_flags

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
BASE = ROOT / "tests" / "before" / "base"


def cells_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


#: In place of the cell tagged so: a tiny base of random weights and few steps, since what is tested
#: is that every cell works.
PARAMETERS = f"""
MODEL = "{BASE}"
STEPS = 2
MAX_LENGTH = 64
LEARNING_RATE = 1e-2
TARGETS = ["q_proj", "down_proj"]
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_top_to_bottom(path, tmp_path):
    cells = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    (settings,) = (c for c in cells if "parameters" in c["metadata"].get("tags", ()))
    settings["source"] = [PARAMETERS]
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells), encoding="utf-8")
    environment = {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_outputs_of_a_run_in_order_and_no_paths_of_a_machine(path):
    code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = json.dumps([output for cell in code for output in cell["outputs"]])
    assert '"image/png"' in outputs
    # Not in a picture, whose letters may be anything.
    words = re.sub(r'"image/png": "[^"]*"', "", outputs)
    assert not re.search(r"/(tmp|home|root|work|Users|usr)/|[A-Z]:\\\\|\"error\"", words)
