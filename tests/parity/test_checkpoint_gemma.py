"""Gemma checkpoints written by transformers give transformers' logits, one option at a time.

Each option has a negative control: the same weights read without it must give other logits.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.checkpoint.base import load_base
from smoa_jax.models.config import RopeScaling
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.generation import GenerationConfig, generate
from tests.parity.test_checkpoint_llama import (
    difference,
    our_logits,
    torch_logits,
    without,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

CLASSES = {
    "gemma": ("GemmaConfig", "GemmaForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
WINDOWS = {
    "sliding_window": 8,
    "query_pre_attn_scalar": 40,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
ROPE3 = {
    "full_attention": {"rope_type": "default", "rope_theta": 2000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}


def torch_model(family: str, seed: int = 0, **options):
    torch.manual_seed(seed)
    config, model = (getattr(transformers, name) for name in CLASSES[family])
    fields = SIZES if family == "gemma" else {**SIZES, **WINDOWS}
    if family == "gemma3":
        fields = {**fields, "rope_parameters": {k: dict(v) for k, v in ROPE3.items()}}
    made = model(config(**{**fields, **options}, attn_implementation="eager"))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("norm.weight"):  # all zeros at first, which would hide a missing one
                weight.uniform_(-0.5, 0.5)
    return made.eval()


def changed(**changes):
    """A control: the same weights under a config that has lost an option."""
    return lambda base: without(base, **changes)


def lost_norm(name: str):
    """A control: the same weights with one norm scaling by one."""

    def control(base):
        layers = dict(base.params["layers"])
        part = layers
        if name in ("q_norm", "k_norm"):
            part = layers["self_attn"] = dict(layers["self_attn"])
        part[name] = {"scale": jnp.zeros_like(part[name]["scale"])}
        return our_logits({**base.params, "layers": layers}, base.config)

    return control


LINEAR3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
OPTIONS = {
    "gemma-embed_scale": ("gemma", {}, changed(embed_scale=1.0)),
    "gemma-norm_offset": ("gemma", {}, changed(norm_offset=0.0)),
    "gemma-activation": ("gemma", {}, changed(activation="silu")),
    "gemma-head_dim": ("gemma", {"head_dim": 20}, changed(query_scale=0.1)),
    "gemma-rope_base": (
        "gemma",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        changed(rope_base=10000.0),
    ),
    "gemma2-soft_cap": (
        "gemma2",
        {"attn_logit_softcapping": 3.0, "final_logit_softcapping": None},
        changed(attention_soft_cap=0.0),
    ),
    "gemma2-final_soft_cap": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": 5.0},
        changed(final_soft_cap=0.0),
    ),
    "gemma2-window": ("gemma2", {}, changed(sliding_window=3)),
    "gemma2-which_layers": ("gemma2", {}, changed(local_layers=(False, True, False))),
    "gemma2-default_layers": (
        "gemma2",
        {"layer_types": None},
        changed(local_layers=(False, True, False)),
    ),
    "gemma2-query_scale": ("gemma2", {}, changed(query_scale=0.0)),
    "gemma2-post_norm": ("gemma2", {}, lost_norm("post_attention_layernorm")),
    "gemma2-post_mlp_norm": ("gemma2", {}, lost_norm("post_feedforward_layernorm")),
    "gemma2-pre_mlp_norm": ("gemma2", {}, lost_norm("pre_feedforward_layernorm")),
    "gemma3-q_norm": ("gemma3", {}, lost_norm("q_norm")),
    "gemma3-k_norm": ("gemma3", {}, lost_norm("k_norm")),
    "gemma3-local_rope": ("gemma3", {}, changed(local_rope_base=0.0)),
    "gemma3-global_rope": ("gemma3", {}, changed(rope_base=1e6)),
    "gemma3-window": ("gemma3", {}, changed(sliding_window=3)),
    "gemma3-pattern": (
        "gemma3",
        {"layer_types": None, "num_hidden_layers": 7, "sliding_window_pattern": 3},
        changed(local_layers=(True,) * 5 + (False, True)),
    ),
    "gemma3-linear_rope": (
        "gemma3",
        {"rope_parameters": LINEAR3},
        changed(rope_scaling=RopeScaling()),
    ),
    "gemma3-final_soft_cap": (
        "gemma3",
        {"final_logit_softcapping": 5.0},
        changed(final_soft_cap=0.0),
    ),
    "gemma3-untied": (
        "gemma3",
        {"tie_word_embeddings": False},
        lambda base: our_logits(
            {key: part for key, part in base.params.items() if key != "lm_head"},
            dataclasses.replace(base.config, tie_embeddings=True),
        ),
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_agree_with_transformers_and_need_the_option(tmp_path, option):
    family, options, control = OPTIONS[option]
    model = torch_model(family, **options)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    wanted = torch_logits(model)
    assert difference(our_logits(base.params, base.config), wanted) < 1e-4
    assert difference(control(base), wanted) > 1e-2


@pytest.mark.parametrize("family", CLASSES)
def test_prompts_of_several_lengths_in_one_batch_equal_transformers_one_by_one(tmp_path, family):
    model = torch_model(family)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    lengths = [24, 13, 5]
    prompts = np.random.default_rng(1).integers(0, 96, (3, 24))
    made = generate(
        Decoder(base.config, dtype=jnp.float32),
        base.params,
        prompts,
        lengths,
        GenerationConfig(max_new_tokens=10),
    )
    for row, length in enumerate(lengths):
        text = torch.tensor(prompts[row : row + 1, :length])
        wanted = model.generate(
            text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert np.asarray(made.tokens)[row].tolist() == wanted[0, length:].tolist()
