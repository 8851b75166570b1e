"""A plain params tree as a Hugging Face directory that other tools open.

Weights go out shard by shard, one tensor at a time from the devices, so the host never holds more
than one shard. Everything is written into a sibling directory first and renamed at the end: the
target holds a whole model or none, whenever the process is killed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from smoa_jax.checkpoint.directories import replaced_directory
from smoa_jax.checkpoint.huggingface import CONFIG_FILE
from smoa_jax.checkpoint.model_files import (
    TokenizerWriter,
    check_params,
    plan_files,
    write_json,
)
from smoa_jax.checkpoint.names import TensorSlot, flatten_tree
from smoa_jax.checkpoint.safetensors_files import INDEX_FILE, SINGLE_FILE
from smoa_jax.models.config import DecoderConfig


def export_huggingface(
    params: Mapping[str, Any],
    config: DecoderConfig,
    directory: str | Path,
    *,
    dtype: DTypeLike,
    hf_config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    tokenizer: TokenizerWriter | None = None,
    tokenizer_files: Sequence[str | Path] = (),
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
) -> Path:
    """Write a model that ``AutoModelForCausalLM.from_pretrained`` opens.

    Example:

        export_huggingface(merge_smoa(params), base.config, "merged", dtype=jnp.float32,
                           hf_config=base.hf_config, tokenizer=tokenizer)

    Args:
        params: a plain tree, no adapter in it; on one process's devices.
        config: its decoder.
        directory: to be made; ValueError if it holds anything, unless ``overwrite``.
        dtype: of the weights on disk, float32 or bfloat16.
        hf_config: the source's own ``config.json``, kept whole except for the dtype.
        generation_config: the source's own; None writes the token ids of ``hf_config``.
        tokenizer: an object with ``save_pretrained``, or a function of the directory.
        tokenizer_files: files to copy beside the weights.
        max_shard_bytes: a larger tensor gets a file of its own.
        overwrite: replace an exported model; any other non-empty directory is refused still.

    Returns:
        The directory.
    """
    target = Path(directory).expanduser()
    if max_shard_bytes < 1:
        raise ValueError(f"got max_shard_bytes {max_shard_bytes}; expected at least 1")
    files = plan_files(
        config,
        dtype,
        hf_config=hf_config,
        generation_config=generation_config,
        tokenizer=tokenizer,
        tokenizer_files=tokenizer_files,
        reserved=(INDEX_FILE, SINGLE_FILE),
    )
    slots = check_params(params, config)
    with replaced_directory(
        target, marker=CONFIG_FILE, what="an exported model", overwrite=overwrite
    ) as draft:
        _write_weights(params, slots, draft, np.dtype(jnp.dtype(dtype)), max_shard_bytes)
        files.write(draft)
    return target


def _write_weights(
    params: Mapping[str, Any],
    slots: Mapping[str, TensorSlot],
    directory: Path,
    dtype: np.dtype,
    max_shard_bytes: int,
) -> None:
    leaves = flatten_tree(params)
    shards = _plan_shards(slots, dtype.itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _tensor(leaves, slots[name], dtype) for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(_num_values(slot) for slot in slots.values())
        metadata = {"total_parameters": total, "total_size": total * dtype.itemsize}
        write_json(directory / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})


def _plan_shards(
    slots: Mapping[str, TensorSlot], item_bytes: int, max_shard_bytes: int
) -> list[list[str]]:
    """The names of each shard, in order; a shard is closed before it would grow too large."""
    shards: list[list[str]] = []
    room = -1
    for name, slot in slots.items():
        size = _num_values(slot) * item_bytes
        if room < size:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _num_values(slot: TensorSlot) -> int:
    return int(np.prod(slot.shape, dtype=np.int64))


def _tensor(leaves: Mapping[Any, Any], slot: TensorSlot, dtype: np.dtype) -> np.ndarray:
    """One tensor in the order and dtype of the disk, in memory of its own."""
    array = leaves[slot.path]
    values = np.asarray(array if slot.layer is None else array[slot.layer])
    return np.array(values.T if slot.transpose else values, dtype=dtype, order="C")
