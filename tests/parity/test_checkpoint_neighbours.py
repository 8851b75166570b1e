"""Checkpoints of Llama's neighbours give transformers' logits, one option at a time.

Each option has a negative control: the same weights read without it must give other logits.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.merge import merge_smoa
from smoa_jax.adapter.tree import apply_smoa
from smoa_jax.adapter.types import is_modulation
from smoa_jax.checkpoint.base import load_base, open_base
from smoa_jax.checkpoint.export.huggingface import export_huggingface, export_stored
from smoa_jax.checkpoint.export.merged import MergedReader
from smoa_jax.checkpoint.native.directory import open_adapter, save_adapter
from smoa_jax.models.config import RopeScaling
from tests.parity.shared import check_prompts_of_several_lengths, scaled
from tests.parity.test_checkpoint_llama import difference, our_logits, torch_logits, without

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM"),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM"),
}
NEIGHBOURS = tuple(CLASSES)[1:]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
#: What makes a family itself, where the defaults of its class don't at this size.
OWN = {
    "llama": {},
    "mistral": {"sliding_window": 8, "head_dim": 20},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "smollm3": {"num_hidden_layers": 5, "tie_word_embeddings": False},
    "olmo2": {"num_key_value_heads": 4},
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def torch_model(family: str, seed: int = 0, **options):
    torch.manual_seed(seed)
    config, model = (getattr(transformers, name) for name in CLASSES[family])
    fields = {**SIZES, **OWN[family], **options}
    made = model(config(**fields, attn_implementation="eager"))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("norm.weight"):  # all ones at first, which would hide a missing one
                weight.uniform_(0.5, 1.5)
            if name.endswith("bias"):  # all zeros at first
                weight.normal_(std=0.5)
    return made.eval()


def one_weight_for_all_heads(model) -> None:
    """Make OLMo 2's norms such that norms of each head could have the same weights."""
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.copy_(norm.weight[:12].repeat(len(norm.weight) // 12))


# ------------------------------------------------------------------------------------- controls


def changed(**changes):
    """A control: the same weights under a config that has lost an option."""
    return lambda base: without(base, **changes)


def replaced(base, module: str, name: str, value):
    """The logits with one array of the stack replaced by what ``value`` makes of it."""
    layers = jax.tree.map(lambda leaf: leaf, base.params["layers"])
    node = layers
    for key in module.split("."):
        node = node[key]
    node[name] = value(node[name])
    return our_logits({**base.params, "layers": layers}, base.config)


def lost_norm(module: str):
    """A control: the same weights with one norm scaling by one."""
    return lambda base: replaced(base, module, "scale", jnp.ones_like)


def lost_bias(module: str):
    """A control: the same weights with one bias at 0."""
    return lambda base: replaced(base, module, "bias", jnp.zeros_like)


def normed_before(base):
    """OLMo 2 as another would have it: norms on the inputs, too."""
    layers = jax.tree.map(lambda leaf: leaf, base.params["layers"])
    for name in ("input_layernorm", "pre_feedforward_layernorm"):
        layers[name] = {"scale": jnp.ones((base.config.num_layers, base.config.embed_dim))}
    config = dataclasses.replace(base.config, pre_norms=True)
    return our_logits({**base.params, "layers": layers}, config)


def normed_by_head(base):
    """OLMo 2 with norms of each head in place of those over all of them."""
    layers = jax.tree.map(lambda leaf: leaf, base.params["layers"])
    for name in ("q_norm", "k_norm"):
        norm = layers["self_attn"][name]
        norm["scale"] = norm["scale"][:, : base.config.head_dim]
    config = dataclasses.replace(base.config, qk_norm=True, wide_qk_norm=False)
    return our_logits({**base.params, "layers": layers}, config)


def other_head(base):
    params = {key: part for key, part in base.params.items() if key != "lm_head"}
    return our_logits(params, dataclasses.replace(base.config, tie_embeddings=True))


def other_embedding(base):
    head = jnp.roll(base.params["embed_tokens"]["embedding"], 1, axis=0).T
    config = dataclasses.replace(base.config, tie_embeddings=False)
    return our_logits({**base.params, "lm_head": {"kernel": head}}, config)


EVERYWHERE = {"local_layers": (True,) * 3, "sliding_window": 8}
BIASES = {"attention_bias": True, "mlp_bias": True}
OPTIONS = {
    **{
        f"llama-{module}_bias": ("llama", BIASES, lost_bias(f"{part}.{module}_proj"))
        for part, module in (("self_attn", "q"), ("self_attn", "o"), ("mlp", "up"))
    },
    "mistral-window": ("mistral", {}, changed(sliding_window=5)),
    "mistral-all_layers": ("mistral", {}, changed(local_layers=(True, False, True))),
    "mistral-no_window": ("mistral", {"sliding_window": None}, changed(**EVERYWHERE)),
    "mistral-head_dim": ("mistral", {}, changed(query_scale=0.1)),
    "mistral-rope_theta": (
        "mistral",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        changed(rope_base=10000.0),
    ),
    **{f"qwen2-{name}_bias": ("qwen2", {}, lost_bias(f"self_attn.{name}_proj")) for name in "qkv"},
    "qwen2-first_window": ("qwen2", {}, changed(**EVERYWHERE)),
    "qwen2-window": ("qwen2", {}, changed(sliding_window=5)),
    "qwen2-window_off": ("qwen2", {"use_sliding_window": False}, changed(**EVERYWHERE)),
    "qwen2-layer_types": (
        "qwen2",
        {"layer_types": [LOCAL, GLOBAL, LOCAL]},
        changed(local_layers=(False, True, True)),
    ),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}, other_embedding),
    "qwen3-q_norm": ("qwen3", {}, lost_norm("self_attn.q_norm")),
    "qwen3-k_norm": ("qwen3", {}, lost_norm("self_attn.k_norm")),
    "qwen3-no_offset": ("qwen3", {}, changed(norm_offset=1.0)),
    "qwen3-rope_theta": ("qwen3", {}, changed(rope_base=10000.0)),
    "qwen3-default_head_dim": ("qwen3", {"head_dim": 128}, changed(query_scale=12**-0.5)),
    "qwen3-o_bias": ("qwen3", {"attention_bias": True}, lost_bias("self_attn.o_proj")),
    "qwen3-k_bias": ("qwen3", {"attention_bias": True}, lost_bias("self_attn.k_proj")),
    "qwen3-windows": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 7, "layer_types": [GLOBAL, LOCAL, LOCAL]},
        changed(local_layers=(False, False, True)),
    ),
    "qwen3-linear_rope": (
        "qwen3",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0}},
        changed(rope_scaling=RopeScaling()),
    ),
    "smollm3-fourth_layer": ("smollm3", {}, changed(rope_layers=())),
    "smollm3-which_layer": (
        "smollm3",
        {},
        changed(rope_layers=(True, True, False, True, True)),
    ),
    "smollm3-interval": (
        "smollm3",
        {"no_rope_layer_interval": 2},
        changed(rope_layers=(True, True, True, False, True)),
    ),
    "smollm3-listed": (
        "smollm3",
        {"no_rope_layers": [0, 1, 1, 0, 1]},
        changed(rope_layers=(True, True, True, False, True)),
    ),
    "smollm3-windows": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 2},
        changed(local_layers=(False, True, False, False, True)),
    ),
    "smollm3-layer_types": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": [LOCAL] * 2 + [GLOBAL] * 3,
        },
        changed(local_layers=(False, True, False, False, False)),
    ),
    **{
        f"smollm3-{module}_bias": ("smollm3", BIASES, lost_bias(f"{part}.{module}_proj"))
        for part, module in (("self_attn", "v"), ("mlp", "gate"), ("mlp", "down"))
    },
    "smollm3-tied": ("smollm3", {"tie_word_embeddings": True}, other_embedding),
    "olmo2-q_norm": ("olmo2", {}, lost_norm("self_attn.q_norm")),
    "olmo2-k_norm": ("olmo2", {}, lost_norm("self_attn.k_norm")),
    "olmo2-over_all_heads": ("olmo2", {}, normed_by_head),
    "olmo2-over_all_groups": ("olmo2", {"num_key_value_heads": 2}, normed_by_head),
    "olmo2-inputs_as_they_are": ("olmo2", {}, normed_before),
    "olmo2-post_norm": ("olmo2", {}, lost_norm("post_attention_layernorm")),
    "olmo2-post_mlp_norm": ("olmo2", {}, lost_norm("post_feedforward_layernorm")),
    "olmo2-o_bias": ("olmo2", {"attention_bias": True}, lost_bias("self_attn.o_proj")),
    "olmo2-untied": ("olmo2", {}, other_head),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_agree_with_transformers_and_need_the_option(tmp_path, option, record_property):
    family, options, control = OPTIONS[option]
    model = torch_model(family, **options)
    if control is normed_by_head:
        one_weight_for_all_heads(model)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    wanted = torch_logits(model)
    error = difference(our_logits(base.params, base.config), wanted)
    record_property("error", error)
    assert error < 1e-4
    assert difference(control(base), wanted) > 1e-2


