"""Cross-entropy over large vocabularies without ever holding ``[B, T, V]`` logits.

Logits exist for one chunk of positions at a time. Their gradient is taken in the same pass, while
they are at hand, so the head costs two products per chunk instead of three, and only the gradient
of the hidden states (and of an adapted head's factors) is kept.

The loss is a *sum* over weighted targets: means of means would be wrong under accumulation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

#: (trainable params, frozen params, hidden states [B, C, D], dropout key or None) -> float32 logits
#: [B, C, V].
LogitsFunction = Callable[[Any, Any, jax.Array, Any], jax.Array]


def summed_cross_entropy(
    logits_function: LogitsFunction,
    trainable: Any,
    frozen: Any,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Sum over targets of ``-weight * log p(target)``, in float32, ``chunk`` positions at a time.

    Differentiable in ``hidden`` and ``trainable``; ``frozen`` and the rest get no gradient.

    Args:
        logits_function: The model's head.
        trainable: Trained part of the params.
        frozen: The rest of them.
        hidden: Normed final hidden states.
        targets: Token ids.
        weights: 0 where a position does not count.
        chunk: Positions (of all rows) whose logits exist at a time, at least 1.
        dropout_key: For the head's own dropout; each chunk gets one folded from it.
    """
    chunk, *rows = whole_chunks(chunk, hidden, targets, weights)
    return _summed(logits_function, chunk, trainable, frozen, dropout_key, *rows)


def whole_chunks(chunk: int, *rows: jax.Array) -> tuple[Any, ...]:
    """A chunk no longer than the rows, and the rows filled up with zeros to a multiple of it."""
    length = rows[0].shape[1]
    chunk = min(chunk, length)
    padding = -length % chunk
    if padding:
        rows = tuple(
            jnp.pad(x, ((0, 0), (0, padding), *((0, 0) for _ in x.shape[2:]))) for x in rows
        )
    return chunk, *rows


def _chunk_loss(logits_function, frozen, trainable, key, hidden, targets, weights):
    logits = logits_function(trainable, frozen, hidden, key)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - chosen))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(logits_function, chunk, trainable, frozen, key, *rows):
    of_chunk = functools.partial(_chunk_loss, logits_function, frozen)
    return sum_over_chunks(of_chunk, chunk, trainable, key, *rows)


def _summed_forward(logits_function, chunk, trainable, frozen, key, *rows):
    of_chunk = functools.partial(_chunk_loss, logits_function, frozen)
    both = jax.value_and_grad(of_chunk, argnums=(0, 2))
    return sums_and_gradients_over_chunks(both, chunk, trainable, key, *rows)


def scaled_gradients(saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    """The backward pass of a loss whose forward pass took the gradients already.

    For ``(trainable, frozen, key, hidden, targets, weights)``.
    """
    gradient, of_hidden = saved
    of_trainable = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradient)
    return of_trainable, None, None, (of_hidden * cotangent).astype(of_hidden.dtype), None, None


def _summed_backward(logits_function, chunk, saved, cotangent):
    return scaled_gradients(saved, cotangent)


_summed.defvjp(_summed_forward, _summed_backward)


# ------------------------------------------------------------------------------ chunk after chunk


def sum_over_chunks(
    of_chunk: Callable[..., jax.Array],
    chunk: int,
    trainable: Any,
    key: jax.Array | None,
    *rows: jax.Array,
) -> jax.Array:
    """Sum of ``of_chunk(trainable, key, *rows)`` over chunks of the second axis of all rows."""

    def body(total, part):
        number, *rows = part
        return total + of_chunk(trainable, _chunk_key(key, number), *rows), None

    parts = _numbered_chunks(chunk, *rows)
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), parts)[0]


def sums_and_gradients_over_chunks(
    of_chunk: Callable[..., Any],
    chunk: int,
    trainable: Any,
    key: jax.Array | None,
    *rows: jax.Array,
) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    """Likewise, where ``of_chunk`` gives its gradients too, by ``trainable`` and the first rows."""

    def body(carry, part):
        total, gradient = carry
        number, *rows = part
        loss, (of_trainable, of_hidden) = of_chunk(trainable, _chunk_key(key, number), *rows)
        gradient = jax.tree.map(jnp.add, gradient, of_trainable)
        return (total + loss, gradient), of_hidden

    parts = _numbered_chunks(chunk, *rows)
    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable))
    (total, gradient), of_hidden = jax.lax.scan(body, start, parts)
    of_hidden = jnp.moveaxis(of_hidden, 0, 1).reshape(rows[0].shape)
    return total, (gradient, of_hidden)


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """(B, T, ...) -> (T / chunk, B, chunk, ...)."""
    split = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return jnp.moveaxis(split, 1, 0)


def _numbered_chunks(chunk, *arrays):
    """What a scan over chunks takes: their numbers, and each array's."""
    parts = [_chunks(x, chunk) for x in arrays]
    return jnp.arange(len(parts[0])), *parts


def _chunk_key(key, number):
    return None if key is None else jax.random.fold_in(key, number)
