"""A whole run on a tiny Llama: it learns, writes what it says, and resumes bit for bit."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from smoa_jax.adapter.tree import strip_smoa
from smoa_jax.checkpoint.base import load_base
from smoa_jax.training import run as training_run
from smoa_jax.training.config import OptimizerConfig
from smoa_jax.training.run import RunError, run
from tests.training.tiny_run import read_metrics, run_config, write_base


@pytest.fixture
def runners(monkeypatch):
    """The runners of the runs in a test, for a look at their final state."""
    made = []
    original = training_run._Runner.__init__

    def keep(self, *arguments):
        original(self, *arguments)
        made.append(self)

    monkeypatch.setattr(training_run._Runner, "__init__", keep)
    return made


def leaves(runner):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(runner._state)]


def test_a_run_learns_and_freezes_and_compiles_once(base_dir, tmp_path, runners):
    config = run_config(base_dir, tmp_path / "run", train_steps=12, train_eval_every=6)
    summary = run(config)
    assert summary.finished
    assert summary.loss_after < summary.loss_before - 0.5
    losses = [record["loss"] for record in read_metrics(tmp_path / "run", "train")]
    assert len(losses) == 12
    for name in ("config.yaml", "checkpoints", "adapter/adapter.json", "summary.json"):
        assert (tmp_path / "run" / name).exists()
    assert runners[0]._training.train_step._cache_size() == 1
    base = load_base(base_dir).params
    trained = strip_smoa(runners[0]._params())
    jax.tree.map(np.testing.assert_array_equal, trained, base)
    with pytest.raises(RunError, match="not empty"):
        run(config)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(base_dir, tmp_path, runners):
    changes = {"train_steps": 6, "train_accumulate": 1, "adapter_dropout": 0.2}
    run(run_config(base_dir, tmp_path / "whole", **changes))
    broken = run_config(base_dir, tmp_path / "broken", train_save_every=2, **changes)

    step = training_run._Runner._save

    def stop_after_saving(self, *arguments):
        step(self, *arguments)
        self._stopping.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run._Runner, "_save", stop_after_saving)
        assert not run(broken).finished
    assert run(broken, resume=True).finished
    whole, _, resumed = runners
    for left, right in zip(leaves(whole), leaves(resumed), strict=True):
        np.testing.assert_array_equal(left, right)
    assert resumed._training.train_step._cache_size() == 1
    other = dataclasses.replace(broken, adapter=dataclasses.replace(broken.adapter, rank=6))
    with pytest.raises(ValueError, match="rank"):
        run(other, resume=True)


def test_the_sharded_run_follows_the_rules_and_the_unsharded_losses(
    base_dir, tmp_path, runners, monkeypatch
):
    run(
        run_config(
            base_dir, tmp_path / "mesh", mesh_data=2, mesh_fsdp=2, mesh_tensor=2, model_remat="full"
        )
    )
    params = runners[0]._params()
    layer = params["layers"]["self_attn"]["q_proj"]
    assert layer["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    assert layer["smoa"].a.sharding.spec == P(None, "fsdp", None)
    assert layer["smoa"].b.sharding.spec == P(None, "tensor", None)
    assert layer["smoa"].in_block.sharding.spec == P(None, "fsdp")
    run(run_config(base_dir, tmp_path / "plain", mesh_data=8, mesh_fsdp=1))
    got, expected = (
        [record["loss"] for record in read_metrics(tmp_path / name, "train")]
        for name in ("mesh", "plain")
    )
    np.testing.assert_allclose(got, expected, rtol=2e-4)


def test_a_gemma_trains_sharded_as_it_does_alone(tmp_path, runners):
    """Two kinds of layer, post-norms, q/k norms and a tied, scaled embedding over three axes."""
    base = write_base(
        tmp_path / "gemma",
        activation="gelu_tanh",
        embed_scale=32**0.5,
        norm_offset=1.0,
        post_norms=True,
        qk_norm=True,
        tie_embeddings=True,
        query_scale=0.25,
        sliding_window=4,
        local_layers=(True, False),
        local_rope_base=100.0,
        norm_epsilon=1e-6,
    )
    meshes = {
        "mesh": {"mesh_data": 2, "mesh_fsdp": 2, "mesh_tensor": 2},
        "plain": {"mesh_data": 8, "mesh_fsdp": 1},
    }
    losses = []
    for name, sizes in meshes.items():
        run(run_config(base, tmp_path / name, train_steps=3, **sizes))
        records = read_metrics(tmp_path / name, "train")
        losses.append([record["loss"] for record in records])
    norm = runners[0]._params()["layers"]["self_attn"]["q_norm"]["scale"]
    assert norm.sharding.spec == P(None, None)
    np.testing.assert_allclose(*losses, rtol=2e-4)
    assert losses[0][-1] < losses[0][0]


def test_accumulation_changes_nothing_but_memory(base_dir, tmp_path, runners):
    for parts in (1, 2):
        run(
            run_config(
                base_dir,
                tmp_path / str(parts),
                train_accumulate=parts,
                mesh_data=1,
                mesh_fsdp=4,
                mesh_tensor=2,
            )
        )
    first, second = (
        [record["loss"] for record in read_metrics(tmp_path / str(parts), "train")]
        for parts in (1, 2)
    )
    np.testing.assert_allclose(first, second, rtol=1e-4)


def test_steps_that_are_not_finite_change_nothing_and_stop_the_run(
    base_dir, tmp_path, runners, monkeypatch
):
    original = training_run.load_model

    def poisoned(config):
        loaded = original(config)
        params = dict(loaded.base.params)
        params["norm"] = {"scale": params["norm"]["scale"] * np.inf}
        return dataclasses.replace(loaded, base=dataclasses.replace(loaded.base, params=params))

    monkeypatch.setattr(training_run, "load_model", poisoned)
    with pytest.raises(RunError, match="not finite"):
        run(run_config(base_dir, tmp_path / "run", train_max_skipped=1))
    b = runners[0]._state["trainable"]["layers"]["mlp"]["up_proj"]["smoa"].b
    assert not np.asarray(b).any()
    skipped = read_metrics(tmp_path / "run")
    assert any(record.get("skipped") == 2 for record in skipped)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_max_length": 200, "data_template": "alpaca"}, "for a model of 16 positions"),
        (
            {"evaluation_rows": 4, "evaluation_max_new_tokens": 15, "evaluation_before": False},
            "evaluation.max_new_tokens=15 for a model of 16 positions",
        ),
        ({"evaluation_rows": 4, "evaluation_answer": "number"}, "under protocol number"),
    ],
)
def test_what_could_not_be_trained_or_scored_is_refused_before_anything_is_written(
    tmp_path, one_device, changes, words
):
    base = write_base(tmp_path / "base", max_positions=30 if "evaluation_answer" in changes else 16)
    with pytest.raises(ValueError, match=words):
        run(run_config(base, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"beta1": 1.0}, {"beta2": 1.0}, {"epsilon": 0.0}])
def test_moments_that_would_divide_by_zero_are_refused(changes):
    with pytest.raises(ValueError, match=f"optimizer.{next(iter(changes))}="):
        OptimizerConfig(**changes)
