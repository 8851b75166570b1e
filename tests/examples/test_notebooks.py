"""Notebooks run top to bottom, and what was kept of their outputs is fit to be shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.processes import ROOT, xla_flags

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
BASE = ROOT / "tests" / "before" / "base"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_top_to_bottom(path, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra 'test')")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra 'test')")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra 'test')")
    monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    (settings,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    # A tiny base of random weights and few steps: what is tested here is that every cell works.
    settings.source = f"""
MODEL = "{BASE}"
STEPS = 2
MAX_LENGTH = 64
LEARNING_RATE = 1e-2
TARGETS = ["q_proj", "down_proj"]
"""
    directory = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=directory).execute()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_outputs_of_a_run_in_order_and_no_paths_of_a_machine(path):
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = json.dumps([output for cell in code for output in cell["outputs"]])
    assert '"image/png"' in outputs
    # Not in a picture, whose letters may be anything.
    words = re.sub(r'"image/png": "[^"]*"', "", outputs)
    assert not re.search(r"/(tmp|home|root|work|Users|usr)/|[A-Z]:\\\\|\"error\"", words)
