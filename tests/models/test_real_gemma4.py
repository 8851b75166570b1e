"""The real Gemma 4 models at full size, without a weight: shapes, counts, shardings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.tree import apply_smoa, count_trainable, partition
from smoa_jax.checkpoint.names import layer_numbers
from smoa_jax.models.decoder import Decoder, abstract_params
from smoa_jax.models.stacks import layer_sections, layer_stacks
from smoa_jax.sharding.mesh import AXES
from smoa_jax.sharding.rules import check_heads, param_shardings
from tests.models.real_configs import REAL_GEMMA4

GOLDEN = Path(__file__).parents[1] / "golden"
every_model = pytest.mark.parametrize("name", REAL_GEMMA4)
ADAPTERS = {
    "blocks": SmoaConfig(rank=32, num_subspaces=2),
    "bands": SmoaConfig(rank=32, num_subspaces=2, partition="spectral_bands"),
    "lora": SmoaConfig.lora(32),
}
#: Stacks in the order in which they run, the periods of each section, and query scale, window.
FACTS = {
    "Gemma-4-E2B": ((12, 3, 16, 4), (3, 4), 512),
    "Gemma-4-E4B": ((20, 4, 15, 3), (4, 3), 512),
    "Gemma-4-12B": ((40, 8), (8,), 1024),
    "Gemma-4-31B": ((50, 10), (10,), 1024),
}


def size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@every_model
def test_the_parameter_count_is_the_known_one(name):
    config = REAL_GEMMA4[name].config
    assert size(abstract_params(config, jnp.bfloat16)) == REAL_GEMMA4[name].parameters


@every_model
def test_layers_lie_and_run_in_whole_periods(name):
    config = REAL_GEMMA4[name].config
    depths, periods, window = FACTS[name]
    assert tuple(len(stack.layers) for stack in layer_stacks(config)) == depths
    assert tuple(section.num_periods for section in layer_sections(config)) == periods
    assert config.sliding_window == window
    assert (config.attention_scale, config.final_soft_cap, config.norm_offset) == (1.0, 30.0, 0.0)
    assert (config.rope_base, config.local_rope_base) == (1e6, 1e4)
    assert config.rope_scaling.rotated_share == 0.25


def formula(text: dict[str, Any], adapter: str) -> int:
    """The table of docs/method.md for q, k, v, up, down at R = 32, M = 2, layer by layer."""
    embed, mlp, heads = (
        text[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    shared = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    total = 0
    for layer, kind in enumerate(text["layer_types"]):
        is_global = kind == "full_attention"
        head_dim = 512 if is_global else 256
        kv_heads = text["num_key_value_heads"]
        if is_global and text["attention_k_eq_v"]:
            kv_heads = text["num_global_key_value_heads"]
        wide = 2 if layer >= shared and text.get("use_double_wide_mlp") else 1
        both = embed + heads * head_dim + 2 * (embed + wide * mlp)
        if layer < shared:
            projections = 1 if is_global and text["attention_k_eq_v"] else 2
            both += projections * (embed + kv_heads * head_dim)
        total += both * 32 // (2 if adapter == "blocks" else 1)
    return total


@every_model
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_trained_parameters_are_those_of_the_formula(name, adapter):
    model, config = REAL_GEMMA4[name], ADAPTERS[adapter]
    base = abstract_params(model.config, jnp.bfloat16)
    trainable, _ = partition(apply_smoa(base, config, jax.random.key(0)))
    expected = formula(model.fields["text_config"], adapter)
    assert size(trainable) == expected == count_trainable(base, config)


@every_model
def test_layers_are_the_models_own_whatever_their_stack(name):
    decoder = REAL_GEMMA4[name].config
    base = abstract_params(decoder, jnp.bfloat16)
    last = decoder.num_layers - 1
    config = SmoaConfig(
        rank=2,
        target_modules=["q_proj"],
        layers=(0, 5, last),
        layer_numbers=layer_numbers(decoder),
    )
    per_layer = {
        layer: 2 * (decoder.embed_dim + decoder.num_heads * (256 if local else 512)) // 2
        for layer, local in enumerate(decoder.local_layers)
    }
    assert count_trainable(base, config) == sum(per_layer[layer] for layer in (0, 5, last))


@every_model
def test_the_forward_of_an_adapted_model_gives_float32_logits(name):
    config = REAL_GEMMA4[name].config
    base = abstract_params(config, jnp.bfloat16)
    params = apply_smoa(base, ADAPTERS["blocks"], jax.random.key(0))
    model = Decoder(config, dtype=jnp.bfloat16, remat="projections")
    tokens = jax.ShapeDtypeStruct((3, 40), jnp.int32)
    logits = jax.eval_shape(model.apply, {"params": params}, tokens)
    assert logits == jax.ShapeDtypeStruct((3, 40, config.vocab_size), jnp.float32)


@every_model
@pytest.mark.parametrize("axes", [(1, 2, 4), (1, 8, 1)], ids=["2x4", "8x1"])
def test_eight_devices_divide_every_model_or_the_error_names_the_axis(name, axes):
    config, mesh = REAL_GEMMA4[name].config, AbstractMesh(axes, AXES)
    base = abstract_params(config, jnp.bfloat16)
    params = apply_smoa(base, ADAPTERS["blocks"], jax.random.key(0))
    placed = param_shardings(params, mesh)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(placed), strict=True
    ):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        part = math.prod(sharding.shard_shape(leaf.shape))
        if where.endswith(("/kernel", "/embedding")):
            assert part * 8 == math.prod(leaf.shape), where
    counts = [stack.shape.num_kv_heads for stack in layer_stacks(config)]
    for count in counts:
        if count % axes[2]:
            with pytest.raises(ValueError, match=f"got tensor={axes[2]} for"):
                check_heads(config.num_heads, count, mesh)
        else:
            check_heads(config.num_heads, count, mesh)
    assert any(count % 4 for count in counts) == (name != "Gemma-4-31B")


def test_the_adapted_tree_of_e2b_is_the_golden_one():
    base = abstract_params(REAL_GEMMA4["Gemma-4-E2B"].config, jnp.bfloat16)
    params = apply_smoa(base, ADAPTERS["blocks"], jax.random.key(0))
    lines = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    assert "\n".join(lines) + "\n" == (GOLDEN / "gemma-4-e2b_blocks.txt").read_text()
