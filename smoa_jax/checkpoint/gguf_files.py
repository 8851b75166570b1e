"""A GGUF file as a checkpoint: tensors dequantised row by row, the config from its metadata.

GGUF keeps the rows of Llama's query and key projections in the order of interleaved rotary pairs;
Hugging Face (and our decoder) rotate the first half of a head against the second. Rows are put
back in Hugging Face's order here, so nothing downstream knows where the weights came from. The
fingerprint is over the bytes as stored, quantised and in the file's own order.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFEndian, GGUFReader
from gguf.quants import dequantize

from smoa_jax.checkpoint.assemble import Index, StoredTensor
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.hf_config import rope_scaling_fields
from smoa_jax.checkpoint.names import EMBEDDING_NAME, HEAD_NAME, name_of_gguf
from smoa_jax.models.config import RopeScaling
from smoa_jax.models.rope import rope_frequencies

ARCHITECTURES = ("llama",)

_ROPE_FACTORS = "rope_freqs.weight"
# GGUF keeps what these make of the frequencies, not the numbers; all Llama 3 releases share them.
_LLAMA3_CONSTANTS: dict[str, Any] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_positions": 8192,
}

# Values dequantised at a time: a few MiB, so that a large embedding has no large temporaries.
_CHUNK_VALUES = 2**21
_ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.weight")
# Metadata (after "llama.") of layers that a plain Llama hasn't got, with the value that means off.
_MUST_BE_OFF = {"expert_count": 0, "attention.sliding_window": 0}


class _WholeFileReader(GGUFReader):
    """The library's reader, refusing to read past the end of the file instead of reading less.

    Without this a corrupted array length makes it loop for as long as the length says.
    """

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if int(offset) < 0 or int(count) < 0 or end > self.data.shape[0]:
            raise ValueError(f"it ends at byte {self.data.shape[0]} but points to byte {end}")
        return super()._get(offset, dtype, count, override_order)


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
        if reader.endianess is not GGUFEndian.LITTLE:
            raise CheckpointError(f"{path}: a big-endian GGUF file; expected a little-endian one")
        self._fields = reader.fields
        self._stored = {}
        self.tensors: dict[str, StoredTensor] = {}
        for tensor in reader.tensors:
            name = name_of_gguf(tensor.name) or tensor.name
            shape = tuple(int(size) for size in reversed(tensor.shape))
            self._stored[name] = tensor
            self.tensors[name] = StoredTensor(shape=shape, dtype=tensor.tensor_type.name)
        self.tensors.pop(_ROPE_FACTORS, None)  # part of the config, not of the params
        self._check_architecture()
        self._orders = {
            "q": _rotary_order(self.integer("attention.head_count"), self._head_dim()),
            "k": _rotary_order(self._kv_heads(), self._head_dim()),
        }

    def metadata(self, key: str, default: Any = None) -> Any:
        """The value under ``key``, or ``default`` where the file has none."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def integer(self, key: str, default: int | None = None) -> int:
        """The whole number under ``llama.key``."""
        value = self.metadata(f"llama.{key}", default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{self.source}: metadata llama.{key} is {_short(value)}; expected a whole number "
                "above 0, the same for all layers"
            )
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """The number under ``llama.key``: the shortest decimal that gives its float32."""
        value = self.metadata(f"llama.{key}", default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(
                f"{self.source}: metadata llama.{key} is {_short(value)}; expected a number"
            )
        return float(str(np.float32(value)))

    def read(self, name: str, index: Index) -> np.ndarray:
        tensor = self._stored[name]
        shape = self.tensors[name].shape
        if len(shape) == 1:
            return self._dequantize(name, tensor.data)[index]
        rows = np.arange(shape[0])
        if rotated := _ROTATED.fullmatch(name):
            order = self._orders[rotated.group(1)]
            if len(order) != len(rows):
                raise CheckpointError(
                    f"{self.source}: {name} has {len(rows)} rows; expected {len(order)}"
                )
            rows = order
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

    def _check_architecture(self) -> None:
        architecture = self.metadata("general.architecture")
        if architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{self.source}: architecture {architecture!r}; "
                f"expected one of {', '.join(ARCHITECTURES)}"
            )
        if self.metadata("split.count", 1) > 1:
            raise CheckpointError(
                f"{self.source}: one part of a split GGUF; expected a single file: "
                "join the parts with `llama-gguf-split --merge`"
            )
        for key, off in _MUST_BE_OFF.items():
            if self.metadata(f"llama.{key}", off) != off:
                raise CheckpointError(
                    f"{self.source}: metadata llama.{key} is {self.metadata(f'llama.{key}')}; "
                    f"expected {off} or none: a plain Llama has no such layers"
                )

    def _head_dim(self) -> int:
        heads = self.integer("attention.head_count")
        head_dim = self.integer("attention.key_length", self.integer("embedding_length") // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.integer(key, head_dim) != head_dim:
                raise CheckpointError(
                    f"{self.source}: metadata llama.{key} is {self.integer(key)}; "
                    f"expected the head size {head_dim}"
                )
        return head_dim

    def _kv_heads(self) -> int:
        return self.integer("attention.head_count_kv", self.integer("attention.head_count"))

    def hf_config(self) -> dict[str, Any]:
        """The metadata as the ``config.json`` of a Hugging Face directory would have it."""
        if EMBEDDING_NAME not in self.tensors:
            raise CheckpointError(f"{self.source}: no token_embd.weight; expected a language model")
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.tensors[EMBEDDING_NAME].shape[0],
            "hidden_size": self.integer("embedding_length"),
            "intermediate_size": self.integer("feed_forward_length"),
            "num_hidden_layers": self.integer("block_count"),
            "num_attention_heads": self.integer("attention.head_count"),
            "num_key_value_heads": self._kv_heads(),
            "head_dim": self._head_dim(),
            "hidden_act": "silu",
            "max_position_embeddings": self.integer("context_length"),
            "rms_norm_eps": self.real("attention.layer_norm_rms_epsilon"),
            "rope_theta": self.real("rope.freq_base", 10000.0),
            "tie_word_embeddings": HEAD_NAME not in self.tensors,
            "attention_bias": False,
            "mlp_bias": False,
        }
        return {**config, **self._rope_scaling(), **self.generation_config()}

    def _rope_scaling(self) -> dict[str, Any]:
        kind = self.metadata("llama.rope.scaling.type", "none")
        if _ROPE_FACTORS in self._stored:
            if kind != "none":
                raise CheckpointError(
                    f"{self.source}: both {_ROPE_FACTORS} and rope.scaling.type {kind!r}; "
                    "expected one of them"
                )
            return rope_scaling_fields(self._llama3_scaling())
        if kind == "none":
            return {}
        return {"rope_scaling": {"rope_type": kind, "factor": self.real("rope.scaling.factor")}}

    def _llama3_scaling(self) -> RopeScaling:
        """The Llama 3 scaling whose divisors of the frequencies the file holds as a tensor."""
        stored = self._dequantize(_ROPE_FACTORS, self._stored[_ROPE_FACTORS].data).reshape(-1)
        head_dim, base = self._head_dim(), self.real("rope.freq_base", 10000.0)
        scaling = RopeScaling(kind="llama3", factor=float(stored.max()), **_LLAMA3_CONSTANTS)
        plain = rope_frequencies(head_dim, base, RopeScaling())
        expected = plain / rope_frequencies(head_dim, base, scaling)
        if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
            raise CheckpointError(
                f"{self.source}: {_ROPE_FACTORS} holds other factors than Llama 3's rotary "
                "scaling; expected those of Llama 3.1 to 3.3: use the safetensors of this model"
            )
        return scaling

    def generation_config(self) -> dict[str, Any]:
        """The special tokens' ids, as ``generation_config.json`` names them."""
        keys = {
            "bos_token_id": "bos_token_id",
            "eos_token_id": "eos_token_id",
            "pad_token_id": "padding_token_id",
        }
        values = {name: self.metadata(f"tokenizer.ggml.{key}") for name, key in keys.items()}
        return {name: value for name, value in values.items() if value is not None}


def _rotary_order(num_heads: int, head_dim: int) -> np.ndarray:
    """For each row of Hugging Face's layout, the row of the file that holds it.

    Within a head the file alternates between the two halves: row ``2 j + c`` of the file is row
    ``c * head_dim / 2 + j`` here.
    """
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _short(value: object) -> str:
    return "missing" if value is None else repr(value)[:60]
