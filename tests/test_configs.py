"""Every configuration in the repository parses."""

from __future__ import annotations

from pathlib import Path

import pytest

from smoa_jax.cli import main, parse_run

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_parses(path):
    assert parse_run(["--config", str(path)]).train.output_dir


def test_an_unknown_key_is_one_line_and_exit_status_two(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("model: {path: x}\ntrain: {output_dir: y, stepz: 3}\n")
    assert main(["train", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert "stepz" in error
    assert len(error.strip().splitlines()) == 1
