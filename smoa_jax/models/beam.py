"""Beam search as one loop of fixed shapes.

Each row keeps the K best unfinished continuations and a pool of the K best finished ones. A
finished continuation of n tokens, EOS included, is worth its log-probability divided by
``n ** length_penalty``; it enters the pool if it is among the K best candidates of its step. A row
is settled when none of its unfinished continuations could still displace one of a full pool;
settled rows cannot change, so a row's result does not depend on its batch. What is unfinished when
the tokens run out competes with the pool.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smoa_jax.models.cache import KVCache, select_rows
from smoa_jax.models.sampling import is_any_of

#: Logits of the next token after one more token a row, and the cache that then holds it.
NextLogits = Callable[[jax.Array, KVCache], tuple[jax.Array, KVCache]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Beams:
    """The K unfinished and the K finished continuations of every row, best first."""

    tokens: Int[Array, "B K T"]
    scores: Float[Array, "B K"]  # log-probabilities; -inf where there is none
    pool_tokens: Int[Array, "B K T"]
    pool_scores: Float[Array, "B K"]  # divided by the length's power; -inf where there is none
    pool_lengths: Int[Array, "B K"]
    step: Int[Array, ""]  # tokens made so far


def beam_search(
    next_logits: NextLogits,
    logits: Float[Array, "B V"],
    cache: KVCache,
    *,
    num_beams: int,
    max_new_tokens: int,
    eos_ids: Int[Array, " E"],
    pad_id: Int[Array, ""],
    length_penalty: Float[Array, ""],
) -> tuple[Int[Array, "B T"], Int[Array, " B"], Bool[Array, " B"], Float[Array, " B"]]:
    """Return each row's best continuation, its length, whether it ended in EOS, and its worth.

    Args:
        next_logits: one step of the model on B * K rows.
        logits: of the first new token, one row per prompt.
        cache: of the prompts, B rows.
    """
    batch = logits.shape[0]
    beams = _no_beams(batch, num_beams, max_new_tokens, pad_id)
    first = jnp.broadcast_to(logits[:, None, :], (batch, num_beams, logits.shape[-1]))
    beams, _ = _extend(beams, first, eos_ids, length_penalty)
    cache = select_rows(cache, jnp.repeat(jnp.arange(batch), num_beams))

    def unsettled(state: tuple[Beams, KVCache]) -> jax.Array:
        beams, _ = state
        worth = _best_worth(beams, max_new_tokens, length_penalty)
        hopeful = worth > jnp.min(beams.pool_scores, axis=1)
        return (beams.step < max_new_tokens) & jnp.any(hopeful)

    def body(state: tuple[Beams, KVCache]) -> tuple[Beams, KVCache]:
        beams, cache = state
        last = jax.lax.dynamic_index_in_dim(beams.tokens, beams.step - 1, axis=2, keepdims=False)
        logits, cache = next_logits(last.reshape(-1), cache)
        logits = logits.reshape(batch, num_beams, -1)
        beams, parents = _extend(beams, logits, eos_ids, length_penalty)
        rows = jnp.arange(batch)[:, None] * num_beams + parents
        return beams, select_rows(cache, rows.reshape(-1))

    beams, _ = jax.lax.while_loop(unsettled, body, (beams, cache))
    return _best(beams, length_penalty)


def _no_beams(batch: int, num_beams: int, max_new_tokens: int, pad_id: jax.Array) -> Beams:
    blank = jnp.full((batch, num_beams, max_new_tokens), pad_id, jnp.int32)
    nothing = jnp.full((batch, num_beams), -jnp.inf, jnp.float32)
    return Beams(
        tokens=blank,
        scores=nothing.at[:, 0].set(0.0),
        pool_tokens=blank,
        pool_scores=nothing,
        pool_lengths=jnp.zeros((batch, num_beams), jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )


def _extend(
    beams: Beams,
    logits: Float[Array, "B K V"],
    eos_ids: Int[Array, " E"],
    length_penalty: Float[Array, ""],
) -> tuple[Beams, Int[Array, "B K"]]:
    """Take one token more; return the beams and, for each unfinished one, which it came from."""
    batch, num_beams, vocab = logits.shape
    totals = beams.scores[:, :, None] + jax.nn.log_softmax(logits, axis=-1)
    # Every beam may end in any EOS, and K unfinished candidates must still be among these.
    count = min((1 + eos_ids.shape[0]) * num_beams, num_beams * vocab)
    scores, chosen = jax.lax.top_k(totals.reshape(batch, -1), count)
    parents, last = chosen // vocab, (chosen % vocab).astype(jnp.int32)
    tokens = jnp.take_along_axis(beams.tokens, parents[:, :, None], axis=1)
    tokens = jax.lax.dynamic_update_index_in_dim(tokens, last, beams.step, axis=2)
    ended = is_any_of(last, eos_ids)

    may_finish = ended & (jnp.arange(count)[None, :] < num_beams)
    length = beams.step + 1
    worth = scores / length.astype(jnp.float32) ** length_penalty
    pool_scores = jnp.concatenate(
        [beams.pool_scores, jnp.where(may_finish, worth, -jnp.inf)], axis=1
    )
    pool_tokens = jnp.concatenate([beams.pool_tokens, tokens], axis=1)
    lengths = jnp.broadcast_to(length, (batch, count))
    pool_lengths = jnp.concatenate([beams.pool_lengths, lengths], axis=1)
    pool_scores, best = jax.lax.top_k(pool_scores, num_beams)

    scores, going = jax.lax.top_k(jnp.where(ended, -jnp.inf, scores), num_beams)
    extended = Beams(
        tokens=jnp.take_along_axis(tokens, going[:, :, None], axis=1),
        scores=scores,
        pool_tokens=jnp.take_along_axis(pool_tokens, best[:, :, None], axis=1),
        pool_scores=pool_scores,
        pool_lengths=jnp.take_along_axis(pool_lengths, best, axis=1),
        step=length,
    )
    return extended, jnp.take_along_axis(parents, going, axis=1)


def _best_worth(
    beams: Beams, max_new_tokens: int, length_penalty: Float[Array, ""]
) -> Float[Array, " B"]:
    """Return the most that a row's unfinished beams could still be worth: all EOS from now on."""
    length = jnp.where(length_penalty > 0, max_new_tokens, beams.step + 1).astype(jnp.float32)
    return beams.scores[:, 0] / length**length_penalty


def _best(
    beams: Beams, length_penalty: Float[Array, ""]
) -> tuple[Int[Array, "B T"], Int[Array, " B"], Bool[Array, " B"], Float[Array, " B"]]:
    worth = beams.scores[:, 0] / beams.step.astype(jnp.float32) ** length_penalty
    # Before the tokens have run out, every row is settled, and what is unfinished is no result.
    unfinished = jnp.where(beams.step == beams.tokens.shape[2], worth, -jnp.inf)
    finished = beams.pool_scores[:, 0] >= unfinished
    tokens = jnp.where(finished[:, None], beams.pool_tokens[:, 0], beams.tokens[:, 0])
    lengths = jnp.where(finished, beams.pool_lengths[:, 0], beams.step)
    return tokens, lengths, finished, jnp.maximum(beams.pool_scores[:, 0], unfinished)
