"""The loss over a head that lies divided on a mesh, which no device ever holds whole.

Each device takes a part of the vocabulary: the head is turned once, from its stored layout (model
dim over ``fsdp``, vocabulary over ``tensor``) to one with the vocabulary over both, each device
sending and receiving no more than its own share. Then, for a chunk of positions at a time:

- the hidden states of the devices that share a head are gathered;
- each device makes the logits of its own part of the vocabulary;
- their log-sum-exp and the target's logit are combined by a maximum and two sums of ``[B, C]``;
- each device's part of the hidden states' gradient is summed and divided again, in float32 as it is
  written (of bf16 hidden states the TPU's compiler sums the bf16 parts).

So hidden states move, in and out, and the head doesn't. With D for the model dim, a device receives
``2 D`` bytes for a token of its group in bf16 and about ``4 D`` for its gradient, where a whole
head is ``2 V D``: fewer while a group (the devices that differ in ``fsdp`` and ``tensor``) has less
than V / 3 tokens a batch. With more, ``mesh.data`` makes the groups smaller; and a whole head,
1 GiB of Llama 3's, would still have to fit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from smoa_jax.adapter.placement import HeadSharding, modulation_specs, num_parts, sum_over
from smoa_jax.adapter.tree import combine, partition
from smoa_jax.adapter.types import Params, is_modulation
from smoa_jax.training.loss import (
    LogitsFunction,
    scaled_gradients,
    sum_over_chunks,
    sums_and_gradients_over_chunks,
    whole_chunks,
)

#: Words for a head's two axes, where a spec would have mesh axes.
_INPUTS, _OUTPUTS = "inputs", "outputs"


@dataclasses.dataclass(frozen=True)
class DividedHead:
    """A head that lies divided, and how logits are made of a part of it; hashable.

    Args:
        sharding: Where it lies.
        vocab_size: Of the whole head.
        logits_of: (columns of a part) -> the head's logits over so many.
    """

    sharding: HeadSharding
    vocab_size: int
    logits_of: Callable[[int], LogitsFunction]

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes over which the vocabulary is divided while the loss is taken."""
        return self.sharding.outputs + self.sharding.inputs

    @property
    def gathered(self) -> tuple[str, ...]:
        """Those of them that divide the rows otherwise."""
        return tuple(axis for axis in self.sharding.batch if axis in self.axes)

    @property
    def apart(self) -> tuple[str, ...]:
        """Mesh axes that go on dividing the rows."""
        return tuple(axis for axis in self.sharding.batch if axis not in self.axes)

    @property
    def stored(self) -> int:
        """Columns of the vocabulary in a stored part."""
        return self.vocab_size // num_parts(self.sharding.mesh, self.sharding.outputs)

    @property
    def subparts(self) -> int:
        """Into how many a stored part is divided further."""
        return num_parts(self.sharding.mesh, self.sharding.inputs)

    @property
    def size(self) -> int:
        """Columns of a device's part, the last ones of some parts being padding."""
        return -(-self.stored // self.subparts)


def summed_cross_entropy_on_mesh(
    head: DividedHead,
    trainable: Params,
    frozen: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, ""]:
    """``loss.summed_cross_entropy`` of a divided head.

    A head's own dropout draws as on one device unless ``mesh.data`` is above 1.

    Args:
        head: Where it lies.
        trainable: What of its params is trained.
        frozen: The rest of them.
        hidden: Normed final hidden states, rows divided over the batch axes.
        targets: Token ids.
        weights: 0 where a position does not count.
        chunk: Positions (of all rows) whose logits exist at a time, at least 1.
        dropout_key: For the head's own dropout.
    """
    chunk, *rows = whole_chunks(chunk, hidden, targets, weights)
    return _summed(head, chunk, trainable, frozen, dropout_key, *rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(head, chunk, trainable, frozen, key, *rows):
    def local(trainable, frozen, key, *rows):
        own, rest = _own_part(head, trainable, frozen)
        of_chunk = functools.partial(_chunk_loss, head, rest)
        total = sum_over_chunks(of_chunk, chunk, own, _own_key(head, key), *rows)
        return sum_over(total, head.apart)

    return _on_mesh(head, local, trainable, frozen, key, rows)


def _summed_forward(head, chunk, trainable, frozen, key, *rows):
    def local(trainable, frozen, key, *rows):
        own, rest = _own_part(head, trainable, frozen)
        of_chunk = functools.partial(_chunk_gradients, head, rest)
        total, (gradient, of_hidden) = sums_and_gradients_over_chunks(
            of_chunk, chunk, own, _own_key(head, key), *rows
        )
        gradient = _home(head, gradient, trainable, frozen)
        return sum_over(total, head.apart), (gradient, of_hidden)

    return _on_mesh(head, local, trainable, frozen, key, rows, gradients=True)


def _summed_backward(head, chunk, saved, cotangent):
    return scaled_gradients(saved, cotangent)


_summed.defvjp(_summed_forward, _summed_backward)


def _on_mesh(head, local, trainable, frozen, key, rows, *, gradients=False):
    """Run ``local`` on each device's part of head and rows."""
    of_trainable, of_frozen = _specs(head, trainable, frozen)
    batch = head.sharding.batch or None
    of_rows = tuple(PartitionSpec(batch, *(None,) * (x.ndim - 1)) for x in rows)
    whole = PartitionSpec()
    return jax.shard_map(
        local,
        mesh=head.sharding.mesh,
        in_specs=(of_trainable, of_frozen, whole, *of_rows),
        out_specs=(whole, (of_trainable, of_rows[0])) if gradients else whole,
        check_vma=False,
    )(trainable, frozen, key, *rows)


# -------------------------------------------------------------------------- a device's own part


def _words(trainable: Params, frozen: Params) -> Params:
    """Which axes of each tensor are the head's inputs and its outputs, the vocabulary."""
    by_name = {
        "kernel": PartitionSpec(_INPUTS, _OUTPUTS),
        "embedding": PartitionSpec(_OUTPUTS, _INPUTS),
    }

    def words(path: Any, leaf: Any) -> Any:
        if is_modulation(leaf):
            return modulation_specs(leaf, None, _INPUTS, _OUTPUTS)
        return by_name[path[-1].key]

    params = combine(trainable, frozen)
    return jax.tree_util.tree_map_with_path(words, params, is_leaf=is_modulation)


def _specs(head: DividedHead, trainable: Params, frozen: Params) -> tuple[Params, Params]:
    """How each tensor is stored, of both halves of the head's params."""
    axes = {_INPUTS: head.sharding.inputs or None, _OUTPUTS: head.sharding.outputs or None}
    specs = jax.tree.map(
        lambda spec: PartitionSpec(*(axes.get(word) for word in spec)), _words(trainable, frozen)
    )
    return partition(specs)


def _own_part(head: DividedHead, trainable: Params, frozen: Params) -> tuple[Params, Params]:
    """A device's columns of the head, from stored parts: all of the head that moves."""
    halves = zip((trainable, frozen), partition(_words(trainable, frozen)), strict=True)
    own, rest = (jax.tree.map(functools.partial(_own_columns, head), *half) for half in halves)
    return own, rest


def _own_columns(head: DividedHead, stored: jax.Array, words: PartitionSpec) -> jax.Array:
    """One tensor, from a part of the model dim to a further part of the vocabulary."""
    axes = head.sharding.inputs
    if not axes or not set(words) & {_INPUTS, _OUTPUTS}:
        return stored
    if _OUTPUTS not in words:
        return jax.lax.all_gather(stored, axes, axis=words.index(_INPUTS), tiled=True)
    o = words.index(_OUTPUTS)
    padding = [(0, 0)] * stored.ndim
    padding[o] = (0, head.subparts * head.size - head.stored)
    padded = jnp.pad(stored, padding)
    if _INPUTS not in words:
        start = jax.lax.axis_index(axes) * head.size
        return jax.lax.dynamic_slice_in_dim(padded, start, head.size, axis=o)
    i = words.index(_INPUTS)
    return jax.lax.all_to_all(padded, axes, split_axis=o, concat_axis=i, tiled=True)


def _home(head: DividedHead, gradient: Params, trainable: Params, frozen: Params) -> Params:
    """The gradient by stored parts of the trained half, from that by own columns of all devices."""
    axes = tuple(dict.fromkeys((*head.sharding.batch, *head.axes)))

    def home(stored: jax.Array, own: jax.Array, words: PartitionSpec, spec: PartitionSpec):
        (found,) = jax.vjp(lambda leaf: _own_columns(head, leaf, words), stored)[1](own)
        entries = (entry if isinstance(entry, tuple) else (entry,) for entry in spec)
        divided = {name for entry in entries for name in entry}
        return sum_over(found, tuple(axis for axis in axes if axis not in divided))

    words, specs = partition(_words(trainable, frozen))[0], _specs(head, trainable, frozen)[0]
    return jax.tree.map(home, trainable, gradient, words, specs)


def _own_key(head: DividedHead, key: jax.Array | None) -> jax.Array | None:
    """Devices with the same rows draw alike, and others apart."""
    if key is None or not head.apart:
        return key
    return jax.random.fold_in(key, jax.lax.axis_index(head.apart))


# ------------------------------------------------------------------------------------- a chunk


def _chunk_loss(head, frozen, trainable, key, hidden, targets, weights):
    hidden, targets, weights = (_gather(head, x) for x in (hidden, targets, weights))
    logits = _own_logits(head, frozen, trainable, hidden, key)
    return _cross_entropy(head, logits, targets, weights)[0]


def _chunk_gradients(head, frozen, trainable, key, hidden, targets, weights):
    """The loss of a chunk, and the gradients by a device's own part of the head and by its rows."""
    hidden, targets, weights = (_gather(head, x) for x in (hidden, targets, weights))
    logits, pull = jax.vjp(
        lambda trainable, hidden: _own_logits(head, frozen, trainable, hidden, key),
        trainable,
        hidden,
    )
    loss, of_logits = _cross_entropy(head, logits, targets, weights)
    of_trainable, of_hidden = pull(of_logits)
    wide = sum_over(
        of_hidden.astype(jnp.float32),
        tuple(axis for axis in head.axes if axis not in head.gathered),
    )
    if head.gathered:
        wide = jax.lax.psum_scatter(wide, head.gathered, scatter_dimension=0, tiled=True)
    return loss, (of_trainable, wide.astype(hidden.dtype))


def _own_logits(head, frozen, trainable, hidden, key):
    """Logits over a device's part of the vocabulary; of padding, minus infinity."""
    logits = head.logits_of(head.size)(trainable, frozen, hidden, key)
    if head.subparts * head.size == head.stored:
        return logits
    return jnp.where(_is_real(head)[None, None, :], logits, -jnp.inf)


def _is_real(head: DividedHead) -> Bool[Array, " V"]:
    """Which columns of a device's part are no padding."""
    index = jax.lax.axis_index(head.sharding.inputs) if head.sharding.inputs else 0
    return jnp.arange(head.size) < head.stored - index * head.size


def _cross_entropy(
    head: DividedHead,
    logits: Float[Array, "B C V"],
    targets: Int[Array, "B C"],
    weights: Float[Array, "B C"],
) -> tuple[Float[Array, ""], Float[Array, "B C V"]]:
    """The loss over the whole vocabulary, and its gradient by a part's logits."""
    begun = 0
    for axes, size in ((head.sharding.outputs, head.stored), (head.sharding.inputs, head.size)):
        begun += jax.lax.axis_index(axes) * size if axes else 0
    # The number of a column of padding is that of a real one elsewhere.
    own = jnp.where(_is_real(head), begun + jnp.arange(head.size), -1)
    chosen = own[None, None, :] == targets[..., None]
    highest = logits.max(axis=-1)
    highest = jax.lax.pmax(highest, head.axes) if head.axes else highest
    total = sum_over(jnp.exp(logits - highest[..., None]).sum(axis=-1), head.axes)
    log_total = highest + jnp.log(total)
    of_target = sum_over(jnp.where(chosen, logits, 0.0).sum(axis=-1), head.axes)
    loss = jnp.sum(weights * (log_total - of_target))
    return loss, weights[..., None] * (jnp.exp(logits - log_total[..., None]) - chosen)


def _gather(head: DividedHead, x: jax.Array) -> jax.Array:
    if not head.gathered:
        return x
    return jax.lax.all_gather(x, head.gathered, axis=0, tiled=True)