@pytest.mark.parametrize("family", NEIGHBOURS)
def test_prompts_of_several_lengths_in_one_batch_equal_transformers_one_by_one(tmp_path, family):
    model = torch_model(family)
    model.save_pretrained(tmp_path)
    check_prompts_of_several_lengths(model, load_base(tmp_path))


@pytest.mark.parametrize("from_source", [True, False])
@pytest.mark.parametrize(
    "option",
    [
        *("llama-o_bias", "mistral-window", "qwen2-first_window", "qwen2-window_off"),
        *("qwen3-windows", "qwen3-o_bias", "smollm3-listed", "smollm3-windows"),
        *("smollm3-down_bias", "smollm3-tied", "olmo2-o_bias", "olmo2-over_all_groups"),
    ],
)
def test_an_exported_model_is_opened_by_transformers(tmp_path, option, from_source):
    family, options, _ = OPTIONS[option]
    model = torch_model(family, **options)
    model.save_pretrained(tmp_path / "source")
    base = load_base(tmp_path / "source")
    changed = scaled(base.params)
    export_huggingface(
        changed,
        base.config,
        tmp_path / "out",
        dtype=jnp.float32,
        hf_config=base.hf_config if from_source else None,
        generation_config=base.generation_config if from_source else None,
        max_shard_bytes=30_000,
    )
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", pad_token_id=None
    ).eval()
    assert type(opened) is type(model)
    assert difference(torch_logits(opened), our_logits(changed, base.config)) < 1e-4
    assert difference(torch_logits(opened), torch_logits(model)) > 1e-2
    tied = opened.lm_head.weight is opened.model.embed_tokens.weight
    assert tied == base.config.tie_embeddings


