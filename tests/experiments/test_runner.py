"""Grids: one program for what differs in rate or seed alone, and no run done twice."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from smoa_jax.adapter.tree import count_trainable, partition
from smoa_jax.data.tokenizer import load_tokenizer
from smoa_jax.experiments import programs, runner
from smoa_jax.experiments.config import MethodConfig
from smoa_jax.experiments.ledger import read_ledger
from smoa_jax.experiments.runner import ranked_rates, run_experiment
from smoa_jax.experiments.tasks import build_task
from smoa_jax.training.loop import compilations
from smoa_jax.training.model import load_model
from smoa_jax.training.optimizer import make_optimizer
from smoa_jax.training.state import adapt
from smoa_jax.training.step import initial_state, make_train_step
from tests.experiments.tiny_grid import grid_config
from tests.training.tiny_run import write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("experiment") / "base")


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    """A finished experiment: its configuration, its rows, and what was traced and compiled."""
    config = grid_config(base, tmp_path_factory.mktemp("experiment") / "out")
    traced, compiled = [], []
    make, group = programs.make_train_step, runner._Experiment._run_group

    def counting(*arguments, **settings):
        traced.append(settings)
        return make(*arguments, **settings)

    def watching(self, name, prepared, runs):
        before = compilations()
        yield from group(self, name, prepared, runs)
        compiled.append((name, [(run.rate, run.seed) for run in runs], compilations() - before))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "make_train_step", counting)
        patch.setattr(runner._Experiment, "_run_group", watching)
        ledger = run_experiment(config, lambda text: None)
    return config, read_ledger(ledger), traced, compiled


def test_rates_seeds_and_block_ids_share_one_program(done):
    _, _, traced, compiled = done
    assert len(traced) == 1
    assert compiled[0][1] == [(1e-2, 0), (1e-1, 0)]
    # Other rates, other seeds and the other method's blocks compile nothing more.
    assert len(compiled) == 4
    assert [count for *_, count in compiled[1:]] == [0, 0, 0], compiled


def test_the_ledger_has_a_row_for_the_base_and_each_run(done):
    config, rows, *_ = done
    runs = [(row["method"], row["learning_rate"], row["seed"]) for row in rows]
    best = {
        name: ranked_rates([row for row in rows if row["method"] == name], (0,))[0]
        for name in config.grid.methods
    }
    assert runs == [
        ("base", 0.0, 0),
        *((name, rate, 0) for name in ("spectral", "random") for rate in (1e-2, 1e-1)),
        *((name, best[name], seed) for name in ("spectral", "random") for seed in (3, 5)),
    ]
    assert [row["chose_rate"] for row in rows] == [True] * 5 + [False] * 4


def test_a_row_says_what_was_run_and_what_came_of_it(done, base):
    config, rows, *_ = done
    row = rows[1]
    loaded = load_model(config.run_of("spectral", 1e-2, 0))
    adapter = config.grid.methods["spectral"].adapter
    assert row["trained_parameters"] == count_trainable(loaded.base.params, adapter)
    assert row["config"]["optimizer"]["learning_rate"] == 1e-2
    assert row["config"]["adapter"]["rank"] == 5
    assert row["config"]["probe"] == {"pairs": 11, "characters": 3}
    assert row["seconds"] > 0
    assert row["step_memory_bytes"] > sum(x.nbytes for x in jax.tree.leaves(loaded.base.params))
    assert len(row["losses"]) == config.train.steps
    assert len(row["metrics"]["right"]) == 11
    assert row["metrics"]["text_loss"] != rows[0]["metrics"]["text_loss"]
    assert row["environment"]["devices"]


def losses_of_a_run_by_itself(config, method, rate, seed):
    """The same run through the project's own step, one run, its rate in the optimizer."""
    run = config.run_of(method, rate, seed)
    loaded = load_model(run)
    task = build_task(config, seed, load_tokenizer(loaded.base.source))
    trainable, frozen = partition(adapt(run, loaded))
    optimizer = make_optimizer(run, config.train.steps)
    step = jax.jit(make_train_step(loaded.model, optimizer, seed=seed, chunk=run.train.loss_chunk))
    state, losses = initial_state(trainable, optimizer), []
    for index in range(config.train.steps):
        batch = {name: value[index] for name, value in task.batches.items()}
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize(("method", "place"), [("spectral", 2), ("random", 8)])
def test_a_run_beside_others_is_the_run_that_it_is_alone(done, method, place):
    config, rows, *_ = done
    row = rows[place]  # beside another rate, and beside another seed
    alone = losses_of_a_run_by_itself(config, method, row["learning_rate"], row["seed"])
    np.testing.assert_allclose(row["losses"], alone, atol=2e-4)
    other = rows[place - 1]["losses"]
    assert np.abs(np.asarray(other) - alone).max() > 2e-3


def test_a_killed_experiment_does_what_is_missing_and_nothing_twice(done, base, tmp_path):
    _, rows, *_ = done
    ledger = tmp_path / "out" / "ledger.jsonl"
    ledger.parent.mkdir()
    lines = [json.dumps(row) + "\n" for row in rows]
    # Killed while it wrote the second run of "random"; "spectral" 0.1 was never begun.
    ledger.write_text("".join([*lines[:2], lines[3]]) + lines[4][:40])
    again = grid_config(base, tmp_path / "out")
    trained = []
    group = runner._Experiment._run_group

    def watching(self, name, prepared, runs):
        trained.extend((name, run.rate, run.seed) for run in runs)
        yield from group(self, name, prepared, runs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner._Experiment, "_run_group", watching)
        run_experiment(again, lambda text: None)
        assert trained[:2] == [("spectral", 1e-1, 0), ("random", 1e-1, 0)]
        assert len(trained) == 6  # and the four refined ones
        found = read_ledger(ledger)
        assert {row["run"] for row in found} == {row["run"] for row in rows}
        for row in found:
            same = next(one for one in rows if one["run"] == row["run"])
            assert row["metrics"]["loss"] == pytest.approx(same["metrics"]["loss"], abs=1e-4)
        trained.clear()
        run_experiment(again, lambda text: None)
    assert trained == []
    assert read_ledger(ledger) == found


def test_full_fine_tuning_trains_every_weight(base, tmp_path):
    config = grid_config(
        base,
        tmp_path,
        methods={"full": MethodConfig(full=True)},
        learning_rates=(3e-3,),
        refine_rates=0,
        runs_at_once=1,
    )
    before, row = read_ledger(run_experiment(config, lambda text: None))
    assert row["trained_share"] == 1
    assert row["config"]["adapter"] == "full"
    assert row["losses"][-1] < row["losses"][0]
    assert row["metrics"]["loss"] < before["metrics"]["loss"]


def test_a_rate_is_chosen_by_score_then_loss_of_validation_rows():
    def row(rate, seed, score, loss, test_score=0.0):
        metrics = {"score": test_score, "loss": 9.0}
        return {
            "learning_rate": rate,
            "seed": seed,
            "metrics": metrics | {"validation_score": score, "validation_loss": loss},
        }

    rows = [
        row(1e-3, 0, 0.5, 2.0, test_score=1.0),
        row(1e-3, 1, 0.5, 2.0),
        row(1e-2, 0, 0.4, 0.1),
        row(1e-2, 1, 0.6, 0.1),
        row(1e-1, 0, 0.9, None),
        row(1e-1, 1, 0.0, None),
    ]
    assert ranked_rates(rows, (0, 1)) == [1e-2, 1e-3, 1e-1]
    assert ranked_rates(rows, (0,)) == [1e-1, 1e-3, 1e-2]
