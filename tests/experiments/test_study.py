"""What docs/study.md says is what the ledger beside it holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from smoa_jax.experiments.compare import difference, experiments_of
from smoa_jax.experiments.ledger import read_ledger
from smoa_jax.experiments.report import kind_of

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def experiment():
    (found,) = experiments_of(read_ledger(DOCS / "study" / "probe.jsonl"))
    return found


@pytest.fixture(scope="module")
def text():
    return " ".join((DOCS / "study.md").read_text().split())


def test_every_row_of_the_table_is_the_ledgers(experiment, text):
    before = experiment.base["metrics"]["text_loss"]
    assert f"{before:.2f} before" in text
    ranked = sorted(experiment.methods, key=lambda method: -method.values("score").mean())
    lines = []
    for method in ranked:
        row = method.judged[0]
        adapter, metrics = row["config"]["adapter"], row["metrics"]
        cells = [
            kind_of(row),
            str(adapter["rank"]),
            str(adapter["num_subspaces"]),
            f"{method.rate:g}",
            f"{metrics['score']:.1%}".replace("%", " %"),
            f"{metrics['loss']:.3f}",
            f"{metrics['text_loss'] - before:+.3f}",
            f"{1e3 * method.step_seconds()[0]:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        assert (row["seed"], len(method.judged), method.inside) == (0, 1, True)
        assert (row["trained_parameters"], row["runs_at_once"]) == (829_440, 6)
    assert " ".join(lines) in text


def test_what_is_said_of_the_rate_0_03_is_the_ledgers(experiment, text):
    names = ("hira-4", "smoa-2-8", "aligned-4-16", "smoa-4-16", "contiguous-4-16")
    before = experiment.base["metrics"]["text_loss"]
    rows = [
        next(row for row in method.rows if row["learning_rate"] == 0.03)["metrics"]
        for name in names
        for method in experiment.methods
        if method.name == name
    ]
    recalled = " | ".join(f"{100 * row['score']:.1f} %" for row in rows)
    assert f"| recalled | {recalled} |" in text
    changes = " | ".join(f"{row['text_loss'] - before:+.2f}" for row in rows)
    assert f"| text | {changes} |" in text


def test_the_differences_are_the_ledgers(experiment, text):
    methods = {method.name: method for method in experiment.methods}
    for one, other, words in (
        ("contiguous-4-16", "lora-4", r"contiguous blocks by (\S+), (\S+) to (\d+\.\d)"),
        ("hira-4", "lora-4", r"HiRA by (\S+), (\S+) to (\d+\.\d)"),
        ("hira-4", "smoa-4-16", r"HiRA recalls (\S+) points more [^(]*\((\S+) to (\d+\.\d)"),
        ("hira-4", "smoa-2-8", r"and (\S+) more than with M = 2 \((\S+) to (\d+\.\d)"),
        ("lora-4", "melora-4-16", r"loses to LoRA\*\* by (\S+) points \((\S+) to (\d+\.\d)"),
        ("hira-4", "aligned-4-16", r"\((0\.8) points less; (\S+) less to (\d\.\d) more"),
    ):
        said = [float(number.strip(",")) for number in re.findall(words, text)[0]]
        gap = difference(methods[one], methods[other])
        assert gap is not None
        ends = [100 * gap.low, 100 * gap.high]
        if one == "hira-4" and other == "aligned-4-16":  # told from the other side
            ends = [ends[1], -ends[0]]
        assert said == pytest.approx([100 * gap.mean, *ends], abs=0.41)
