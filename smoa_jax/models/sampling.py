"""Choosing the next token from logits: the best one, or a draw from a truncated distribution.

A row's draw depends on its own key alone, so it is the same in any batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def truncated_logits(
    logits: Float[Array, "B V"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Float[Array, "B V"]:
    """Return the logits at a temperature, -inf outside of the ``top_k`` best and of the nucleus.

    The nucleus (arXiv 1904.09751) is the smallest set of best tokens with at least ``top_p`` of the
    probability that ``top_k`` leaves. ``top_k`` 0 and ``top_p`` 1 leave everything. Tokens as
    likely as the last one kept are kept too.
    """
    logits = logits / temperature
    descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    ranks = jnp.arange(logits.shape[-1])[None, :]
    kept = (ranks < top_k) | (top_k == 0)
    probabilities = jax.nn.softmax(jnp.where(kept, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = kept & ((before < top_p) | (top_p >= 1.0))
    lowest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def row_keys(key: Key[Array, ""], num_rows: int) -> Key[Array, " B"]:
    """Return one key per row of a batch."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(num_rows))


def sample(
    keys: Key[Array, " B"], step: Int[Array, ""], logits: Float[Array, "B V"]
) -> Int[Array, " B"]:
    """Draw one token a row."""
    return jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))(
        keys, logits
    ).astype(jnp.int32)


def is_any_of(tokens: Int[Array, " *B"], ids: Int[Array, " E"]) -> Bool[Array, " *B"]:
    """Return where a token is one of the ids."""
    shape = (1,) * tokens.ndim + ids.shape
    return jnp.any(tokens[..., None] == ids.reshape(shape), axis=-1)