def test_a_mistral_without_a_window_is_exported_as_the_llama_that_it_is(tmp_path):
    model = torch_model("mistral", sliding_window=None)
    model.save_pretrained(tmp_path / "source")
    base = load_base(tmp_path / "source")
    export_huggingface(base.params, base.config, tmp_path / "out", dtype=jnp.float32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert difference(torch_logits(opened), torch_logits(model)) < 1e-4


@pytest.mark.parametrize(("family", "options"), [("smollm3", BIASES), ("qwen2", {}), ("olmo2", {})])
def test_a_merge_leaves_biases_and_norms_as_they_are_on_the_host_as_in_memory(
    tmp_path, family, options
):
    torch_model(family, **options).save_pretrained(tmp_path / "source")
    base = load_base(tmp_path / "source")
    config = SmoaConfig(rank=6, num_subspaces=2, target_modules="all-linear")
    params = jax.tree.map(
        lambda node: dataclasses.replace(node, b=node.b + 0.1) if is_modulation(node) else node,
        apply_smoa(base.params, config, jax.random.key(0)),
        is_leaf=is_modulation,
    )
    known = {"base_fingerprint": base.fingerprint, "base_name": "tiny"}
    save_adapter(params, config, tmp_path / "adapter", **known)
    settings = {"dtype": jnp.float32, "hf_config": base.hf_config}
    export_huggingface(merge_smoa(params), base.config, tmp_path / "memory", **settings)
    stored = open_base(tmp_path / "source")
    found, _ = open_adapter(
        tmp_path / "adapter", stored.params, base_fingerprint=stored.fingerprint
    )
    reader = MergedReader(stored, found, config)
    export_stored(reader, stored.slots, stored.config, tmp_path / "disk", **settings)
    before, memory, disk = (
        load_file(tmp_path / name / "model.safetensors") for name in ("source", "memory", "disk")
    )
    assert before.keys() == memory.keys() == disk.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(memory[name], disk[name])
        assert np.array_equal(values, disk[name]) != name.endswith("_proj.weight"), name


def test_a_file_without_the_biases_that_its_config_promises_is_refused(tmp_path):
    torch_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    with pytest.raises(ValueError, match=r"missing tensor model.layers.0.self_attn.q_proj.bias"):
        load_base(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "olmo2"}))
    with pytest.raises(ValueError, match=r"missing tensor model.layers.0.self_attn.q_norm.weight"):
        load_base(tmp_path)
