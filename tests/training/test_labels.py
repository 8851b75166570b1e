"""A run under other labels: slices while it trains, the original order on disk, bit for bit."""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from smoa_jax.adapter.tree import find_modulations
from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.native.directory import load_adapter
from smoa_jax.training import labels
from smoa_jax.training.run import run
from tests.training.test_run import MESH, Watch
from tests.training.tiny_run import run_config

ALIGNED = {
    "adapter_partition": "aligned_blocks",
    "adapter_target_modules": ("q_proj", "v_proj", "gate_proj", "down_proj"),
    "train_steps": 5,
}


def adapter_of(directory):
    return load_file(directory / "adapter" / "adapter.safetensors")


def test_a_run_of_slices_is_the_run_by_ids_and_stores_the_same_adapter(
    base_dir, tmp_path, monkeypatch
):
    slices, by_ids = Watch(), Watch()
    run(run_config(base_dir, tmp_path / "slices", **ALIGNED), on_step=slices)
    monkeypatch.setattr(labels, "relabelling_of", lambda params, table: None)
    run(run_config(base_dir, tmp_path / "ids", **ALIGNED), on_step=by_ids)
    nodes = [node for _, node, _ in find_modulations_of(slices.state["trainable"])]
    assert all(node.contiguous for node in nodes)
    assert not any(n.contiguous for _, n, _ in find_modulations_of(by_ids.state["trainable"]))
    for left, right in zip(slices.taken, by_ids.taken, strict=True):
        assert float(left.metrics["loss"]) == pytest.approx(float(right.metrics["loss"]), rel=1e-5)
    stored, expected = (adapter_of(tmp_path / name) for name in ("slices", "ids"))
    assert stored.keys() == expected.keys()
    for name, value in stored.items():
        if name.rsplit("/", 1)[-1] in ("a", "b"):
            assert np.abs(value).max() > 0
            np.testing.assert_allclose(value, expected[name], rtol=2e-3, atol=2e-5)
        else:
            np.testing.assert_array_equal(value, expected[name])
    base = load_base(base_dir)
    params = load_adapter(
        tmp_path / "slices" / "adapter", base.params, base_fingerprint=base.fingerprint
    )
    ids = find_modulations(params)["layers.mlp.gate_proj"][1].out_block
    assert np.any(np.diff(np.asarray(ids), axis=-1) < 0)  # in the original order


def find_modulations_of(trainable):
    """Nodes of half a tree, which has no kernels."""
    leaves = jax.tree_util.tree_leaves_with_path(trainable, is_leaf=lambda n: hasattr(n, "ranks"))
    return [(path, node, "") for path, node in leaves]


@pytest.mark.parametrize("mesh", [{}, MESH], ids=["one", "mesh"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(base_dir, tmp_path, mesh):
    changes = {**ALIGNED, **mesh}
    whole, resumed = Watch(), Watch()
    run(run_config(base_dir, tmp_path / "whole", **changes), on_step=whole)
    broken = run_config(base_dir, tmp_path / "broken", train_save_every=2, **changes)
    looked_up = labels._mover.cache_info()
    assert not run(broken, on_step=Watch(stop_after=3)).finished
    saves = labels._mover.cache_info()  # after steps 2 and 3, by one program
    assert (saves.misses - looked_up.misses, saves.hits - looked_up.hits) == (1, 1)
    assert run(broken, resume=True, on_step=resumed).finished
    chex.assert_trees_all_equal(resumed.state, whole.state)
    left, right = (adapter_of(tmp_path / name) for name in ("whole", "broken"))
    chex.assert_trees_all_equal(left, right)
