"""Commands that several processes run together say what one process says, once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from smoa_jax.cli import main
from tests.processes import run_processes

PROGRAM = Path(__file__).with_name("commands_in_processes.py")
NUMBER = re.compile(r"\d+\.\d+")


def shown(text: str) -> list[float]:
    """The numbers of the table, to the digits that another order of summing leaves alone."""
    return [round(float(number), 3) for number in NUMBER.findall(text.split("rows", 1)[1])]


def test_two_processes_evaluate_and_generate_what_one_does(finished, one_device, capsys):
    mesh = ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"]
    commands = {
        "evaluate": ["evaluate", f"--config={finished.config}", f"--adapter_dir={finished.run}"],
        "generate": [
            *("generate", f"--model={finished.base}", f"--adapter={finished.run}"),
            *("--prompt=sky 7", "--prompt=leaf 3", "--prompt=sky 19", "--max_new_tokens=4"),
        ],
    }
    for command, words in commands.items():
        capsys.readouterr()
        assert main(words) == 0
        alone = capsys.readouterr().out
        first, second = run_processes(PROGRAM, [*words, *mesh])
        assert (first["status"], second["status"]) == (0, 0)
        assert second["printed"].strip() == ""
        if command == "generate":
            assert first["printed"] == alone
            assert "blue" in alone
            assert "green" in alone
        else:
            assert shown(first["printed"]) == pytest.approx(shown(alone), abs=2e-3)
            assert len(shown(alone)) == 4
