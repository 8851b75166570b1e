"""The real models at full size, without a weight: shapes, counts, shardings, all abstract."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.tree import (
    apply_smoa,
    count_trainable,
    partition,
    strip_smoa,
    trainable_mask,
)
from smoa_jax.adapter.types import TRAINABLE_FIELDS
from smoa_jax.models.config import RopeScaling
from smoa_jax.models.decoder import Decoder, abstract_params
from smoa_jax.sharding.mesh import AXES, MeshConfig, make_mesh
from smoa_jax.sharding.rules import check_heads, param_shardings
from tests.models.real_configs import REAL_MODELS

GOLDEN = Path(__file__).parents[1] / "golden"

every_model = pytest.mark.parametrize("name", REAL_MODELS)

#: The published defaults (R = 32, M = 2) for the members that have subspaces; equal rank for all.
ADAPTERS = {
    "blocks": SmoaConfig(rank=32, num_subspaces=2),
    "bands": SmoaConfig(rank=32, num_subspaces=2, partition="spectral_bands"),
    "hira": SmoaConfig.hira(32),
    "lora": SmoaConfig.lora(32),
    "melora": SmoaConfig.melora(32, 2),
}


def base_params(name: str) -> Any:
    return abstract_params(REAL_MODELS[name].config, jnp.bfloat16)


def size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def all_abstract(tree: Any) -> bool:
    return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


# ------------------------------------------------------------------------------- configs and sizes


@every_model
def test_the_parameter_count_is_the_published_one(name):
    params = base_params(name)
    assert all_abstract(params)
    assert size(params) == REAL_MODELS[name].parameters


LLAMA3 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=8192,
)
LLAMA32 = dataclasses.replace(LLAMA3, factor=32.0)
LINEAR = RopeScaling(kind="linear", factor=8.0)
PLAIN = RopeScaling()
#: head_dim, RoPE base and scaling, tied head, positions.
ALL_FACTS = {
    "SmolLM2-135M": (64, 1e5, PLAIN, True, 8192),
    "Llama-2-7B": (128, 1e4, PLAIN, False, 4096),
    "Llama-2-13B": (128, 1e4, PLAIN, False, 4096),
    "Llama-2-70B": (128, 1e4, PLAIN, False, 4096),
    "Llama-3.1-8B": (128, 5e5, LLAMA3, False, 131072),
    "Llama-3.1-70B": (128, 5e5, LLAMA3, False, 131072),
    "Llama-3.1-405B": (128, 5e5, LLAMA3, False, 131072),
    "Llama-3.2-1B": (64, 5e5, LLAMA32, True, 131072),
    "Llama-3.2-3B": (128, 5e5, LLAMA32, True, 131072),
    "Gemma-1-2B": (256, 1e4, PLAIN, True, 8192),
    "Gemma-1-7B": (256, 1e4, PLAIN, True, 8192),
    "Gemma-2-2B": (256, 1e4, PLAIN, True, 8192),
    "Gemma-2-9B": (256, 1e4, PLAIN, True, 8192),
    "Gemma-2-27B": (128, 1e4, PLAIN, True, 8192),
    "Gemma-3-270M": (256, 1e6, PLAIN, True, 32768),
    "Gemma-3-1B": (256, 1e6, PLAIN, True, 32768),
    "Gemma-3-4B": (256, 1e6, LINEAR, True, 131072),
    "Gemma-3-12B": (256, 1e6, LINEAR, True, 131072),
    "Gemma-3-27B": (128, 1e6, LINEAR, True, 131072),
    "Mistral-7B-v0.1": (128, 1e4, PLAIN, False, 32768),
    "Mistral-7B-v0.3": (128, 1e6, PLAIN, False, 32768),
    "Ministral-8B": (128, 1e8, PLAIN, False, 32768),
    "Qwen2.5-0.5B": (64, 1e6, PLAIN, True, 32768),
    "Qwen2.5-7B": (128, 1e6, PLAIN, False, 131072),
    "Qwen2.5-72B": (128, 1e6, PLAIN, False, 32768),
    "Qwen3-0.6B": (128, 1e6, PLAIN, True, 40960),
    "Qwen3-8B": (128, 1e6, PLAIN, False, 40960),
    "Qwen3-32B": (128, 1e6, PLAIN, False, 40960),
    "SmolLM3-3B": (128, 5e6, PLAIN, True, 65536),
    "OLMo-2-7B": (128, 5e5, PLAIN, False, 4096),
    "OLMo-2-32B": (128, 5e5, PLAIN, False, 4096),
}
#: Query scale as its inverse square; window; how many local layers; every n-th layer is global;
#: RoPE base of the local ones (0: the same); soft caps of attention and logits.
WINDOW_FACTS = {
    "Gemma-2-2B": (256, 4096, 13, 2, 0.0, 50.0, 30.0),
    "Gemma-2-9B": (256, 4096, 21, 2, 0.0, 50.0, 30.0),
    "Gemma-2-27B": (144, 4096, 23, 2, 0.0, 50.0, 30.0),
    "Gemma-3-270M": (256, 512, 15, 6, 1e4, 0.0, 0.0),
    "Gemma-3-1B": (256, 512, 22, 6, 1e4, 0.0, 0.0),
    "Gemma-3-4B": (256, 1024, 29, 6, 1e4, 0.0, 0.0),
    "Gemma-3-12B": (256, 1024, 40, 6, 1e4, 0.0, 0.0),
    "Gemma-3-27B": (168, 1024, 52, 6, 1e4, 0.0, 0.0),
    "Mistral-7B-v0.1": (128, 4096, 32, 33, 0.0, 0.0, 0.0),
    "Ministral-8B": (128, 32768, 36, 37, 0.0, 0.0, 0.0),
}
#: Those whose norms add 1e-5; the others' add 1e-6.
LARGER_EPSILON = ("SmolLM2", "Llama", "Mistral", "Ministral")


@every_model
def test_what_the_file_says_or_leaves_out_becomes_the_right_option(name):
    config = REAL_MODELS[name].config
    gemma = name.startswith("Gemma")
    assert ALL_FACTS[name] == (
        config.head_dim,
        config.rope_base,
        config.rope_scaling,
        config.tie_embeddings,
        config.max_positions,
    )
    assert config.activation == ("gelu_tanh" if gemma else "silu")
    assert config.norm_offset == (1.0 if gemma else 0.0)
    assert config.embed_scale == (config.embed_dim**0.5 if gemma else 1.0)
    olmo = name.startswith("OLMo")
    assert config.norm_epsilon == (1e-5 if name.startswith(LARGER_EPSILON) else 1e-6)
    assert config.post_norms == name.startswith(("Gemma-2", "Gemma-3", "OLMo"))
    assert config.qk_norm == name.startswith(("Gemma-3", "Qwen3"))
    assert (config.wide_qk_norm, config.pre_norms) == (olmo, not olmo)
    assert config.attention_bias == ("qkv" if name.startswith("Qwen2.5") else "none")
    assert not config.mlp_bias
    still = [layer for layer, turns in enumerate(config.rope_layers) if not turns]
    assert still == (list(range(3, 36, 4)) if name == "SmolLM3-3B" else [])


@every_model
def test_windows_query_scales_and_soft_caps_are_the_models_own(name):
    config = REAL_MODELS[name].config
    if name not in WINDOW_FACTS:
        assert not config.local_layers
        assert config.sliding_window == config.local_rope_base == config.query_scale == 0
        assert config.attention_soft_cap == config.final_soft_cap == 0
        return
    scalar, window, local, period, local_base, attention_cap, final_cap = WINDOW_FACTS[name]
    assert config.attention_scale == pytest.approx(scalar**-0.5, rel=1e-12)
    assert (config.sliding_window, config.local_rope_base) == (window, local_base)
    assert (config.attention_soft_cap, config.final_soft_cap) == (attention_cap, final_cap)
    assert sum(config.local_layers) == local
    globals_ = [layer for layer, is_local in enumerate(config.local_layers) if not is_local]
    assert globals_ == list(range(period - 1, config.num_layers, period))


# --------------------------------------------------------------------------------------- adapters


def formula(fields: dict[str, Any], adapter: str) -> int:
    """The table of docs/method.md for q, k, v, up, down at R = 32, M = 2, by the file's sizes."""
    embed, mlp = fields["hidden_size"], fields["intermediate_size"]
    query = fields["num_attention_heads"] * fields["head_dim"]
    key_value = fields["num_key_value_heads"] * fields["head_dim"]
    both = (embed + query) + 2 * (embed + key_value) + 2 * (embed + mlp)  # I + O, summed
    per_layer = both * 32 // (2 if adapter in ("blocks", "melora") else 1)
    return per_layer * fields["num_hidden_layers"]


