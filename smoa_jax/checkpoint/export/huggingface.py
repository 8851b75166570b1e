"""A plain params tree as a Hugging Face directory that other tools open.

Weights go out shard by shard, one tensor at a time from the devices, so the host never holds more
than one shard. Everything is written into a sibling directory first and renamed at the end: the
target holds a whole model or none, whenever the process is killed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from smoa_jax.adapter.targets import walk
from smoa_jax.checkpoint.assemble import TensorReader
from smoa_jax.checkpoint.directories import replaced_directory
from smoa_jax.checkpoint.errors import listed
from smoa_jax.checkpoint.export.model_files import (
    TokenizerWriter,
    check_params,
    plan_files,
    write_json,
)
from smoa_jax.checkpoint.huggingface.config import is_multimodal
from smoa_jax.checkpoint.huggingface.directory import CONFIG_FILE
from smoa_jax.checkpoint.huggingface.multimodal import TextPart, processor_files
from smoa_jax.checkpoint.huggingface.safetensors_files import (
    INDEX_FILE,
    SINGLE_FILE,
    open_directory,
)
from smoa_jax.checkpoint.names import TensorSlot, is_unused
from smoa_jax.checks import require
from smoa_jax.models.config import DecoderConfig
from smoa_jax.storage import located


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
    multimodal_source: str | Path | None = None,
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
        multimodal_source: directory of the multimodal model that ``hf_config`` describes and the
            params are the decoder of: they go where they stood, and all else is copied from there.
        max_shard_bytes: a larger tensor gets a file of its own.
        overwrite: replace an exported model; any other non-empty directory is refused still.

    Returns:
        The directory.
    """
    leaves = dict(walk(params))
    return _export(
        functools.partial(_from_tree, leaves),
        check_params(params, config),
        config,
        directory,
        dtype=dtype,
        hf_config=hf_config,
        generation_config=generation_config,
        tokenizer=tokenizer,
        tokenizer_files=tokenizer_files,
        multimodal_source=multimodal_source,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def export_stored(
    reader: TensorReader,
    slots: Mapping[str, TensorSlot],
    config: DecoderConfig,
    directory: str | Path,
    **settings: Any,
) -> Path:
    """``export_huggingface`` of a checkpoint on disk, of which no more is read than is written.

    What the checkpoint holds beside ``slots`` and the decoder has no use for (the keys and values
    of a Gemma 4's sharing layers) is copied as it is.

    >>> export_stored(MergedReader(base, params, adapter_config), base.slots, base.config, "merged",
    ...               dtype=jnp.float32, hf_config=base.hf_config, tokenizer=tokenizer)

    Memory: one output file, so ``max_shard_bytes`` or one tensor if that is larger.

    Args:
        reader: The tensors under their Hugging Face names.
        slots: Those to write.
        config: Of the decoder.
        directory: To be made.
        settings: The other arguments of ``export_huggingface``.
    """

    def read(slot: TensorSlot) -> np.ndarray:
        return reader.read(slot.name, tuple(slice(0, size) for size in slot.shape))

    return _export(read, slots, config, directory, stored=reader, **settings)


def _export(
    read: Callable[[TensorSlot], np.ndarray],
    slots: Mapping[str, TensorSlot],
    config: DecoderConfig,
    directory: str | Path,
    *,
    dtype: DTypeLike,
    hf_config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    tokenizer: TokenizerWriter | None = None,
    tokenizer_files: Sequence[str | Path] = (),
    multimodal_source: str | Path | None = None,
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
    stored: TensorReader | None = None,
) -> Path:
    target = located(directory)
    require(max_shard_bytes >= 1, f"max_shard_bytes {max_shard_bytes}", "at least 1")
    whole = _open_whole(hf_config, multimodal_source)
    if whole is not None:
        tokenizer_files = [*tokenizer_files, *processor_files(Path(whole.source))]
    files = plan_files(
        config,
        dtype,
        hf_config=hf_config,
        generation_config=generation_config,
        tokenizer=tokenizer,
        tokenizer_files=tokenizer_files,
        reserved=(INDEX_FILE, SINGLE_FILE),
    )
    pieces = _pieces(read, slots, np.dtype(jnp.dtype(dtype)), whole)
    pieces += _copies(config, stored if whole is None else whole)
    with replaced_directory(
        target, marker=CONFIG_FILE, what="an exported model", overwrite=overwrite
    ) as draft:
        _write_weights(pieces, draft, max_shard_bytes)
        files.write(draft)
    return target


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Piece:
    """One tensor to be written: made when its file is, so that the host holds one file's."""

    name: str
    num_values: int
    num_bytes: int
    make: Callable[[], np.ndarray]


def _open_whole(hf_config: Mapping[str, Any] | None, source: str | Path | None) -> TextPart | None:
    multimodal = hf_config is not None and is_multimodal(hf_config)
    require(
        multimodal == (source is not None),
        f"{'a' if multimodal else 'no'} multimodal hf_config and multimodal_source {source}",
        "the directory of a multimodal model with its own hf_config, and neither for a text model",
        "give both or none",
    )
    return None if source is None else TextPart(open_directory(Path(source)))


def _pieces(
    read: Callable[[TensorSlot], np.ndarray],
    slots: Mapping[str, TensorSlot],
    dtype: np.dtype,
    whole: TextPart | None,
) -> list[_Piece]:
    """The decoder's tensors in the order of the files, under the names that they are to have."""
    if whole is not None:
        absent = [name for name in slots if name not in whole.stored_names]
        require(
            not absent,
            f"multimodal_source {whole.source} without {listed(absent)}",
            "the model that the params are the decoder of",
        )
    pieces = []
    for name, slot in slots.items():
        count = int(np.prod(slot.shape, dtype=np.int64))
        pieces.append(
            _Piece(
                name=name if whole is None else whole.stored_names[name],
                num_values=count,
                num_bytes=count * dtype.itemsize,
                make=functools.partial(_tensor, read, slot, dtype),
            )
        )
    return pieces


def _copies(config: DecoderConfig, stored: TensorReader | None) -> list[_Piece]:
    """What a checkpoint holds that the decoder has no use for, and the rest of a multimodal one."""
    if stored is None:
        return []
    unused = [name for name in stored.tensors if is_unused(name, config)]
    if not isinstance(stored, TextPart):
        return [_copy(stored, name) for name in unused]
    names = [*(stored.stored_names[name] for name in unused), *stored.others]
    return [_copy(stored.files, name) for name in names]


def _copy(reader: TensorReader, name: str) -> _Piece:
    shape = reader.tensors[name].shape
    one = reader.read(name, (slice(0, 1),) * len(shape))  # the format's word says no NumPy dtype
    count = math.prod(shape)
    everything = (slice(None),) * len(shape)
    return _Piece(
        name=name,
        num_values=count,
        num_bytes=count * one.dtype.itemsize,
        make=lambda: np.ascontiguousarray(reader.read(name, everything)),
    )


def _write_weights(pieces: Sequence[_Piece], directory: Path, max_shard_bytes: int) -> None:
    shards = _plan_shards(pieces, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {piece.name: piece.make() for piece in shard}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        metadata = {
            "total_parameters": sum(piece.num_values for piece in pieces),
            "total_size": sum(piece.num_bytes for piece in pieces),
        }
        write_json(directory / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})


def _plan_shards(pieces: Sequence[_Piece], max_shard_bytes: int) -> list[list[_Piece]]:
    """The tensors of each file, in order; a file is closed before it would grow too large."""
    shards: list[list[_Piece]] = []
    room = -1
    for piece in pieces:
        if room < piece.num_bytes:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(piece)
        room -= piece.num_bytes
    return shards


def _tensor(
    read: Callable[[TensorSlot], np.ndarray], slot: TensorSlot, dtype: np.dtype
) -> np.ndarray:
    """One tensor in the order and dtype of the disk, in memory of its own."""
    return np.array(read(slot), dtype=dtype, order="C")


def _from_tree(leaves: Mapping[Any, Any], slot: TensorSlot) -> np.ndarray:
    """One tensor of a params tree, as laid out on disk."""
    array = leaves[slot.path]
    values = np.asarray(array if slot.layer is None else array[slot.layer])
    return values.T if slot.transpose else values
