"""From tensors on disk to the params tree on devices, each shard read by the process that holds it.

A stacked ``(L, I, O)`` array is put together shard by shard, and each shard layer by layer, from
slices of the files: host memory never holds more than one device's shard of one array beside what
the reader itself maps from disk. Names and shapes are all checked before the first weight is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

from smoa_jax import checks
from smoa_jax.adapter.targets import walk
from smoa_jax.checkpoint.errors import CheckpointError, listed, refuse, require
from smoa_jax.checkpoint.names import (
    EMBEDDING_NAME,
    HEAD_NAME,
    TensorSlot,
    is_harmless,
    is_unused,
    unflatten_tree,
)
from smoa_jax.models.config import DecoderConfig

#: One slice per axis.
Index: TypeAlias = tuple[slice, ...]

#: How much of each end of a tensor, as stored, goes into the fingerprint.
FINGERPRINT_BYTES = 4096

_CPU_ALIGNMENT = 64  # bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What a file says of a tensor before any of it is read."""

    shape: tuple[int, ...]  # (outputs, inputs) for a kernel
    dtype: str  # the file format's own name for it, such as BF16 or Q4_1


class TensorReader(Protocol):
    """A checkpoint on disk, under Hugging Face names whatever the format."""

    @property
    def source(self) -> str:
        """Where it lies, for error messages."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors by name."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """The floating values of a slice of a tensor, as laid out on disk."""
        ...

    def ends(self, name: str, size: int) -> tuple[bytes, bytes]:
        """The first and last ``size`` bytes of a tensor as stored."""
        ...


def check_tensors(
    reader: TensorReader, slots: Mapping[str, TensorSlot], config: DecoderConfig
) -> None:
    """Refuse a checkpoint whose names or shapes don't fit the model that its config describes."""
    stored = reader.tensors
    missing = [name for name in slots if name not in stored]
    if missing:
        hint = "; expected every tensor of the model that the config describes"
        if missing == [HEAD_NAME]:
            hint = "; if its head is the embedding, the config must say tie_word_embeddings: true"
        raise CheckpointError(f"{reader.source}: missing tensor {listed(missing)}{hint}")
    for name, slot in slots.items():
        require(
            stored[name].shape == slot.shape,
            f"{name} of shape {stored[name].shape}",
            f"{slot.shape} from the config",
            "the two belong to different models",
            where=reader.source,
        )
    surplus = [
        name
        for name in stored
        if not (name in slots or is_harmless(name) or is_unused(name, config))
    ]
    if surplus == [HEAD_NAME]:
        _check_tied_head(reader)
    elif surplus:
        refuse(
            f"surplus tensor {listed(surplus)}",
            "only what a model with this config computes with, since ignoring weights would "
            "change the model",
            where=reader.source,
        )


def _check_tied_head(reader: TensorReader) -> None:
    head, embedding = reader.tensors[HEAD_NAME], reader.tensors[EMBEDDING_NAME]
    same = head.shape == embedding.shape
    rows = max(1, 2**22 // max(1, embedding.shape[-1]))
    for start in range(0, embedding.shape[0], rows):
        if not same:
            break
        index = (slice(start, min(start + rows, embedding.shape[0])), slice(None))
        same = np.array_equal(reader.read(HEAD_NAME, index), reader.read(EMBEDDING_NAME, index))
    if not same:
        refuse(
            f"{HEAD_NAME} that differs from {EMBEDDING_NAME}",
            "the same, since the config says tie_word_embeddings: true",
            "set it to false in the config to use this head",
            where=reader.source,
        )


def fingerprint(reader: TensorReader, slots: Mapping[str, TensorSlot]) -> str:
    """SHA-256 over name, shape, stored dtype and both ends of every tensor, names sorted.

    It depends on the files alone, so it is the same for every compute dtype and sharding.
    """
    digest = hashlib.sha256()
    for name in sorted(slots):
        tensor = reader.tensors[name]
        digest.update(json.dumps([name, list(tensor.shape), tensor.dtype]).encode())
        for end in reader.ends(name, FINGERPRINT_BYTES):
            digest.update(end)
    return digest.hexdigest()


def assemble(
    reader: TensorReader,
    abstract: Mapping[str, Any],
    slots: Mapping[str, TensorSlot],
    shardings: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The params tree: shapes and dtypes of ``abstract``, values of ``reader``.

    Args:
        reader: the checkpoint, already checked against ``abstract``.
        abstract: a tree of ``jax.ShapeDtypeStruct``.
        slots: the tensors that it stands for.
        shardings: a tree of the same structure with a sharding per array, or None for JAX's
            default device.
    """
    leaves = dict(walk(abstract))
    wanted = _match_shardings(abstract, shardings)
    by_path: dict[tuple[str, ...], list[TensorSlot]] = {}
    for slot in slots.values():
        by_path.setdefault(slot.path, []).append(slot)
    arrays = {}
    for path, leaf in leaves.items():
        arrays[path] = _assemble_array(reader, by_path[path], leaf, wanted.get(path))
    return unflatten_tree(arrays)


def _match_shardings(
    abstract: Mapping[str, Any], shardings: Mapping[str, Any] | None
) -> dict[tuple[str, ...], jax.sharding.Sharding]:
    if shardings is None:
        return {}
    leaves, wanted = dict(walk(abstract)), dict(walk(shardings))
    different = sorted("/".join(path) for path in leaves.keys() ^ wanted.keys())
    checks.require(
        not different,
        f"shardings that differ from the params tree at {listed(different)}",
        "one sharding for every array",
    )
    for path, leaf in leaves.items():
        try:
            wanted[path].shard_shape(leaf.shape)
        except ValueError as error:
            raise ValueError(
                f"{'/'.join(path)} of shape {leaf.shape} can't be laid out as {wanted[path]}; "
                "expected axes that the mesh divides"
            ) from error
    return wanted


def _assemble_array(
    reader: TensorReader,
    slots: Sequence[TensorSlot],
    leaf: jax.ShapeDtypeStruct,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    if sharding is None:
        whole = _read_shard(reader, slots, leaf, (slice(None),) * len(leaf.shape))
        return jax.block_until_ready(jax.device_put(whole))
    holders: dict[tuple, list[Any]] = {}
    indices: dict[tuple, Index] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        assert index is not None
        key = tuple(part.indices(size) for part, size in zip(index, leaf.shape, strict=True))
        holders.setdefault(key, []).append(device)
        indices[key] = index
    shards = []
    for key, devices in holders.items():
        values = _read_shard(reader, slots, leaf, indices[key])
        for device in devices:
            place = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            shards.append(jax.device_put(values, place))
        jax.block_until_ready(shards[-len(devices) :])
        del values  # only one shard waits on the host, also while the next one is read
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards, dtype=leaf.dtype)


def _read_shard(
    reader: TensorReader, slots: Sequence[TensorSlot], leaf: jax.ShapeDtypeStruct, index: Index
) -> np.ndarray:
    shape = [len(range(*part.indices(size))) for part, size in zip(index, leaf.shape, strict=True)]
    values = _empty(shape, leaf.dtype)
    if slots[0].layer is None:
        values[...] = _read_slot(reader, slots[0], index)
        return values
    for position, slot in enumerate(slots[index[0]]):
        values[position] = _read_slot(reader, slot, index[1:])
    return values


def _empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array that begins where JAX's CPU devices want it to, so that they take it uncopied."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + _CPU_ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _CPU_ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def _read_slot(reader: TensorReader, slot: TensorSlot, index: Index) -> np.ndarray:
    if slot.transpose:
        return reader.read(slot.name, index[::-1]).T
    return reader.read(slot.name, index)
