"""A GGUF file as a checkpoint: tensors dequantised row by row, the config from its metadata.

GGUF keeps the rows of Llama's query and key projections (SmolLM3's too, and their biases) in the
order of interleaved rotary pairs, where Hugging Face (and our decoder) rotate the first half of a
head against the second, and Gemma's norms as 1 + w, where Hugging Face has w. Both are undone here,
so nothing downstream knows where the weights came from. The fingerprint is over the bytes as
stored, quantised and in the file's own order.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFEndian, GGUFReader, GGUFValueType
from gguf.quants import dequantize

from smoa_jax.checkpoint.assemble import Index, StoredTensor
from smoa_jax.checkpoint.errors import CheckpointError, require
from smoa_jax.checkpoint.gguf.config import INTERLEAVED, GgufMetadata
from smoa_jax.checkpoint.names import EMBEDDING_NAME, HEAD_NAME, name_of_gguf

_ROPE_FACTORS = "rope_freqs.weight"

# Values dequantised at a time: a few MiB, so that a large embedding has no large temporaries.
_CHUNK_VALUES = 2**21
_ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(?:weight|bias)")


class _WholeFileReader(GGUFReader):
    """The library's reader, for files that may be damaged and vocabularies that are large.

    It refuses to read past the end of the file instead of reading less: a corrupted array length
    would make it loop for as long as the length says. And it takes an array of numbers at once and
    steps over an array of strings, of which only the tokenizer's reader has any use: item by item
    a Gemma's vocabulary takes as long as its weights.
    """

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if int(offset) < 0 or int(count) < 0 or end > self.data.shape[0]:
            raise ValueError(f"it ends at byte {self.data.shape[0]} but points to byte {end}")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        parts, types = [kind, count], [GGUFValueType.ARRAY, GGUFValueType(kind[0])]
        scalar = self.gguf_scalar_to_np.get(types[1])
        if scalar is not None:
            values = self._get(orig_offs + 12, scalar, count[0])
            return 12 + int(values.nbytes), [*parts, values], [2], types
        if types[1] != GGUFValueType.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        start = orig_offs + 12
        for _ in range(int(count[0])):
            start += 8 + int.from_bytes(self.data[start : start + 8].tobytes(), "little")
            if start > self.data.shape[0]:
                raise ValueError(f"it ends at byte {self.data.shape[0]}, within its strings")
        return start - orig_offs, parts, [], types


class GgufFile:
    """The tensors of a GGUF file under Hugging Face names, and its metadata.

    Example:

        file = GgufFile(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
        file.read("model.embed_tokens.weight", (slice(0, 8), slice(None)))
    """

    def __init__(self, path: Path):
        self.source = str(path)
        try:
            reader = _WholeFileReader(path)
        except (ValueError, KeyError, IndexError, OverflowError, OSError, MemoryError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path}: not a whole GGUF file ({reason}); expected an intact one: "
                "download or copy it again"
            ) from error
        require(
            reader.endianess is GGUFEndian.LITTLE,
            "a big-endian GGUF file",
            "a little-endian one",
            where=path,
        )
        self.metadata = GgufMetadata(self.source, reader.fields)
        self._stored = {}
        self.tensors: dict[str, StoredTensor] = {}
        for tensor in reader.tensors:
            known = name_of_gguf(tensor.name, post_norms=self.metadata.has_post_norms)
            name = known or tensor.name
            shape = tuple(int(size) for size in reversed(tensor.shape))
            self._stored[name] = tensor
            self.tensors[name] = StoredTensor(shape=shape, dtype=tensor.tensor_type.name)
        self.tensors.pop(_ROPE_FACTORS, None)  # part of the config, not of the params
        self._orders = {}
        if self.metadata.architecture in INTERLEAVED:
            heads = self.metadata.integer("attention.head_count")
            self._orders = {
                "q": _rotary_order(heads, self.metadata.head_dim),
                "k": _rotary_order(self.metadata.num_kv_heads, self.metadata.head_dim),
            }

    def read(self, name: str, index: Index) -> np.ndarray:
        tensor = self._stored[name]
        shape = self.tensors[name].shape
        rows = np.arange(shape[0])
        if self._orders and (rotated := _ROTATED.fullmatch(name)):
            order = self._orders[rotated.group(1)]
            require(
                len(order) == len(rows),
                f"{name} of {len(rows)} rows",
                f"{len(order)}",
                where=self.source,
            )
            rows = order
        if len(shape) == 1:
            values = self._dequantize(name, tensor.data)[rows][index]
            is_offset = self.metadata.has_offset_norms and name.endswith("norm.weight")
            return values - 1 if is_offset else values
        rows = rows[index[0]]
        columns = len(range(*index[1].indices(shape[1])))
        values = np.empty((len(rows), columns), np.float32)
        step = max(1, _CHUNK_VALUES // shape[1])
        for start in range(0, len(rows), step):
            some = tensor.data[rows[start : start + step]]
            values[start : start + step] = self._dequantize(name, some)[:, index[1]]
        return values

    def ends(self, name: str, size: int) -> tuple[bytes, bytes]:
        data = self._stored[name].data.reshape(-1).view(np.uint8)
        return data[:size].tobytes(), data[max(0, data.size - size) :].tobytes()

    def _dequantize(self, name: str, data: np.ndarray) -> np.ndarray:
        try:
            return dequantize(data, self._stored[name].tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.source}: {name} is stored as {self.tensors[name].dtype}, which the gguf "
                "package can't dequantise; expected a float or one of its quantisations"
            ) from error

    def hf_config(self) -> dict[str, Any]:
        """The metadata as the ``config.json`` of a Hugging Face directory would have it."""
        require(
            EMBEDDING_NAME in self.tensors,
            "a file without token_embd.weight",
            "a language model",
            where=self.source,
        )
        factors = None
        if _ROPE_FACTORS in self._stored:
            stored = self._stored[_ROPE_FACTORS]
            factors = self._dequantize(_ROPE_FACTORS, stored.data).reshape(-1)
        return self.metadata.hf_config(
            vocab_size=self.tensors[EMBEDDING_NAME].shape[0],
            has_head=HEAD_NAME in self.tensors,
            rope_factors=factors,
            names=self.tensors,
        )

    def generation_config(self) -> dict[str, Any]:
        """The special tokens' ids, as ``generation_config.json`` names them."""
        return self.metadata.generation_config()


def _rotary_order(num_heads: int, head_dim: int) -> np.ndarray:
    """For each row of Hugging Face's layout, the row of the file that holds it.

    Within a head the file alternates between the two halves: row ``2 j + c`` of the file is row
    ``c * head_dim / 2 + j`` here.
    """
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)
