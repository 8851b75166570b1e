"""What a step keeps beside its arguments, estimated where no compiler for the hardware is to hand.

What the layers keep for their backward pass is read off the traced step, whatever the remat policy.
What exists only for a while is a sum of the largest things that must exist together; a compiler may
do better by reusing, or worse by fragmenting. The sum has been held against programs of one stack
of layers (Llama), not of several (Gemma 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from smoa_jax.adapter.targets import find_targets
from smoa_jax.planning.step import AbstractStep
from smoa_jax.sharding.memory import bytes_per_device, total_bytes


def estimated_temporaries(step: AbstractStep, *, fused: bool) -> int:
    """Bytes a device beside weights, adapter and optimizer.

    Args:
        step: The step.
        fused: Whether attention never holds its scores.
    """
    gradients = bytes_per_device(step.state["trainable"])
    if step.config.train.accumulate > 1:  # the sum of the parts, and a part's own
        gradients *= 2
    config = step.base.config
    told = 2 * config.num_layers * config.per_layer_dim  # what each layer is told of each token
    hidden = _local_tokens(step) * (3 * config.embed_dim + told) * _width(step)
    return (
        _kept_for_backward(step) + gradients + hidden + max(_layer(step, fused=fused), _loss(step))
    )


def estimated_collectives(step: AbstractStep) -> dict[str, int]:
    """Bytes that come to a device in a step, by kind: weights gathered, activations summed."""
    sizes, config = step.mesh.shape, step.base.config
    parts, tensor = step.config.train.accumulate, sizes["tensor"]
    found = {}
    if sizes["fsdp"] > 1:
        whole = total_bytes(step.base.params)
        found["all-gather"] = 2 * parts * whole // tensor * (sizes["fsdp"] - 1) // sizes["fsdp"]
    if tensor > 1:
        values = config.num_layers * _local_tokens(step) * config.embed_dim
        found["all-reduce"] = 4 * parts * values * _sums_of_a_layer(step)
    return found


def _sums_of_a_layer(step: AbstractStep) -> int:
    """Sums of activations over ``tensor``: of o and down forward, of what feeds a layer back.

    A product that multiplies its weight sums its own gradient; XLA joins those of plain ones.
    """
    forward = 4 if step.config.model.remat == "full" else 2
    targets = find_targets(step.base.params, step.config.adapter)
    apart = {target.path[-1] for target in targets if step.config.adapter.modulation == "weight"}
    groups = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
    return forward + sum(len(group & apart) + bool(group - apart) for group in groups)


def _width(step: AbstractStep) -> int:
    return jnp.dtype(step.config.model.compute_dtype).itemsize


def _rows(step: AbstractStep) -> int:
    """Of a micro-batch, of all devices."""
    return step.config.train.batch_size // step.config.train.accumulate


def _batch_parts(step: AbstractStep) -> int:
    return step.mesh.shape["data"] * step.mesh.shape["fsdp"]


def _local_tokens(step: AbstractStep) -> int:
    return _rows(step) * step.config.data.max_length // _batch_parts(step)


def _kept_for_backward(step: AbstractStep) -> int:
    """What the scans over layers hand from the forward to the backward pass, on a device."""
    total = 0
    for aval in _stacked(step.traced.jaxpr.jaxpr):
        if len(aval.shape) > 2 and aval.shape[1] == _rows(step):
            parts = _batch_parts(step)
            if aval.shape[-1] != step.base.config.embed_dim:
                parts *= step.mesh.shape["tensor"]
            total += aval.size * aval.dtype.itemsize // parts
    return total


def _stacked(jaxpr: Any) -> Iterator[Any]:
    """The arrays that scans stack, those within a shard_map aside, whose shapes are a device's."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "shard_map":
            continue
        if equation.primitive.name == "scan":
            for variable in equation.outvars[equation.params["num_carry"] :]:
                yield variable.aval
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _stacked(inner)


def _layer(step: AbstractStep, *, fused: bool) -> int:
    """The largest product's weight as it is formed, and the activations of a layer going back."""
    config, tensor, width = step.base.config, step.mesh.shape["tensor"], _width(step)
    targets = find_targets(step.base.params, step.config.adapter)
    adapted = [math.prod(target.matrix_shape[-2:]) for target in targets]
    # W gathered, and in float32 what is added to it, their sum, and the gradient of all.
    formed = 12 if step.config.adapter.modulation == "weight" else 0
    weight = max(adapted, default=0) * (2 * width + formed) // tensor
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    values = 6 * config.embed_dim + (2 * heads + 6 * config.mlp_dim) // tensor
    activations = _local_tokens(step) * values * width
    scores = 0
    if not fused:
        pairs = _local_tokens(step) * step.config.data.max_length * config.num_heads // tensor
        scores = pairs * (8 + width)
    return weight + activations + scores


def _loss(step: AbstractStep) -> int:
    """Logits of a chunk, their exponentials and gradient, and a device's part of the head."""
    config, sizes = step.base.config, step.mesh.shape
    columns = -(-config.vocab_size // (sizes["fsdp"] * sizes["tensor"]))
    rows = _rows(step) // sizes["data"]
    logits = rows * min(step.config.train.loss_chunk, step.config.data.max_length) * columns
    head = columns * config.embed_dim * jnp.dtype(step.config.model.dtype).itemsize
    return 3 * 4 * logits + 2 * head
