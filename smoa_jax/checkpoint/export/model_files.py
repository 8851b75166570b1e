"""What stands beside the weights of an exported model, whatever their format: configs, tokenizer.

Everything that can be wrong with it is found before anything is written.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from smoa_jax.adapter.targets import walk
from smoa_jax.checkpoint.errors import listed
from smoa_jax.checkpoint.huggingface.config import config_to_hf, text_fields
from smoa_jax.checkpoint.huggingface.directory import CONFIG_FILE, GENERATION_FILE
from smoa_jax.checkpoint.names import TensorSlot, tensor_slots
from smoa_jax.checks import require
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files beside the weights, checked and ready to be written.

    Args:
        fields: Of ``config.json``.
        generation: Of ``generation_config.json``.
        tokenizer: An object with ``save_pretrained``, or a function of the directory.
        copied: Files to copy as they are.
    """

    fields: Mapping[str, Any]
    generation: Mapping[str, Any]
    tokenizer: TokenizerWriter | None
    copied: Sequence[Path]

    def write(self, directory: Path) -> None:
        """Write them all; the configs last, so that no tokenizer replaces them."""
        if isinstance(self.tokenizer, SavesPretrained):
            self.tokenizer.save_pretrained(str(directory))
        elif self.tokenizer is not None:
            self.tokenizer(directory)
        for file in self.copied:
            shutil.copyfile(file, directory / file.name)
        write_json(directory / CONFIG_FILE, self.fields)
        write_json(directory / GENERATION_FILE, self.generation)


def plan_files(
    config: DecoderConfig,
    dtype: DTypeLike,
    *,
    hf_config: Mapping[str, Any] | None,
    generation_config: Mapping[str, Any] | None,
    tokenizer: TokenizerWriter | None,
    tokenizer_files: Sequence[str | Path],
    reserved: Sequence[str],
) -> ModelFiles:
    """Check what is to stand beside the weights.

    Args:
        config: Of the decoder.
        dtype: Of the weights on disk, float32 or bfloat16.
        hf_config: The source's own ``config.json``, kept whole except for the dtype.
        generation_config: The source's own; None or an empty one stands for the token ids of
            ``hf_config``.
        tokenizer: As ``ModelFiles`` has it.
        tokenizer_files: Files to copy.
        reserved: Names that the weights take.

    Raises:
        ValueError: for another dtype, an ``hf_config`` of another decoder, or a file that is
            absent or named like one that the export writes itself.
    """
    name = jnp.dtype(dtype).name
    require(name in _DTYPES, f"dtype {name}", f"one of {', '.join(_DTYPES)}")
    fields = config_to_hf(config, hf_config, dtype=name)
    if not generation_config:  # an empty file would hide the ids that the config names
        text = text_fields(fields)
        generation_config = {key: text[key] for key in _TOKEN_IDS if text.get(key) is not None}
    copied = [Path(file) for file in tokenizer_files]
    own = {CONFIG_FILE, GENERATION_FILE, *reserved}
    for file in copied:
        require(
            file.is_file() and file.name not in own,
            f"tokenizer file {file}",
            f"an existing file that isn't one of {', '.join(sorted(own))}",
        )
    return ModelFiles(
        fields=fields, generation=generation_config, tokenizer=tokenizer, copied=copied
    )


def check_params(params: Mapping[str, Any], config: DecoderConfig) -> dict[str, TensorSlot]:
    """The tensors that a plain tree stands for, by their Hugging Face names.

    Raises:
        ValueError: if the tree isn't that of ``config``, or not all on this process's devices.
    """
    slots = tensor_slots(params, config)
    expected = tensor_slots(abstract_params(config, jnp.float32), config)
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
    for path, leaf in walk(params):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                f"{'/'.join(path)} is spread over several processes; expected all of it on this "
                "process's devices: export from a single process"
            )
    return slots


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
