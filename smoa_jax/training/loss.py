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
    length = hidden.shape[1]
    chunk = min(chunk, length)
    padding = -length % chunk
    if padding:
        hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
        targets = jnp.pad(targets, ((0, 0), (0, padding)))
        weights = jnp.pad(weights, ((0, 0), (0, padding)))
    rows = hidden, targets, weights
    return _summed(logits_function, chunk, trainable, frozen, dropout_key, *rows)


def _chunk_loss(logits_function, trainable, frozen, key, hidden, targets, weights):
    logits = logits_function(trainable, frozen, hidden, key)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - chosen))


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(logits_function, chunk, trainable, frozen, key, hidden, targets, weights):
    def body(total, part):
        number, *rows = part
        found = _chunk_loss(logits_function, trainable, frozen, _chunk_key(key, number), *rows)
        return total + found, None

    parts = _numbered_chunks(chunk, hidden, targets, weights)
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), parts)[0]


def _summed_forward(logits_function, chunk, trainable, frozen, key, hidden, targets, weights):
    def body(carry, part):
        total, gradient = carry
        number, rows, *rest = part

        def loss_of(trainable, rows):
            own = _chunk_key(key, number)
            return _chunk_loss(logits_function, trainable, frozen, own, rows, *rest)

        loss, (of_trainable, of_hidden) = jax.value_and_grad(loss_of, argnums=(0, 1))(
            trainable, rows
        )
        gradient = jax.tree.map(jnp.add, gradient, of_trainable)
        return (total + loss, gradient), of_hidden

    parts = _numbered_chunks(chunk, hidden, targets, weights)
    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable))
    (total, gradient), of_hidden = jax.lax.scan(body, start, parts)
    of_hidden = jnp.moveaxis(of_hidden, 0, 1).reshape(hidden.shape)
    return total, (gradient, of_hidden)


def _summed_backward(logits_function, chunk, saved, cotangent):
    gradient, of_hidden = saved
    of_trainable = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradient)
    return of_trainable, None, None, (of_hidden * cotangent).astype(of_hidden.dtype), None, None


_summed.defvjp(_summed_forward, _summed_backward)
