"""Checkpoints written by transformers give transformers' logits, one option at a time.

Each option has a negative control: the same weights read without it must give other logits, or the
test would pass for a decoder that ignores the option.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.checkpoint.base import BaseModel, load_base
from smoa_jax.checkpoint.export.huggingface import export_huggingface
from smoa_jax.models.config import DecoderConfig, RopeScaling
from smoa_jax.models.decoder import Decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))


def torch_model(seed: int = 0, **options):
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **options}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):  # all ones at first, which would hide a missing one
                weight.uniform_(0.5, 1.5)
    return model.eval()


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def our_logits(params, config: DecoderConfig) -> np.ndarray:
    model = Decoder(config, dtype=jnp.float32)
    return np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(TOKENS)))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


def without(base: BaseModel, **changes):
    """The logits of the same weights under a config that has lost an option."""
    return our_logits(base.params, dataclasses.replace(base.config, **changes))


def repeat_heads_wrongly(base: BaseModel) -> np.ndarray:
    """The logits when query heads meet the key heads in turn, not in groups."""
    params = jax.tree.map(lambda leaf: leaf, base.params)
    for name in ("q_proj", "o_proj"):
        kernel = params["layers"]["self_attn"][name]["kernel"]
        axis = 2 if name == "q_proj" else 1
        parts = jnp.split(kernel, base.config.num_heads, axis)
        params["layers"]["self_attn"][name]["kernel"] = jnp.concatenate(
            [*parts[::2], *parts[1::2]], axis
        )
    return our_logits(params, base.config)


def other_head(base: BaseModel) -> np.ndarray:
    """The logits when an untied head is forgotten for the embedding."""
    params = {key: value for key, value in base.params.items() if key != "lm_head"}
    return our_logits(params, dataclasses.replace(base.config, tie_embeddings=True))


def other_embedding(base: BaseModel) -> np.ndarray:
    """The logits when a tied head stays behind as the embedding changes."""
    embedding = base.params["embed_tokens"]["embedding"]
    params = {**base.params, "lm_head": {"kernel": jnp.roll(embedding, 1, axis=0).T}}
    return our_logits(params, dataclasses.replace(base.config, tie_embeddings=False))


def shuffled_layers(base: BaseModel) -> np.ndarray:
    """The logits when the layers come in another order than their files."""
    layers = jax.tree.map(lambda leaf: leaf[::-1], base.params["layers"])
    return our_logits({**base.params, "layers": layers}, base.config)


NO_SCALING = {"rope_scaling": RopeScaling()}
OPTIONS = {
    "multi_head": ({"num_key_value_heads": 4}, shuffled_layers),
    "grouped_query": ({}, repeat_heads_wrongly),
    "one_key_head": ({"num_key_value_heads": 1}, shuffled_layers),
    "tied": ({"tie_word_embeddings": True}, other_embedding),
    "untied": ({"tie_word_embeddings": False}, other_head),
    "head_dim": ({"head_dim": 20}, shuffled_layers),
    "rope_theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        lambda base: without(base, rope_base=10000.0),
    ),
    "norm_epsilon": ({"rms_norm_eps": 0.1}, lambda base: without(base, norm_epsilon=1e-6)),
    "linear_rope": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        lambda base: without(base, **NO_SCALING),
    ),
    "llama3_rope": (
        {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}},
        lambda base: without(base, **NO_SCALING),
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_agree_with_transformers_and_need_the_option(tmp_path, option):
    options, control = OPTIONS[option]
    model = torch_model(**options)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    wanted = torch_logits(model)
    assert difference(our_logits(base.params, base.config), wanted) < 1e-4
    assert difference(control(base), wanted) > 1e-2


def test_several_shards_written_by_transformers_give_the_same_logits(tmp_path):
    model = torch_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    base = load_base(tmp_path)
    assert difference(our_logits(base.params, base.config), torch_logits(model)) < 1e-4
    other = our_logits(base.params, base.config) - torch_logits(torch_model(seed=1))
    assert np.abs(other).max() > 1e-2  # other weights of the same config do differ


def test_bfloat16_checkpoints_are_the_weights_that_torch_holds(tmp_path):
    model = torch_model()
    exact = torch_logits(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    base = load_base(tmp_path)
    # Opened anew: converting the model itself would leave its rotary frequencies rounded.
    wanted = torch_logits(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    )
    assert difference(our_logits(base.params, base.config), wanted) < 1e-4
    assert difference(exact, wanted) > 1e-3


@pytest.mark.parametrize("option", ["tied", "untied", "linear_rope", "llama3_rope"])
@pytest.mark.parametrize("from_source", [True, False])
def test_an_exported_model_is_opened_by_transformers(tmp_path, option, from_source):
    model = torch_model(**OPTIONS[option][0])
    model.save_pretrained(tmp_path / "source")
    base = load_base(tmp_path / "source")
    changed = jax.tree.map(lambda leaf: leaf * 1.1, base.params)
    export_huggingface(
        changed,
        base.config,
        tmp_path / "out",
        dtype=jnp.float32,
        hf_config=base.hf_config if from_source else None,
        generation_config=base.generation_config if from_source else None,
        max_shard_bytes=30_000,
    )
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert opened.dtype == torch.float32
    assert difference(torch_logits(opened), our_logits(changed, base.config)) < 1e-4
    assert difference(torch_logits(opened), torch_logits(model)) > 1e-2
    tied = opened.lm_head.weight is opened.model.embed_tokens.weight
    assert tied == (option == "tied")


def test_an_exported_bfloat16_model_is_opened_as_bfloat16(tmp_path):
    torch_model().save_pretrained(tmp_path / "source")
    base = load_base(tmp_path / "source", jnp.bfloat16)
    export_huggingface(base.params, base.config, tmp_path / "out", dtype=jnp.bfloat16)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert opened.dtype == torch.bfloat16
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base.params)
    wanted = our_logits(wide, base.config)
    assert difference(torch_logits(opened.to(torch.float32)), wanted) < 1e-4
