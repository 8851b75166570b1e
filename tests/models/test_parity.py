"""The decoder and its generation against transformers' Llama, weights converted here by hand.

Each option has a negative control: without it the logits must differ.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.models.config import DecoderConfig, RopeScaling
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.generation import GenerationConfig, generate
from tests.models import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

BASE = DecoderConfig(
    vocab_size=40,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=24,
    rope_base=10000.0,
    norm_epsilon=1e-5,
    tie_embeddings=False,
    max_positions=128,
)
LLAMA3 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=16,
)
TOKENS = tiny.tokens(2, 24, seed=5, vocab_size=40)


def theirs(config: DecoderConfig, seed: int = 0):
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scaling.kind == "linear":
        rope |= {"rope_type": "linear", "factor": config.rope_scaling.factor}
    elif config.rope_scaling.kind == "llama3":
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.embed_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.mlp_dim,
            rms_norm_eps=config.norm_epsilon,
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=config.max_positions,
            rope_parameters=rope,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.eval()


def converted(model, config: DecoderConfig) -> dict:
    """Our tree from their state: kernels turned to (inputs, outputs), layers stacked."""
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}

    def stacked(name: str, transpose: bool) -> np.ndarray:
        layers = [state[f"model.layers.{i}.{name}.weight"] for i in range(config.num_layers)]
        return np.stack([layer.T if transpose else layer for layer in layers])

    def kernels(module: str, names: str) -> dict:
        return {
            f"{name}_proj": {"kernel": stacked(f"{module}.{name}_proj", True)}
            for name in names.split()
        }

    norms = ("input_layernorm", "post_attention_layernorm")
    tree = {
        "embed_tokens": {"embedding": state["model.embed_tokens.weight"]},
        "layers": {
            "self_attn": kernels("self_attn", "q k v o"),
            "mlp": kernels("mlp", "gate up down"),
            **{name: {"scale": stacked(name, False)} for name in norms},
        },
        "norm": {"scale": state["model.norm.weight"]},
    }
    if not config.tie_embeddings:
        tree["lm_head"] = {"kernel": state["lm_head.weight"].T}
    return tree


def our_logits(config: DecoderConfig, params: dict) -> np.ndarray:
    return np.asarray(tiny.apply(Decoder(config, dtype=jnp.float32), params, TOKENS))


def turned(params: dict) -> dict:
    """The same weights with the key heads exchanged: another grouping of the query heads."""
    attention = dict(params["layers"]["self_attn"])
    for name in ("k_proj", "v_proj"):
        attention[name] = {"kernel": np.roll(attention[name]["kernel"], 4, axis=-1)}
    return {**params, "layers": {**params["layers"], "self_attn": attention}}


# What the option is; what makes it; what the decoder would compute without it.
CASES = {
    "grouped": ({}, lambda config, params: (config, turned(params))),
    "multi_head": (
        {"num_kv_heads": 4},
        lambda config, params: (config, turned(params)),
    ),
    "tied": (
        {"tie_embeddings": True},
        lambda config, params: (
            dataclasses.replace(config, tie_embeddings=False),
            {**params, "lm_head": {"kernel": params["embed_tokens"]["embedding"].T[::-1]}},
        ),
    ),
    "untied": (
        {"tie_embeddings": False},
        lambda config, params: (
            dataclasses.replace(config, tie_embeddings=True),
            {name: part for name, part in params.items() if name != "lm_head"},
        ),
    ),
    "head_dim": (
        {"head_dim": 6},
        # Another head size takes other columns of the same kernels: heads of 12 here.
        lambda config, params: (
            dataclasses.replace(config, head_dim=12, num_heads=2, num_kv_heads=1),
            params,
        ),
    ),
    "rope_base": (
        {"rope_base": 500.0},
        lambda config, params: (dataclasses.replace(config, rope_base=10000.0), params),
    ),
    "norm_epsilon": (
        {"norm_epsilon": 0.1},
        lambda config, params: (dataclasses.replace(config, norm_epsilon=1e-5), params),
    ),
    "llama3": (
        {"rope_scaling": LLAMA3, "head_dim": 8},
        lambda config, params: (dataclasses.replace(config, rope_scaling=RopeScaling()), params),
    ),
    "linear": (
        {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
        lambda config, params: (dataclasses.replace(config, rope_scaling=RopeScaling()), params),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_transformers(case):
    changes, without = CASES[case]
    config = dataclasses.replace(BASE, **changes)
    model = theirs(config)
    params = converted(model, config)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(our_logits(config, params), expected, atol=1e-4)
    assert np.abs(our_logits(*without(config, params)) - expected).max() > 1e-2


def their_new_tokens(model, prompt: np.ndarray, eos_ids: list[int] | None, **options):
    text = torch.tensor(prompt[None]).long()
    made = model.generate(
        text,
        attention_mask=torch.ones_like(text),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=eos_ids,
        pad_token_id=0,
        **options,
    )
    return made[0, len(prompt) :].tolist()


def new_tokens(result, row: int) -> list[int]:
    return np.asarray(result.tokens)[row, : int(result.lengths[row])].tolist()


@pytest.mark.parametrize("eos_ids", [(), (3, 9, 11, 14, 17, 20, 23)])
def test_greedy_generation_equals_transformers(eos_ids):
    model = theirs(BASE)
    config = GenerationConfig(max_new_tokens=10, eos_ids=eos_ids)
    lengths = [24, 5]
    result = generate(
        Decoder(BASE, dtype=jnp.float32), converted(model, BASE), TOKENS, lengths, config
    )
    for row, length in enumerate(lengths):
        expected = their_new_tokens(model, TOKENS[row, :length], list(eos_ids) or None)
        assert new_tokens(result, row) == expected
    assert bool(result.finished.any()) == bool(eos_ids)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_search_equals_transformers(length_penalty):
    model = theirs(BASE)
    eos_ids = (3, 9, 11, 14, 17, 20, 23)
    config = GenerationConfig(
        max_new_tokens=10, eos_ids=eos_ids, num_beams=3, length_penalty=length_penalty
    )
    lengths = [24, 5]
    result = generate(
        Decoder(BASE, dtype=jnp.float32), converted(model, BASE), TOKENS, lengths, config
    )
    for row, length in enumerate(lengths):
        expected = their_new_tokens(
            model,
            TOKENS[row, :length],
            list(eos_ids),
            num_beams=3,
            length_penalty=length_penalty,
            early_stopping="never",
        )
        assert new_tokens(result, row) == expected