def sizes(name: str) -> dict[str, Any]:
    """The sizes in a model's file; those that Gemma 3 4B and 12B leave out are added by hand."""
    fields = dict(REAL_MODELS[name].fields)
    if "text_config" in fields:
        fields = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256} | fields[
            "text_config"
        ]
    if "head_dim" not in fields:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    return fields


@every_model
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_trained_parameters_are_those_of_the_formula(name, adapter):
    base, config = base_params(name), ADAPTERS[adapter]
    params = apply_smoa(base, config, jax.random.key(0))
    assert all_abstract(params)
    assert strip_smoa(params) == base
    trainable, _ = partition(params)
    expected = formula(sizes(name), adapter)
    assert size(trainable) == expected == count_trainable(base, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_tracing_the_whole_of_llama_405b_gives_the_same_tree_as_its_shapes(adapter):
    base, key = base_params("Llama-3.1-405B"), jax.random.key(0)
    traced = jax.eval_shape(lambda params: apply_smoa(params, ADAPTERS[adapter], key), base)
    assert traced == apply_smoa(base, ADAPTERS[adapter], key)


@every_model
def test_the_forward_of_an_adapted_model_gives_float32_logits(name):
    config = REAL_MODELS[name].config
    params = apply_smoa(base_params(name), ADAPTERS["blocks"], jax.random.key(0))
    model = Decoder(config, dtype=jnp.bfloat16, remat="projections")
    tokens = jax.ShapeDtypeStruct((3, 40), jnp.int32)
    logits = jax.eval_shape(model.apply, {"params": params}, tokens)
    assert logits == jax.ShapeDtypeStruct((3, 40, config.vocab_size), jnp.float32)


# --------------------------------------------------------------------------------------- shardings


@every_model
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_default_rules_place_every_leaf_and_divide_what_is_large(name, adapter):
    mesh = make_mesh(MeshConfig(fsdp=8))
    params = apply_smoa(base_params(name), ADAPTERS[adapter], jax.random.key(0))
    placed = param_shardings(params, mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(params)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(placed), strict=True
    ):
        assert isinstance(sharding, NamedSharding)
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        whole = math.prod(leaf.shape)
        part = math.prod(sharding.shard_shape(leaf.shape))
        if where.endswith(("/kernel", "/embedding", "/bands")):
            assert part * 8 == whole, where
        else:
            assert part in (whole, whole // 8), where


@every_model
@pytest.mark.parametrize("axes", [(1, 2, 4), (1, 8, 1)], ids=["2x4", "8x1"])
def test_eight_devices_divide_every_model_or_the_error_names_the_axis(name, axes):
    config, mesh = REAL_MODELS[name].config, AbstractMesh(axes, AXES)
    params = apply_smoa(base_params(name), ADAPTERS["blocks"], jax.random.key(0))
    placed = param_shardings(params, mesh)["layers"]["self_attn"]
    for module in placed.values():
        if "bias" in module:  # where the outputs of its kernel lie
            assert module["bias"].spec[1] == module["kernel"].spec[2]
    if config.num_kv_heads % axes[2]:
        with pytest.raises(ValueError, match=f"got tensor={axes[2]} for"):
            check_heads(config.num_heads, config.num_kv_heads, mesh)
    else:
        check_heads(config.num_heads, config.num_kv_heads, mesh)


@every_model
def test_factors_lie_with_the_rows_of_their_kernel(name):
    mesh = AbstractMesh((1, 8, 1), AXES)
    params = apply_smoa(base_params(name), ADAPTERS["blocks"], jax.random.key(0))
    layers = param_shardings(params, mesh)["layers"]
    up, down = layers["mlp"]["up_proj"], layers["mlp"]["down_proj"]
    assert up["smoa"].a.spec[1] == up["kernel"].spec[1] == "fsdp"
    assert down["smoa"].b.spec[1] == down["kernel"].spec[2] == "fsdp"
    assert up["smoa"].in_block.spec[1] == "fsdp"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("Gemma-3-1B", 2, "got tensor=2 for 4 query and 1 key/value heads"),
        ("Gemma-1-2B", 8, "got tensor=8 for 8 query and 1 key/value heads"),
        ("Llama-3.2-3B", 16, "got tensor=16 for 24 query and 8 key/value heads"),
        ("Llama-3.1-405B", 16, "got tensor=16 for 128 query and 8 key/value heads"),
        ("Qwen2.5-0.5B", 4, "got tensor=4 for 14 query and 2 key/value heads"),
        ("Qwen2.5-7B", 8, "got tensor=8 for 28 query and 4 key/value heads"),
    ],
)
def test_a_tensor_axis_that_would_split_a_head_names_the_numbers_and_the_remedy(
    name, tensor, message
):
    config = REAL_MODELS[name].config
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check_heads(config.num_heads, config.num_kv_heads, AbstractMesh((1, 1, tensor), AXES))
    assert "lower mesh.tensor and raise mesh.fsdp" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "axes", "message"),
    [
        ("Llama-3.1-8B", (1, 3, 1), "got embed_tokens/embedding of shape (128256, 4096) over"),
        ("Gemma-3-270M", (1, 256, 1), "expected 640 to be a multiple of 256"),
        ("Gemma-3-27B", (1, 1, 128), "expected 262208 to be a multiple of 128"),
        ("Qwen2.5-0.5B", (1, 512, 1), "expected 896 to be a multiple of 512"),
        ("OLMo-2-32B", (1, 1, 4096), "expected 100352 to be a multiple of 4096"),
    ],
)
def test_a_mesh_that_does_not_divide_a_tensor_names_it_and_the_sizes(name, axes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        param_shardings(base_params(name), AbstractMesh(axes, AXES))
    assert "change the mesh, or give this path a rule" in str(caught.value)


# ------------------------------------------------------------------------------------ golden trees


def described(params: Any) -> str:
    """One line per leaf: path, dtype and shape, and whether it trains."""
    mask = jax.tree.leaves(trainable_mask(params))
    lines = []
    for (path, leaf), trains in zip(jax.tree_util.tree_leaves_with_path(params), mask, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert trains == (name.rpartition("/")[2] in TRAINABLE_FIELDS)
        shape = f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"
        lines.append(f"{name:44} {shape}{'  trained' if trains else ''}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("Llama-3.2-1B", "blocks"),
        ("Llama-3.2-1B", "bands"),
        ("Gemma-3-1B", "blocks"),
        ("Qwen2.5-7B", "blocks"),
        ("OLMo-2-32B", "blocks"),
    ],
)
def test_the_adapted_tree_is_the_golden_one(name, adapter):
    params = apply_smoa(base_params(name), ADAPTERS[adapter], jax.random.key(0))
    golden = GOLDEN / f"{name.lower()}_{adapter}.txt"
    assert described(params) == golden.read_text()
