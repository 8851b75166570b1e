"""A plain params tree as a Hugging Face directory that other tools open.

Weights go out shard by shard, one tensor at a time from the devices, so the host never holds more
than one shard. Everything is written into a sibling directory first and renamed at the end: the
target holds a whole model or none, whenever the process is killed.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from smoa_jax.checkpoint.errors import CheckpointError, listed
from smoa_jax.checkpoint.hf_config import config_to_hf
from smoa_jax.checkpoint.huggingface import CONFIG_FILE, GENERATION_FILE
from smoa_jax.checkpoint.names import TensorSlot, flatten_tree, tensor_slots
from smoa_jax.checkpoint.safetensors_files import INDEX_FILE, SINGLE_FILE
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.params import abstract_params

_DTYPES = ("float32", "bfloat16")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@runtime_checkable
class SavesPretrained(Protocol):
    """A tokenizer as transformers has it."""

    def save_pretrained(self, directory: str, /) -> Any: ...


#: Writes its files into the directory that it is given.
TokenizerWriter: TypeAlias = SavesPretrained | Callable[[Path], object]


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
    dtype_name = jnp.dtype(dtype).name
    if dtype_name not in _DTYPES:
        raise ValueError(f"got dtype {dtype_name}; expected one of {', '.join(_DTYPES)}")
    if max_shard_bytes < 1:
        raise ValueError(f"got max_shard_bytes {max_shard_bytes}; expected at least 1")
    slots = _checked_slots(params, config)
    fields = config_to_hf(config, hf_config, dtype=dtype_name)
    if generation_config is None:
        generation_config = {key: fields[key] for key in _TOKEN_IDS if fields.get(key) is not None}
    files = _checked_files(tokenizer_files)
    with _replaced_directory(target, overwrite) as draft:
        _write_weights(params, slots, draft, np.dtype(jnp.dtype(dtype)), max_shard_bytes)
        if isinstance(tokenizer, SavesPretrained):
            tokenizer.save_pretrained(str(draft))
        elif tokenizer is not None:
            tokenizer(draft)
        for file in files:
            shutil.copyfile(file, draft / file.name)
        _write_json(draft / CONFIG_FILE, fields)
        _write_json(draft / GENERATION_FILE, generation_config)
    return target


def _checked_slots(params: Mapping[str, Any], config: DecoderConfig) -> dict[str, TensorSlot]:
    slots = tensor_slots(params)
    expected = tensor_slots(abstract_params(config, jnp.float32))
    different = [name for name in expected if slots.get(name) != expected[name]]
    different += [name for name in slots if name not in expected]
    if different:
        name = different[0]
        got, wanted = (
            f"of shape {some[name].shape}" if name in some else "absent"
            for some in (slots, expected)
        )
        raise ValueError(
            f"got params that differ from the config in {listed(different)} ({name} is {got}); "
            f"expected it {wanted}: give the config that the params were made with"
        )
    for path, leaf in flatten_tree(params).items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                f"{'/'.join(path)} is spread over several processes; expected all of it on this "
                "process's devices: export from a single process"
            )
    return slots


def _checked_files(tokenizer_files: Sequence[str | Path]) -> list[Path]:
    files = [Path(file) for file in tokenizer_files]
    own = {CONFIG_FILE, GENERATION_FILE, INDEX_FILE, SINGLE_FILE}
    for file in files:
        if not file.is_file() or file.name in own:
            raise ValueError(
                f"got tokenizer file {file}; expected an existing file that isn't one of "
                f"{', '.join(sorted(own))}"
            )
    return files


@contextmanager
def _replaced_directory(target: Path, overwrite: bool) -> Iterator[Path]:
    """A draft directory that becomes ``target`` if all goes well and vanishes if not."""
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not overwrite:
        raise CheckpointError(
            f"{target} already exists and isn't empty; expected a new directory: "
            "choose another, or say overwrite to replace the model in it"
        )
    if occupied and not (target / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{target} holds no {CONFIG_FILE}, so it isn't an exported model; expected one to "
            "overwrite: choose another directory or empty this one yourself"
        )
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    draft = target.with_name(f".{target.name}.draft-{mark}")
    old = target.with_name(f".{target.name}.old-{mark}")
    draft.mkdir()
    try:
        yield draft
        if occupied:
            target.rename(old)
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
        _write_json(directory / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})


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


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
