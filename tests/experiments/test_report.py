"""A report says what its ledger holds: rates chosen fairly, like compared with like."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from smoa_jax.cli import main
from smoa_jax.experiments.compare import (
    difference,
    experiments_of,
    groups_of,
    rate_scores,
    rate_texts,
)
from smoa_jax.experiments.report import as_html, as_markdown, blocks_of, write_report
from smoa_jax.training.config import ModelConfig, RunConfig, TrainConfig
from smoa_jax.training.directory import plain


def row(
    method: str,
    rate: float,
    seed: int,
    right: str,
    *,
    rank: int = 4,
    trained: int = 100,
    modulation: str = "weight",
    **metrics: Any,
) -> dict[str, Any]:
    """A row as a grid of two choosing seeds (0, 1) and others writes it."""
    run = RunConfig(
        model=ModelConfig(path="base.gguf", dtype="float32"),
        train=TrainConfig(output_dir="out", steps=9, seed=seed),
    )
    config: dict[str, Any] = plain(run) | {
        "probe": {"pairs": 10, "characters": 8},
        "scoring": {"text_rows": 2},
    }
    config["adapter"] |= {"rank": rank, "modulation": modulation}
    config["optimizer"]["learning_rate"] = rate
    score = right.count("1") / len(right)
    return {
        "run": f"{method}/{rate}/{seed}",
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "chose_rate": seed < 2,
        "trained_parameters": trained,
        "trained_share": trained / 1000,
        "seconds_per_step": 0.01 * (seed + 1),
        "while_compiling": seed == 0,
        "runs_at_once": 3,
        "step_memory_bytes": 2 * 10**9,
        "losses": [3.0, 2.0, 1.0],
        "task": {"train": 10, "test": 10},
        "text": "a manual",
        "environment": {
            "devices": {"abacus": 1},
            "versions": {"jax": "0.0"},
            "python": "3.x",
            "commit": "0123456789abcdef",
        },
        "metrics": {
            "score": score,
            "loss": 1 - score,
            "train_loss": 1.5,
            "text_loss": 2.0 + seed,
            "right": right,
        }
        | metrics,
        "config": config,
    }


def ledger() -> list[dict[str, Any]]:
    base = row("base", 0.0, 0, "0000000000", trained=0)
    del base["config"]["adapter"]
    return [
        base,
        row("hira", 1e-3, 0, "1000000000"),
        row("hira", 1e-2, 0, "1111100000"),
        row("hira", 1e-1, 0, "0000000000"),
        row("hira", 1e-2, 2, "1111000000"),
        row("hira", 1e-2, 5, "0111110000"),
        row("lora", 1e-3, 0, "1100000000", modulation="none"),
        row("lora", 1e-2, 0, "1000000000", modulation="none"),
        row("lora", 1e-3, 2, "1100000000", modulation="none"),
        row("smoa", 1e-2, 0, "1111111100", rank=8),
        row("wide", 1e-2, 0, "1111111110", rank=8, trained=200),
    ]


def results() -> dict[str, Any]:
    (experiment,) = experiments_of(ledger())
    return {method.name: method for method in experiment.methods}


def test_a_rate_is_chosen_by_the_seeds_that_tried_all_and_judged_by_others():
    found = results()
    assert (found["hira"].rate, found["hira"].inside) == (1e-2, True)
    assert [row["seed"] for row in found["hira"].judged] == [2, 5]
    assert found["hira"].values("score").tolist() == [0.4, 0.5]
    assert not found["hira"].judged_by_choosers
    assert (found["lora"].rate, found["lora"].inside) == (1e-3, False)
    assert found["smoa"].judged_by_choosers
    assert rate_scores(found["hira"]) == {1e-3: 0.1, 1e-2: 0.5, 1e-1: 0.0}
    assert rate_texts(found["hira"]) == {1e-3: 2.0, 1e-2: 2.0, 1e-1: 2.0}  # of seed 0 alone


def test_where_validation_rows_choose_every_seed_judges():
    rows = [
        row("hira", 1e-3, 0, "1111111111", validation_score=0.1, validation_loss=1.0),
        row("hira", 1e-2, 0, "1111000000", validation_score=0.6, validation_loss=1.0),
        row("hira", 1e-2, 3, "1100000000", validation_score=0.6, validation_loss=1.0),
    ]
    (method,) = experiments_of(rows)[0].methods
    assert method.rate == 1e-2
    assert method.values("score").tolist() == [0.4, 0.2]
    assert not method.judged_by_choosers


def test_equal_parameters_and_equal_rank_are_groups_apart():
    groups = [(g.equal, g.amount, [m.name for m in g.methods]) for g in _groups()]
    assert groups == [
        ("parameters", 100, ["hira", "lora", "smoa"]),
        ("rank", 8, ["smoa", "wide"]),
    ]


def _groups():
    return groups_of(list(results().values()))


def test_a_difference_is_paired_by_seed_and_question():
    found = results()
    gap = difference(found["hira"], found["lora"])
    assert gap is not None
    assert gap.seeds == 1  # seed 2 alone judged both
    assert gap.mean == pytest.approx(0.2)
    assert gap.low <= gap.mean <= gap.high
    back = difference(found["lora"], found["hira"])
    assert back is not None
    assert back.mean == pytest.approx(-0.2)
    assert difference(found["hira"], found["smoa"]) is None


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits, trials = 0, 60
    for trial in range(trials):
        rows = []
        for seed in (2, 3, 4, 5):
            for name, share in (("a", 0.6), ("b", 0.4)):
                right = "".join(str(int(one)) for one in rng.random(50) < share)
                rows.append(row(name, 1e-2, seed, right))
        one, other = experiments_of(rows)[0].methods
        gap = difference(one, other, seed=trial)
        assert gap is not None
        hits += gap.low <= 0.2 <= gap.high
    assert 0.85 * trials <= hits <= trials


def test_both_pages_hold_the_same_numbers(tmp_path):
    (experiment,) = experiments_of(ledger())
    blocks = list(blocks_of(experiment, "x"))
    markdown, page = as_markdown(blocks), as_html(blocks)
    cells = [
        "hira",
        "0.01",
        "45.0 ± 7.1 %",
        "0.550 ± 0.071",
        "+3.500 ± 2.121",
        "30.0 (3 runs)",
        "10.00%",
    ]
    for cell in cells:
        assert cell in markdown, cell
        assert cell in page, cell
    assert "At equal parameters: 100 trained parameters" in markdown
    assert "At equal rank: rank R = 8" in markdown
    assert "0.001!" in markdown
    assert "abacus" in page
    for text in (markdown, page):
        # smoa and wide have equal rank, and are nowhere in a table with the others.
        tables = [t for t in re.split(r"\n\n|</table>", text) if "wide" in t and "by rate" not in t]
        assert tables
        assert not any("hira" in table for table in tables)


def test_the_page_needs_nothing_beside_itself(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ledger()))
    markdown, page = write_report([path], tmp_path / "report")
    text = page.read_text()
    assert text.count("data:image/svg+xml;base64,") == 3
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    named = re.findall(r"\]\((\S+\.png)\)", markdown.read_text())
    assert len(named) == 3
    assert all((markdown.parent / name).stat().st_size > 1000 for name in named)


def test_a_ledger_without_a_run_is_refused(tmp_path, capsys):
    path = tmp_path / "ledger.jsonl"
    assert main(["report", str(path)]) == 2
    assert "no run; expected a ledger of smoa experiment" in capsys.readouterr().err
