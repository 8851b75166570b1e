"""What the package says of itself, in one place each."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import smoa_jax
from smoa_jax.cli import main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_projects_own(capsys):
    assert smoa_jax.__version__ == PROJECT["version"]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"smoa {PROJECT['version']}\n"


def test_nothing_says_that_an_index_has_the_package():
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*")]
    for path in [*files, *ROOT.glob("smoa_jax/**/*.py")]:
        if path.is_file():
            assert not re.search(r"pip install '?smoa.jax", path.read_text()), path


def test_the_citation_names_both_papers_and_no_version_of_its_own():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == PROJECT["license"]
    assert "version" not in citation
    text = str(citation["references"])
    assert "2605.21147" in text
    assert "2601.07507" in text


def test_every_public_name_is_there_and_typed_as_it_is_imported():
    for name in smoa_jax.__all__:
        assert getattr(smoa_jax, name).__name__ == name
    assert set(smoa_jax.__all__) == set(smoa_jax._HOMES) <= set(dir(smoa_jax))
    # What type checkers read says the same as what is imported.
    tree = ast.parse((ROOT / "smoa_jax" / "__init__.py").read_text())
    said = {
        alias.name: node.module.removeprefix("smoa_jax.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smoa_jax.")
        for alias in node.names
    }
    assert said == smoa_jax._HOMES
    with pytest.raises(AttributeError, match="no attribute 'apply_lora'"):
        smoa_jax.apply_lora  # noqa: B018


WITHOUT_EXTRAS = """
import importlib.abc, sys

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"flax", "safetensors", "transformers", "jsonargparse"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

sys.meta_path.insert(0, Without())
import smoa_jax
from smoa_jax.cli import main
assert smoa_jax.SmoaConfig(rank=4).rank == 4
try:
    smoa_jax.load_base
except ModuleNotFoundError as error:
    print(error)
sys.exit(main(["train", "--help"]))
"""


def test_without_the_extra_the_method_is_there_and_the_rest_names_it():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    for text, what in ((done.stdout, "smoa_jax.load_base"), (done.stderr, "the command line")):
        assert what in text
        assert "pip install '.[train]' in the repository of smoa_jax" in text
    assert "Traceback" not in done.stderr
