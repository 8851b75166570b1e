"""A Gemma 4 trains: over three mesh axes as on one device, every stack of it, and goes back out."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from smoa_jax.adapter.types import is_modulation
from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.native.directory import load_adapter, read_adapter
from smoa_jax.models.config import RopeScaling
from smoa_jax.training.model import load_model
from smoa_jax.training.run import run
from smoa_jax.training.state import start_state
from tests.training.conftest import use_one_device
from tests.training.tiny_run import run_config, write_base

COMMON = {
    "activation": "gelu_tanh",
    "embed_scale": 32**0.5,
    "post_norms": True,
    "qk_norm": True,
    "value_norm": True,
    "layer_scalars": True,
    "tie_embeddings": True,
    "query_scale": 1.0,
    "sliding_window": 4,
    "local_rope_base": 1e4,
    "rope_scaling": RopeScaling(kind="proportional", rotated_share=0.25),
    "norm_epsilon": 1e-6,
    "head_dim": 8,
    "global_head_dim": 16,
    "final_soft_cap": 30.0,
}
L, G = True, False
KINDS = {
    "e2b": {
        **COMMON,
        "num_layers": 6,
        "local_layers": (L, G, L, G, L, G),
        "num_kv_shared_layers": 2,
        "shared_mlp_dim": 96,
        "per_layer_dim": 4,
    },
    "31b": {
        **COMMON,
        "num_layers": 6,
        "local_layers": (L, L, G, L, L, G),
        "num_kv_heads": 4,
        "num_global_kv_heads": 2,
        "global_keys_as_values": True,
    },
}
STACKS = {
    "e2b": {"local": (0, 2), "global": (1, 3), "local_shared": (4,), "global_shared": (5,)},
    "31b": {"local": (0, 1, 3, 4), "global": (2, 5)},
}
MESH = {"mesh_data": 2, "mesh_fsdp": 2, "mesh_tensor": 2}


def batch():
    """Eight rows with different numbers of trained tokens."""
    rng = np.random.default_rng(3)
    length = 13
    return {
        "tokens": rng.integers(0, 288, (8, length)).astype(np.int32),
        "targets": rng.integers(0, 288, (8, length)).astype(np.int32),
        "loss_mask": (np.arange(length) >= np.arange(8)[:, None]).astype(np.float32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (8, 1)),
        "segment_ids": np.ones((8, length), np.int32),
    }


def one_step(config):
    """Loss, gradient norm and trained tree of a run's first step."""
    loaded = load_model(config)
    state, programs = start_state(config, loaded, 2)
    state, metrics = programs.take_step(state, batch())
    kernel = loaded.base.params["layers"]["local"]["self_attn"]["q_proj"]["kernel"]
    return float(metrics["loss"]), float(metrics["grad_norm"]), state["trainable"], kernel.sharding


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_over_three_mesh_axes_is_that_of_one_device(tmp_path, kind, monkeypatch):
    base = write_base(tmp_path / "base", **KINDS[kind])
    is_e2b = kind == "e2b"
    settings = {
        "adapter_target_modules": ["q_proj", "up_proj", "per_layer_projection"][: 2 + is_e2b],
        "optimizer_max_warmup_share": 0.0,
    }
    sharded = one_step(run_config(base, tmp_path / "mesh", **settings, **MESH))
    assert sharded[3].spec == P(None, "fsdp", "tensor")
    use_one_device(monkeypatch)
    plain = one_step(run_config(base, tmp_path / "plain", **settings))
    np.testing.assert_allclose(sharded[:2], plain[:2], rtol=1e-3)
    for name, layers in STACKS[kind].items():
        stack, other = (made[2]["layers"][name] for made in (sharded, plain))
        for module, theirs in zip(adapted(stack), adapted(other), strict=True):
            b = np.asarray(module.b)
            assert len(b) == len(layers)
            assert np.abs(b).max(axis=(1, 2)).min() > 1e-3  # every layer has learnt
            # Adam's first step has the sign of the gradient, be that nearly nothing.
            assert np.mean(np.sign(b) == np.sign(np.asarray(theirs.b))) > 0.999


def adapted(tree):
    return [node for node in jax.tree.leaves(tree, is_leaf=is_modulation) if is_modulation(node)]


def test_layers_of_the_configuration_are_the_models_own(tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    base = write_base(tmp_path / "base", **KINDS["31b"])
    run(run_config(base, tmp_path / "run", train_steps=2, adapter_layers=(1, 5)))
    found = read_adapter(tmp_path / "run" / "adapter")
    assert found.config.layers == (1, 5)
    assert found.config.layer_numbers == {
        f"layers.{name}": layers for name, layers in STACKS["31b"].items()
    }
    params = load_adapter(
        tmp_path / "run" / "adapter",
        load_base(base).params,
        base_fingerprint=found.base_fingerprint,
    )
    changed = {
        name: [bool(layer.any()) for layer in np.asarray(stack["mlp"]["up_proj"]["smoa"].b)]
        for name, stack in params["layers"].items()
    }
    assert changed == {"local": [False, True, False, False], "global": [False, True]}
