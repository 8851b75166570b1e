"""What the checkpoints of every family are held to, and other weights to hold them with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.models.decoder import Decoder
from smoa_jax.models.generation import GenerationConfig, generate

torch = pytest.importorskip("torch")


def scaled(params):
    """Other weights of the same model, as training would give."""
    return jax.tree.map(lambda leaf: leaf * 1.1, params)


def check_prompts_of_several_lengths(model, base) -> None:
    """In one batch they continue as transformers continues each alone."""
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
