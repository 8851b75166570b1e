"""The frozen base model: found, checked, read onto devices, and identified.

Two kinds lie on disk: a Hugging Face directory of safetensors and a single GGUF file. Both end as
one ``BaseModel`` whose params tree has the same names, orientation and row order, so nothing
downstream asks where the weights came from. No torch, no pickle, no remote code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax.numpy as jnp
from jax.typing import DTypeLike

from smoa_jax import checks
from smoa_jax.checkpoint.assemble import TensorReader, assemble, check_tensors, fingerprint
from smoa_jax.checkpoint.directories import put_back
from smoa_jax.checkpoint.errors import listed, refuse, require
from smoa_jax.checkpoint.huggingface.config import config_from_hf, is_multimodal
from smoa_jax.checkpoint.huggingface.directory import (
    CONFIG_FILE,
    download,
    is_hub_name,
    read_configs,
)
from smoa_jax.checkpoint.huggingface.multimodal import TextPart
from smoa_jax.checkpoint.huggingface.safetensors_files import SafetensorsFiles, open_directory
from smoa_jax.checkpoint.names import TensorSlot, tensor_slots
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.params import abstract_params
from smoa_jax.storage import local_copy

if TYPE_CHECKING:
    from smoa_jax.checkpoint.gguf.files import GgufFile

#: Where a base model comes from.
BaseKind: TypeAlias = Literal["huggingface", "gguf"]

_DTYPES = ("float32", "bfloat16")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractBase:
    """A base model without its weights: what planning needs."""

    params: dict[str, Any]  # of jax.ShapeDtypeStruct
    config: DecoderConfig
    source: Path
    hf_config: dict[str, Any]  # as config.json has it, whatever the kind
    generation_config: dict[str, Any]  # as generation_config.json has it
    kind: BaseKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseModel(AbstractBase):
    """A base model on devices; ``fingerprint`` tells it from every other one."""

    params: dict[str, Any]  # of jax.Array
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredBase(AbstractBase):
    """A base model whose weights stay on disk, to be read tensor by tensor."""

    fingerprint: str
    reader: TensorReader
    slots: dict[str, TensorSlot]


def open_base(path: str | Path, dtype: DTypeLike = jnp.float32) -> StoredBase:
    """Find and check a base model and tell it from others; of its weights only edges are read.

    Arguments and errors as for ``load_base``.
    """
    _check_dtype(dtype)
    found = _locate(path, weights=True)
    abstract, gguf_file = _describe(found, dtype)
    reader: TensorReader = gguf_file or open_tensors(found, abstract.hf_config)
    slots = tensor_slots(abstract.params, abstract.config)
    check_tensors(reader, slots, abstract.config)
    fields = {field.name: getattr(abstract, field.name) for field in dataclasses.fields(abstract)}
    return StoredBase(**fields, fingerprint=fingerprint(reader, slots), reader=reader, slots=slots)


def load_base(
    path: str | Path, dtype: DTypeLike = jnp.float32, shardings: dict[str, Any] | None = None
) -> BaseModel:
    """Read a base model, tensor by tensor, straight onto its devices.

    Example:

        base = load_base("SmolLM2-135M-Instruct.Q4_1.gguf", dtype=jnp.bfloat16)

    Host memory holds one device's shard of one (stacked) array at a time. With several processes
    each reads the slices of its own devices.

    Args:
        path: a Hugging Face directory, a GGUF file, or ``organisation/model`` on the hub.
        dtype: of the params, float32 or bfloat16.
        shardings: a sharding for every array of the params tree (``abstract_base(path).params``
            has its structure); None puts everything on JAX's default device.

    Raises:
        CheckpointError: for anything missing, surplus, misshapen, damaged or unsupported.
    """
    stored = open_base(path, dtype)
    fields = {field.name: getattr(stored, field.name) for field in dataclasses.fields(AbstractBase)}
    params = assemble(stored.reader, stored.params, stored.slots, shardings)
    return BaseModel(**{**fields, "params": params}, fingerprint=stored.fingerprint)


def abstract_base(path: str | Path, dtype: DTypeLike = jnp.float32) -> AbstractBase:
    """Describe a base model without reading (or, from the hub, downloading) its weights.

    A directory with nothing but a ``config.json`` is enough. Arguments as for ``load_base``.
    """
    _check_dtype(dtype)
    return _describe(_locate(path, weights=False), dtype)[0]


def open_tensors(directory: Path, hf_config: Mapping[str, Any]) -> SafetensorsFiles | TextPart:
    """The tensors of a Hugging Face directory's decoder, be it a part of the model or all of it."""
    files = open_directory(directory)
    return TextPart(files) if is_multimodal(hf_config) else files


def _describe(found: Path, dtype: DTypeLike) -> tuple[AbstractBase, GgufFile | None]:
    if found.is_dir():
        gguf_file = None
        hf_config, generation_config = read_configs(found)
        config = config_from_hf(hf_config, str(found / CONFIG_FILE))
    else:
        from smoa_jax.checkpoint.gguf.files import GgufFile

        gguf_file = GgufFile(found)
        hf_config, generation_config = gguf_file.hf_config(), gguf_file.generation_config()
        config = config_from_hf(hf_config, str(found))
    abstract = AbstractBase(
        params=abstract_params(config, dtype),
        config=config,
        source=found,
        hf_config=hf_config,
        generation_config=generation_config,
        kind="huggingface" if gguf_file is None else "gguf",
    )
    return abstract, gguf_file


def _locate(path: str | Path, *, weights: bool) -> Path:
    """A directory with a config.json, or a GGUF file."""
    found = local_copy(path)
    put_back(found)
    if found.is_dir():
        if (found / CONFIG_FILE).is_file():
            return found
        files = sorted(found.glob("*.gguf"))
        require(
            len(files) <= 1,
            f"{len(files)} GGUF files ({listed(file.name for file in files)})",
            "one",
            "give its path",
            where=found,
        )
        return files[0] if files else found
    if found.is_file():
        return _check_file(found)
    if isinstance(path, str) and is_hub_name(path) and found.suffix not in (".gguf", *_PICKLES):
        return download(path, weights=weights)
    refuse(
        "no such file or directory",
        "a Hugging Face directory, a GGUF file or an organisation/model on the hub",
        where=path,
    )


def _check_file(path: Path) -> Path:
    require(
        path.suffix not in _PICKLES,
        "a pickle, which can run code when opened",
        "safetensors or GGUF",
        "convert it with transformers' save_pretrained",
        where=path,
    )
    require(
        path.suffix == ".gguf",
        "a file that is no model",
        f"a directory with {CONFIG_FILE} and safetensors, or a .gguf file",
        where=path,
    )
    return path


def _check_dtype(dtype: DTypeLike) -> None:
    name = jnp.dtype(dtype).name
    checks.require(name in _DTYPES, f"dtype {name}", f"one of {', '.join(_DTYPES)}")
