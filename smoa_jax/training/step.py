"""One training step and one evaluation step, as pure functions to be jitted once.

Only the trainable part is differentiated: frozen weights are arguments, their gradients never
exist. Losses and gradients are summed over target tokens, over micro-batches too, and divided once
by the tokens of the whole batch, so accumulation changes nothing but memory.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from smoa_jax.adapter.diagonal import marked_contiguous
from smoa_jax.adapter.tree import combine
from smoa_jax.adapter.types import Params
from smoa_jax.models.decoder import Decoder
from smoa_jax.training.loss import LogitsFunction, summed_cross_entropy
from smoa_jax.training.loss_on_mesh import DividedHead, summed_cross_entropy_on_mesh

#: ``trainable`` (a tree with None at frozen leaves), ``opt_state``, ``step``, ``skipped``.
State: TypeAlias = dict[str, Any]
Batch: TypeAlias = dict[str, jax.Array]
Metrics: TypeAlias = dict[str, jax.Array]


def initial_state(trainable: Params, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    return {
        "trainable": trainable,
        "opt_state": optimizer.init(trainable),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }


def batch_loss(
    model: Decoder,
    trainable: Params,
    frozen: Params,
    batch: Batch,
    chunk: int,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Sum over the batch's weighted targets of the cross-entropy, in float32."""
    params = combine(trainable, frozen)
    hidden: Any = model.apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="hidden",
    )

    return hidden_loss(model, trainable, frozen, hidden, batch, chunk, dropout_key)


def hidden_loss(
    model: Decoder,
    trainable: Params,
    frozen: Params,
    hidden: jax.Array,
    batch: Batch,
    chunk: int,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """``batch_loss`` of the final hidden states, whether the head lies on one device or on many."""
    rows = hidden, batch["targets"], batch["loss_mask"]
    parts = _head(trainable, model), _head(frozen, model)
    if model.head is not None:
        head = DividedHead(
            model.head,
            model.config.vocab_size,
            lambda size: _logits_function(model.with_vocabulary(size), is_part=True),
        )
        return summed_cross_entropy_on_mesh(head, *parts, *rows, chunk, dropout_key)
    return summed_cross_entropy(_logits_function(model), *parts, *rows, chunk, dropout_key)


def _logits_function(model: Decoder, *, is_part: bool = False) -> LogitsFunction:
    """Of a head, or of a part of one, in which no block of its adapter is a slice."""

    def logits(head: Params, rest: Params, hidden: jax.Array, key: jax.Array | None) -> Any:
        rngs = None if key is None else {"dropout": key}
        params = combine(head, rest)
        params = marked_contiguous(params, False) if is_part else params
        return model.apply({"params": params}, hidden, method="unembed", rngs=rngs)

    return logits


def _head(params: Params, model: Decoder) -> Params:
    """What ``unembed`` reads, so that no other gradient is carried from chunk to chunk."""
    name = "embed_tokens" if model.config.tie_embeddings else "lm_head"
    return {name: params[name]}


def make_train_step(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    accumulate: int = 1,
    chunk: int = 64,
    dropout: bool = False,
):
    """A function ``(state, frozen, batch) -> (state, metrics)``.

    A loss or gradient that is not finite leaves parameters and optimizer state as they were and is
    counted in ``state["skipped"]``; the step number advances, so the data goes on.

    Args:
        model: The decoder.
        optimizer: Over the trainable part.
        seed: Dropout keys are ``fold_in(seed, step)``, then the micro-batch.
        accumulate: Micro-batches per batch; its rows must be a multiple.
        chunk: Positions whose logits exist at a time.
        dropout: Whether the adapter has dropout.
    """

    def gradients(trainable: Params, frozen: Params, batch: Batch, key: jax.Array | None):
        def loss(trainable: Params) -> jax.Array:
            return batch_loss(model, trainable, frozen, batch, chunk, key)

        return jax.value_and_grad(loss)(trainable)

    def step(state: State, frozen: Params, batch: Batch) -> tuple[State, Metrics]:
        trainable = state["trainable"]
        key = jax.random.fold_in(jax.random.key(seed), state["step"]) if dropout else None
        if accumulate == 1:
            loss, grads = gradients(trainable, frozen, batch, key)
        else:
            # Interleaved, so that every micro-batch keeps the batch's sharding over devices.
            parts = jax.tree.map(
                lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), batch
            )

            def body(carry, part):
                index, part = part
                part_key = None if key is None else jax.random.fold_in(key, index)
                found = gradients(trainable, frozen, part, part_key)
                return jax.tree.map(jnp.add, carry, found), None

            start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable))
            (loss, grads), _ = jax.lax.scan(body, start, (jnp.arange(accumulate), parts))
        tokens = batch["loss_mask"].astype(jnp.float32).sum()
        count = jnp.maximum(tokens, 1.0)
        loss, grads = loss / count, jax.tree.map(lambda g: g / count, grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state["opt_state"], trainable)
        updated = optax.apply_updates(trainable, updates)
        new_trainable, new_opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (updated, opt_state),
            (trainable, state["opt_state"]),
        )
        new_state = {
            "trainable": new_trainable,
            "opt_state": new_opt_state,
            "step": state["step"] + 1,
            "skipped": state["skipped"] + (~finite).astype(jnp.int32),
        }
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "target_tokens": tokens,
            "tokens": (batch["segment_ids"] > 0).sum(),
            "skipped": new_state["skipped"],
        }
        return new_state, metrics

    return step


def make_eval_step(model: Decoder, *, chunk: int = 64):
    """A function ``(trainable, frozen, batch) -> (summed loss, target tokens)``."""

    def step(trainable: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        loss = batch_loss(model, trainable, frozen, batch, chunk)
        return loss, batch["loss_mask"].astype(jnp.float32).sum()

    return step
