"""A whole run on a tiny Llama: it learns, writes what it says, and resumes bit for bit."""

from __future__ import annotations

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from smoa_jax.checkpoint.base import load_base
from smoa_jax.training import prepare as training_prepare
from smoa_jax.training import run as training_run
from smoa_jax.training.config import OptimizerConfig
from smoa_jax.training.loop import Taken
from smoa_jax.training.run import RunError, run
from tests.training.conftest import use_one_device
from tests.training.tiny_run import TASK, read_metrics, run_config, write_base


class Watch:
    """An ``on_step`` that keeps what the last step left, and stops after a step if asked to."""

    def __init__(self, stop_after: int = 0):
        self.taken: list[Taken] = []
        self._stop_after = stop_after

    def __call__(self, taken: Taken) -> bool:
        self.taken.append(taken)
        return taken.step != self._stop_after

    @property
    def state(self):
        """After the last step: no later one has donated it."""
        return self.taken[-1].state


@pytest.fixture
def bases(monkeypatch):
    """What the runs in a test loaded, as it lies on their mesh."""
    loaded = []
    original = training_prepare.load_model

    def keep(config):
        loaded.append(original(config))
        return loaded[-1]

    monkeypatch.setattr(training_prepare, "load_model", keep)
    return loaded


def compiled_steps(directory):
    return [record["step"] for record in read_metrics(directory, "train") if record["compiled"]]


def check_summary(directory, config):
    """It says what came of the run and what that was made with, as plain JSON."""
    summary = json.loads((directory / "summary.json").read_text())
    steps = [record for record in read_metrics(directory, "train") if not record["compiled"]]
    tokens, seconds = (sum(step[name] for step in steps) for name in ("tokens", "seconds"))
    assert summary["tokens_per_second"] == pytest.approx(tokens / seconds)
    assert sum(summary["devices"].values()) == len(jax.devices())
    assert summary["versions"]["jax"] == jax.__version__
    assert summary["peak_memory_bytes"]["host"] > 1e8
    assert len(summary["data"]["train"]) == 64  # SHA-256
    assert summary["data"]["settings"]["max_length"] == config.data.max_length


def test_a_run_learns_and_freezes_and_compiles_once(base_dir, tmp_path, bases):
    config = run_config(base_dir, tmp_path / "run", train_steps=12, train_eval_every=6)
    summary = run(config)
    assert summary.finished
    assert summary.loss_after < summary.loss_before - 0.5
    losses = [record["loss"] for record in read_metrics(tmp_path / "run", "train")]
    assert len(losses) == 12
    for name in ("config.yaml", "checkpoints", "adapter/adapter.json", "summary.json"):
        assert (tmp_path / "run" / name).exists()
    assert compiled_steps(tmp_path / "run") == [1]
    check_summary(tmp_path / "run", config)
    chex.assert_trees_all_equal(bases[0].base.params, load_base(base_dir).params)
    with pytest.raises(RunError, match="not empty"):
        run(config)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(base_dir, tmp_path):
    changes = {"train_steps": 6, "train_accumulate": 1, "adapter_dropout": 0.2}
    whole, resumed = Watch(), Watch()
    run(run_config(base_dir, tmp_path / "whole", **changes), on_step=whole)
    broken = run_config(base_dir, tmp_path / "broken", train_save_every=2, **changes)
    assert not run(broken, on_step=Watch(stop_after=3)).finished
    assert run(broken, resume=True, on_step=resumed).finished
    assert [taken.step for taken in resumed.taken] == [4, 5, 6]
    chex.assert_trees_all_equal(resumed.state, whole.state)
    assert compiled_steps(tmp_path / "broken") == [1, 4]  # once fresh, once after the restore
    other = dataclasses.replace(broken, adapter=dataclasses.replace(broken.adapter, rank=6))
    with pytest.raises(ValueError, match="rank"):
        run(other, resume=True)


MESH = {"mesh_data": 2, "mesh_fsdp": 2, "mesh_tensor": 2}


