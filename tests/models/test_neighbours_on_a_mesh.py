"""What Llama's neighbours add to it, divided over a tensor axis: the same as on one device.

OLMo 2 norms queries and keys over all heads, which lie on several devices; biases lie where the
outputs of their kernels do.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax import combine, partition
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.decoder import Decoder
from smoa_jax.sharding.mesh import MeshConfig, make_mesh
from smoa_jax.sharding.rules import activation_constraint, param_shardings
from tests.models import tiny

SIZES = dataclasses.replace(
    tiny.CONFIG, vocab_size=64, num_heads=8, num_kv_heads=4, head_dim=6, mlp_dim=24
)
CONFIGS = {
    "olmo2": dataclasses.replace(
        SIZES,
        pre_norms=False,
        post_norms=True,
        wide_qk_norm=True,
        attention_bias="all",
    ),
    "smollm3": dataclasses.replace(
        SIZES, rope_layers=(True, False, True), attention_bias="all", mlp_bias=True
    ),
}
TOKENS = tiny.tokens(4, 7, vocab_size=64)


def loss_and_gradient(config: DecoderConfig, params, constrain=None):
    model = Decoder(config, dtype=jnp.float32, remat="projections")
    if constrain is not None:
        model = dataclasses.replace(model, constrain=constrain)

    @jax.jit
    def loss(trainable, frozen, tokens):
        logits = model.apply({"params": combine(trainable, frozen)}, tokens[:, :-1])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -chosen.mean(), logits

    trainable, frozen = partition(params)
    (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, TOKENS)
    return np.asarray(logits), gradient


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_gradients_on_a_tensor_axis_are_those_of_one_device(family):
    config = CONFIGS[family]
    params = tiny.adapt(tiny.params_of(config), 3, b_std=0.3)
    expected, expected_gradient = loss_and_gradient(config, params)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    placed = jax.device_put(params, param_shardings(params, mesh))
    attention = placed["layers"]["self_attn"]
    assert {shard.data.shape for shard in attention["q_proj"]["bias"].addressable_shards} == {
        (3, 12)
    }
    assert {shard.data.shape for shard in attention["o_proj"]["bias"].addressable_shards} == {
        (3, 10)
    }
    got, gradient = loss_and_gradient(config, placed, activation_constraint(mesh))
    np.testing.assert_allclose(got, expected, atol=2e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5),
        gradient,
        expected_gradient,
    )
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradient)) > 1e-4


def test_a_norm_over_each_devices_own_heads_would_be_another_model():
    """The control of the test above: what a norm that stays within each part would compute."""
    config = CONFIGS["olmo2"]
    params = tiny.params_of(config)
    attention = params["layers"]["self_attn"]
    for name in ("q_norm", "k_norm"):
        attention[name] = {"scale": jnp.ones_like(attention[name]["scale"])}
    whole, _ = loss_and_gradient(config, tiny.adapt(params, 3, b_std=0.3))
    for name in ("q_norm", "k_norm"):
        attention[name] = {"scale": jnp.ones((3, config.head_dim))}
    own, _ = loss_and_gradient(
        dataclasses.replace(config, qk_norm=True, wide_qk_norm=False),
        tiny.adapt(params, 3, b_std=0.3),
    )
    assert np.abs(whole - own).max() > 1e-2
