"""Pages of help: short ones for who begins, whole ones on request, in the words of users."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

from smoa_jax.cli import main
from smoa_jax.commands.help import COMMANDS, HEADINGS
from smoa_jax.experiments.config import ExperimentConfig
from smoa_jax.training.config import DEFAULT_LEARNING_RATES, RunConfig
from tests.cli.tiny import refusal

PAGES = [
    ["--help"],
    *([command, "--help", *all_of_it] for command in COMMANDS for all_of_it in ([], ["all"])),
]


def page(capsys, *words):
    capsys.readouterr()
    assert main(list(words)) == 0
    return capsys.readouterr().out


def fields(config: type, section: str = "") -> Iterator[str]:
    """Every field of a configuration as an option names it."""
    kinds = get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(kinds[field.name]):
            yield from fields(kinds[field.name], f"{section}{field.name}.")
        else:
            yield f"{section}{field.name}"


def options(text):
    """The options that have an entry of their own."""
    return re.findall(r"^  --([\w.]+)", text, re.MULTILINE)


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_a_page_fits_a_terminal_and_names_nothing_internal(capsys, words):
    text = page(capsys, *words)
    assert max(len(line) for line in text.splitlines()) <= 80
    for internal in ("smoa_jax.", "class '", "Literal[", "Optional[", "CONFIG", "SUPPRESS", "``"):
        assert internal not in text
    assert not re.search(r"\w\.py\b|\b[A-Z]+_[A-Z]+S\b", text)
    assert "None]" not in text


FIRST = {
    "train": [
        *("config", "resume", "overwrite", "preview", "model.path", "data.train_files"),
        *("data.eval_files", "train.output_dir", "adapter.rank", "optimizer.learning_rate"),
    ],
    "evaluate": ["config", "adapter", "checkpoint", "json", "data.eval_files", "evaluation.rows"],
    "generate": ["model", "prompt", "prompt_file", "chat", "adapter", "template", "temperature"],
    "export": ["model", "adapter", "output", "format", "dtype", "base_name", "overwrite"],
    "import": ["model", "peft", "output", "overwrite"],
    "inspect": [
        *("model", "adapter", "compare", "target_modules", "layers", "rank", "plot"),
        *("details", "json"),
    ],
    "experiment": ["config", "model.path", "grid.learning_rates", "grid.seeds", "probe.pairs"],
    "plan": ["config", "topology", "search", "remat", "json", "model.path", "train.batch_size"],
    "report": ["output"],
    "upload": ["directory", "name", "public", "message"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_first_page_of_a_command_is_short_and_says_how_it_is_typed(capsys, command):
    text = page(capsys, command, "--help")
    assert text.startswith(f"usage: smoa {command} ")
    assert set(FIRST[command]) <= set(options(text))
    assert len(text.splitlines()) <= 40
    assert page(capsys, command, "-h") == text


def test_the_whole_page_can_be_asked_for_in_two_ways_and_the_first_says_how(capsys):
    assert page(capsys, "train", "--help").splitlines()[-1].endswith("smoa train --help all")
    assert page(capsys, "train", "--help_all") == page(capsys, "train", "--help", "all")


def test_all_of_train_is_every_field_of_a_run_under_the_heading_of_its_section(capsys):
    text = page(capsys, "train", "--help", "all")
    known = set(fields(RunConfig))
    assert len(known) > 70
    own = {"config", "print_config", "resume", "overwrite", "preview"}
    assert sorted(options(text)) == sorted(known | own)
    heading = ""
    for line in text.splitlines():
        if line and not line.startswith((" ", "usage")):
            heading = line.partition(":")[0]
        for name in options(line):
            assert heading == (name.rpartition(".")[0] or "options")
    known |= set(fields(ExperimentConfig))
    assert set(HEADINGS) - {""} == {name.rpartition(".")[0] for name in known}


def test_all_of_evaluate_leaves_out_what_has_no_effect_there(capsys):
    shown = set(options(page(capsys, "evaluate", "--help", "all")))
    assert {"adapter", "json", "data.eval_files", "train.batch_size", "mesh.fsdp"} <= shown
    assert not {"adapter.rank", "optimizer.learning_rate", "train.steps", "adapter_dir"} & shown


def test_the_learning_rates_that_help_tells_are_those_of_the_methods(capsys):
    text = " ".join(page(capsys, "train", "--help").split())
    assert "1e-2 where factors multiply the weight, else 1e-3" in text
    assert DEFAULT_LEARNING_RATES == {"weight": 1e-2, "none": 1e-3}


def test_the_page_of_smoa_names_commands_examples_statuses_and_where_more_is_said(capsys):
    text = page(capsys, "--help")
    for command in COMMANDS:
        assert f"  smoa {command}" in text
    for words in (
        "examples:",
        "exit status: 0",
        "75",
        "130",
        "documentation: README.md",
        "--help all",
    ):
        assert words in text
    assert len(text.splitlines()) <= 25


def test_a_mistyped_command_or_option_is_told_what_it_may_have_meant(capsys):
    assert "did you mean export?" in refusal(capsys, ["exprot"])
    line = refusal(capsys, ["train", "--train.stepz", "3"])
    assert "did you mean --train.steps?" in line
    assert line.endswith("see smoa train --help all")


@pytest.mark.parametrize("words", [["--help"], [], ["exprot"]], ids=["help", "nothing", "typo"])
def test_help_and_a_typo_need_neither_jax_nor_the_parser(words):
    program = (
        "import sys\n"
        "from smoa_jax.cli import main\n"
        f"main({words!r})\n"
        "print(sorted({'jax', 'numpy', 'jsonargparse', 'rich'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