def test_the_sharded_run_follows_the_rules_and_the_losses_of_one_device(
    base_dir, tmp_path, bases, monkeypatch
):
    watch = Watch()
    run(run_config(base_dir, tmp_path / "mesh", model_remat="full", **MESH), on_step=watch)
    kernel = bases[0].base.params["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    factors = watch.state["trainable"]["layers"]["self_attn"]["q_proj"]["smoa"]
    assert factors.a.sharding.spec == P(None, "fsdp", None)
    assert factors.b.sharding.spec == P(None, "tensor", None)
    use_one_device(monkeypatch)
    run(run_config(base_dir, tmp_path / "plain"))
    assert bases[1].mesh.size == 1
    np.testing.assert_allclose(*losses_of(tmp_path, "mesh", "plain"), rtol=2e-4)


def losses_of(directory, *names):
    return [
        [record["loss"] for record in read_metrics(directory / name, "train")] for name in names
    ]


def test_a_gemma_trains_sharded_as_it_does_on_one_device(tmp_path, bases, monkeypatch):
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
    run(run_config(base, tmp_path / "mesh", train_steps=3, **MESH))
    use_one_device(monkeypatch)
    run(run_config(base, tmp_path / "plain", train_steps=3))
    norm = bases[0].base.params["layers"]["self_attn"]["q_norm"]["scale"]
    assert norm.sharding.spec == P(None, None)
    assert bases[1].mesh.size == 1
    losses = losses_of(tmp_path, "mesh", "plain")
    np.testing.assert_allclose(*losses, rtol=2e-4)
    assert losses[0][-1] < losses[0][0]


def test_accumulation_changes_nothing_but_memory(base_dir, tmp_path):
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


def test_steps_that_are_not_finite_change_nothing_and_stop_the_run(base_dir, tmp_path, monkeypatch):
    watch, original = Watch(), training_prepare.load_model

    def poisoned(config):
        loaded = original(config)
        params = dict(loaded.base.params)
        params["norm"] = {"scale": params["norm"]["scale"] * np.inf}
        return dataclasses.replace(loaded, base=dataclasses.replace(loaded.base, params=params))

    monkeypatch.setattr(training_prepare, "load_model", poisoned)
    with pytest.raises(RunError, match="not finite"):
        run(run_config(base_dir, tmp_path / "run", train_max_skipped=1), on_step=watch)
    b = watch.state["trainable"]["layers"]["mlp"]["up_proj"]["smoa"].b
    assert not np.asarray(b).any()
    skipped = read_metrics(tmp_path / "run")
    assert any(record.get("skipped") == 2 for record in skipped)


def test_a_run_is_not_resumed_on_other_data(base_dir, tmp_path, one_device):
    changes = {"train_save_every": 2, "train_steps": 4}
    run(run_config(base_dir, tmp_path / "run", **changes), on_step=Watch(stop_after=2))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    for task in (dataclasses.replace(TASK, seed=5), dataclasses.replace(TASK, eval_rows=15)):
        other = run_config(base_dir, tmp_path / "run", data_task=task, **changes)
        with pytest.raises(ValueError, match="than when the run began"):
            run(other, resume=True)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert run(run_config(base_dir, tmp_path / "run", **changes), resume=True).finished


def test_the_adapter_is_saved_before_answers_are_scored(
    base_dir, tmp_path, one_device, monkeypatch
):
    def fail(*_, **__):
        raise MemoryError("while answering")

    monkeypatch.setattr(training_run, "held_out_answers", fail)
    config = run_config(base_dir, tmp_path / "run", evaluation_rows=3, evaluation_before=False)
    with pytest.raises(MemoryError):
        run(config)
    assert (tmp_path / "run" / "adapter" / "adapter.json").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


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


def test_too_little_memory_is_one_line_with_the_settings_that_lower_it(base_dir, tmp_path):
    def exhaust(_):
        jax.block_until_ready(jax.numpy.zeros((1 << 48,)))
        return True

    words = r"too little memory on cpu .*train\.accumulate=1 \(now 8 rows.*data\.max_length=24"
    with pytest.raises(ValueError, match=words):
        run(run_config(base_dir, tmp_path / "run"), on_step=exhaust)


def test_a_run_on_streamed_rows_resumes_bit_for_bit(base_dir, tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = [{"prompt": f"{n} + {n} =", "completion": str(2 * n)} for n in range(50)]
    rows.write_text("\n".join(map(json.dumps, texts)))
    changes = {
        "train_steps": 5,
        "data_source": "files",
        "data_train_files": (str(rows),),
        "data_stream": True,
    }
    whole, resumed = Watch(), Watch()
    run(run_config(base_dir, tmp_path / "whole", **changes), on_step=whole)
    broken = run_config(base_dir, tmp_path / "broken", **changes)
    assert not run(broken, on_step=Watch(stop_after=2)).finished
    run(broken, resume=True, on_step=resumed)
    chex.assert_trees_all_equal(whole.state["trainable"], resumed.state["trainable"])
    unknown = run_config(base_dir, tmp_path / "run", **changes | {"train_steps": 0})
    with pytest.raises(RunError, match=r"got data\.stream=true without train\.steps"):
        run(unknown)
