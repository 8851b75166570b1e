"""Rotary position embeddings (arXiv 2104.09864), in Hugging Face's half-split layout.

Everything here is float32 whatever the compute dtype: bf16 cannot tell position 257 from 256.
The tables are made once for all layers. There is no matrix product whose precision could matter.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from smoa_jax.models.config import DecoderConfig, RopeScaling

#: Cosines and sines, each ``[B, T, 1, P]`` for the P = H/2 pairs of a head's dimensions.
RopeTables: TypeAlias = tuple[Float[Array, "B T 1 P"], Float[Array, "B T 1 P"]]


def rope_frequencies(head_dim: int, base: float, scaling: RopeScaling) -> Float[np.ndarray, " P"]:
    """Return the angle per position of each of the P = H/2 pairs, in radians."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = base**-exponents
    if scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "llama3":
        # The share of the unscaled frequency grows from 0 to 1 with the number of whole turns
        # within the original context, between the low and the high factor.
        turns = scaling.original_max_positions * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        unscaled = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (unscaled + (1 - unscaled) / scaling.factor)
    elif scaling.kind == "proportional":
        turning = np.arange(len(frequencies)) < int(scaling.rotated_share * head_dim // 2)
        frequencies = np.where(turning, frequencies / scaling.factor, 0.0)
    return frequencies.astype(np.float32)


def rope_tables(config: DecoderConfig, positions: Int[Array, "B T"]) -> RopeTables:
    """Return the cosines and sines of every position in all layers but the local ones, if these
    turn otherwise; ready to broadcast over heads."""
    head_dim = config.global_head_dim or config.head_dim
    frequencies = rope_frequencies(head_dim, config.rope_base, config.rope_scaling)
    return _tables(frequencies, positions)


def local_rope_tables(config: DecoderConfig, positions: Int[Array, "B T"]) -> RopeTables | None:
    """Return those of the local layers; None where they turn as the others do."""
    if not config.local_rope_base:
        return None
    frequencies = rope_frequencies(config.head_dim, config.local_rope_base, RopeScaling())
    return _tables(frequencies, positions)


def turned_where(turns: Bool[Array, ""], tables: RopeTables) -> RopeTables:
    """Return the tables of a layer that turns, and for one that doesn't those that change nothing.

    Data, not a branch, so that a scan over layers may decide it.
    """
    cosine, sine = tables
    return jnp.where(turns, cosine, 1.0), jnp.where(turns, sine, 0.0)


def _tables(frequencies: np.ndarray, positions: jax.Array) -> RopeTables:
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "B T N H"], tables: RopeTables) -> Float[Array, "B T N H"]:
    """Turn each pair (x_i, x_{i + H/2}) by its angle; float32 inside, x's dtype outside."""
    cosine, sine = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )
    return jax.lax.convert_element_type(turned, x.dtype)
