"""A place where a user works: rows, a YAML file, a base model, and a run to come.

The rows ask for the colour of two things, so that a tiny base which nobody trained learns within
seconds to answer as it should, and what the commands print can be told right from wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from smoa_jax.cli import main

YAML = """\
# A run as a user writes it.
model:
  path: {base}
train:
  output_dir: {run}
  steps: 120
  batch_size: 8
  loss_chunk: 10
  save_every: 60
adapter:
  rank: 8
  num_subspaces: 2
  target_modules: [q_proj, down_proj]
data:
  source: files
  train_files: [{rows}]
  eval_rows: 8
  template: plain
  max_length: 20
optimizer:
  learning_rate: 0.1
  warmup_steps: 5
evaluation:
  rows: 8
  max_new_tokens: 6
"""
COLOURS = {"sky": "blue", "leaf": "green"}


@dataclasses.dataclass
class Place:
    """Paths of one test's working directory; ``printed`` is what its run wrote."""

    base: Path
    config: Path
    rows: Path
    run: Path
    printed: str = ""

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"


def write_place(directory: Path, base: Path) -> Place:
    """Rows and configuration in ``directory``."""
    rows, run = directory / "rows.jsonl", directory / "run"
    write_rows(rows, [(f"{thing} {n}", COLOURS[thing]) for n in range(20) for thing in COLOURS])
    config = directory / "run.yaml"
    config.write_text(YAML.format(base=base, run=run, rows=rows))
    return Place(base=base, config=config, rows=rows, run=run)


def write_rows(path: Path, pairs: Sequence[tuple[str, str]]) -> Path:
    """Instructions and outputs as JSON Lines."""
    lines = [json.dumps({"instruction": question, "output": answer}) for question, answer in pairs]
    path.write_text("\n".join(lines) + "\n")
    return path


def contents(directory: Path) -> dict[str, str]:
    """Every file below a directory (or the file itself) and a digest of it."""
    files = [directory, *directory.rglob("*")]
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()
    }


def refusal(capsys: pytest.CaptureFixture[str], arguments: Sequence[object]) -> str:
    """The one line that ``smoa`` writes on bad input, having left with status 2."""
    capsys.readouterr()
    status = main([str(word) for word in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert status == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("smoa: error: ")
    assert "Traceback" not in lines[0]
    return lines[0]


def check_refused(
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[object],
    words: Sequence[str],
    untouched: Sequence[Path],
) -> None:
    """The refusal holds ``words``, and the files at ``untouched`` are as they were."""
    before = [contents(path) for path in untouched]
    line = refusal(capsys, arguments)
    for word in words:
        assert word in line, line
    assert [contents(path) for path in untouched] == before
