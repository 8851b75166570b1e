"""The metadata of a GGUF file as the ``config.json`` of a Hugging Face directory would have it.

GGUF keeps what llama.cpp's loader needs; some of Gemma's constants are written in that loader and
not in the file (its rotary base of local layers, which layers those are, the query scale of the
27B models), and stand here for the same architectures; so does SmolLM3's interval of layers that
don't turn.

Mistral's files call themselves ``llama`` and are read as one, without a window, which they don't
mention and llama.cpp doesn't give them: that of Mistral 7B v0.1 is of 4096 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from smoa_jax.checkpoint.errors import require
from smoa_jax.checkpoint.gguf.gemma4 import gemma4_config
from smoa_jax.checkpoint.huggingface.families import FAMILIES
from smoa_jax.checkpoint.huggingface.fields import GLOBAL, LOCAL, rope_scaling_fields, short
from smoa_jax.models.config import RopeScaling
from smoa_jax.models.rope import rope_frequencies

#: Architectures in GGUF's words -> model types in Hugging Face's.
ARCHITECTURES = {
    "llama": "llama",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
}
#: Architectures whose query and key rows lie in the order of interleaved rotary pairs: those that
#: llama.cpp converts as a Llama. SmolLM3 is one of them, Qwen and OLMo are not.
INTERLEAVED = ("llama", "smollm3")
# GGUF keeps what these make of the frequencies, not the numbers; all Llama 3 releases share them.
_LLAMA3_CONSTANTS: dict[str, Any] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_positions": 8192,
}
# Metadata (after "llama.") of layers that the architecture hasn't got, and what means off.
_MUST_BE_OFF: dict[str, dict[str, int]] = {
    "llama": {"expert_count": 0, "attention.sliding_window": 0},
    "gemma": {"expert_count": 0, "attention.sliding_window": 0},
    "gemma2": {"expert_count": 0},
    "gemma3": {"expert_count": 0, "attn_logit_softcapping": 0},
    "gemma4": {"expert_count": 0},
    "qwen2": {"expert_count": 0, "attention.sliding_window": 0},
    "qwen3": {"expert_count": 0, "attention.sliding_window": 0},
    "smollm3": {"expert_count": 0, "attention.sliding_window": 0},
    "olmo2": {"expert_count": 0, "attention.sliding_window": 0},  # OLMo 3 has windows
}
# What has a bias, by the first layer's: self_attn.q_proj and the like.
_BIASED = re.compile(r"model\.layers\.0\.(.+)\.bias")
# One global layer in so many, and the depth of the model whose query scale is sqrt(D / N).
_LOCAL_PATTERNS = {"gemma2": 2, "gemma3": 6}
_DEPTHS_OF_27B = {"gemma2": 46, "gemma3": 62}


class GgufMetadata:
    """The metadata of one file, with errors that name it.

    Args:
        source: The file, for messages.
        fields: Key -> field, as ``gguf.GGUFReader`` has them.
    """

    def __init__(self, source: str, fields: Mapping[str, Any]):
        self.source = source
        self._fields = fields
        self.architecture = self.get("general.architecture")
        require(
            self.architecture in ARCHITECTURES,
            f"architecture {self.architecture!r}",
            f"one of {', '.join(ARCHITECTURES)}",
            where=source,
        )
        require(
            self.get("split.count", 1) <= 1,
            "one part of a split GGUF",
            "a single file",
            "join the parts with `llama-gguf-split --merge`",
            where=source,
        )
        for key, off in _MUST_BE_OFF[self.architecture].items():
            require(
                self.own(key, off) == off,
                f"metadata {self._name(key)} {self.own(key)}",
                f"{off} or none",
                f"a plain {self.architecture} has no such layers",
                where=source,
            )
        require(
            self.own("attention.causal", True) is True,
            f"metadata {self._name('attention.causal')} false",
            "a language model, whose tokens see only what comes before them",
            where=source,
        )

    @property
    def model_type(self) -> str:
        """The architecture in Hugging Face's words."""
        return ARCHITECTURES[self.architecture]

    @property
    def has_post_norms(self) -> bool:
        """Whether the architecture has norms on what attention and feed-forward give."""
        return self.architecture in (*_LOCAL_PATTERNS, "gemma4", "olmo2")

    @property
    def has_offset_norms(self) -> bool:
        """Whether the file holds 1 + w where Hugging Face's norms hold w."""
        return self.architecture in ("gemma", "gemma2", "gemma3")

    def get(self, key: str, default: Any = None) -> Any:
        """The value under ``key``, or ``default`` where the file has none."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def own(self, key: str, default: Any = None) -> Any:
        """The value under the architecture's own ``key``."""
        return self.get(self._name(key), default)

    def integer(self, key: str, default: int | None = None) -> int:
        """The whole number under the architecture's own ``key``."""
        value = self.own(key, default)
        require(
            isinstance(value, int) and not isinstance(value, bool) and value >= 1,
            f"metadata {self._name(key)} {_short(value)}",
            "a whole number above 0, the same for all layers",
            where=self.source,
        )
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """The number under the architecture's own ``key``: the shortest decimal of its float32."""
        value = self.own(key, default)
        require(
            isinstance(value, int | float) and not isinstance(value, bool),
            f"metadata {self._name(key)} {_short(value)}",
            "a number",
            where=self.source,
        )
        return float(str(np.float32(value)))

    @property
    def head_dim(self) -> int:
        """The size of a head, the same for queries, keys, values and rotation."""
        heads = self.integer("attention.head_count")
        head_dim = self.integer("attention.key_length", self.integer("embedding_length") // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            require(
                self.integer(key, head_dim) == head_dim,
                f"metadata {self._name(key)} {self.integer(key, head_dim)}",
                f"the head size {head_dim}",
                where=self.source,
            )
        return head_dim

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self.integer("attention.head_count_kv", self.integer("attention.head_count"))

    def hf_config(
        self,
        *,
        vocab_size: int,
        has_head: bool,
        rope_factors: np.ndarray | None,
        names: Collection[str] = (),
    ) -> dict[str, Any]:
        """The ``config.json``.

        Args:
            vocab_size: Rows of the embedding.
            has_head: Whether the file has a head of its own.
            rope_factors: The tensor of divisors of the rotary frequencies, if there is one.
            names: Of all tensors, in Hugging Face's words.
        """
        if self.architecture == "gemma4":
            own = gemma4_config(self, rope_factors, names)
        else:
            biased = [found[1] for name in names if (found := _BIASED.fullmatch(name))]
            own = {
                "intermediate_size": self.integer("feed_forward_length"),
                "num_key_value_heads": self.num_kv_heads,
                "head_dim": self.head_dim,
                "attention_bias": any(name.startswith("self_attn.") for name in biased),
                **self._activation(biased),
                **self._rope(rope_factors),
                **self._local_layers(),
            }
        config = {
            "architectures": [FAMILIES[self.model_type].architecture],
            "model_type": self.model_type,
            "vocab_size": vocab_size,
            "hidden_size": self.integer("embedding_length"),
            "num_hidden_layers": self.integer("block_count"),
            "num_attention_heads": self.integer("attention.head_count"),
            "max_position_embeddings": self.integer("context_length"),
            "rms_norm_eps": self.real("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": not has_head,
        }
        return {**config, **own, **self.generation_config()}

    def generation_config(self) -> dict[str, Any]:
        """The special tokens' ids, as ``generation_config.json`` names them."""
        keys = {
            "bos_token_id": "bos_token_id",
            "eos_token_id": "eos_token_id",
            "pad_token_id": "padding_token_id",
        }
        values = {name: self.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
        return {name: value for name, value in values.items() if value is not None}

    def _name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _activation(self, biased: Collection[str]) -> dict[str, Any]:
        if not self.has_offset_norms:
            if self.architecture not in INTERLEAVED:
                return {"hidden_act": "silu"}
            return {"hidden_act": "silu", "mlp_bias": any(name[:4] == "mlp." for name in biased)}
        key = "hidden_act" if self.architecture == "gemma" else "hidden_activation"
        return {key: "gelu_pytorch_tanh"}

    def _local_layers(self) -> dict[str, Any]:
        """What Gemma 2 and 3 and SmolLM3 have beside a plain decoder."""
        if self.architecture == "smollm3":
            return {"no_rope_layer_interval": 4}  # a constant of llama.cpp's
        if self.architecture not in _LOCAL_PATTERNS:
            return {}
        layers, heads = self.integer("block_count"), self.integer("attention.head_count")
        pattern = self.own("attention.sliding_window_pattern", _LOCAL_PATTERNS[self.architecture])
        if isinstance(pattern, list):
            local = [bool(entry) for entry in pattern]
        else:
            local = [bool((layer + 1) % pattern) for layer in range(layers)]
        is_27b = layers == _DEPTHS_OF_27B[self.architecture]
        scalar = self.integer("embedding_length") // heads if is_27b else self.head_dim
        fields = {
            "query_pre_attn_scalar": scalar,
            "sliding_window": self.integer(
                "attention.sliding_window", 4096 if self.architecture == "gemma2" else None
            ),
            "layer_types": [LOCAL if is_local else GLOBAL for is_local in local],
        }
        if self.architecture == "gemma2":
            caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
            return {**fields, **{key: self.real(key, default) for key, default in caps.items()}}
        cap = self.own("final_logit_softcapping")
        return {
            **fields,
            "rope_local_base_freq": self.real("rope.freq_base_swa", 10000.0),
            "final_logit_softcapping": cap or None,
            "attn_logit_softcapping": None,
        }

    def _rope(self, factors: np.ndarray | None) -> dict[str, Any]:
        base = {"rope_theta": self._rope_base()}
        # As llama.cpp reads them: a factor without a type is linear, in older files too.
        key = "rope.scaling.factor"
        factor = self.real(key if self.own(key) is not None else "rope.scale_linear", 0.0)
        kind = self.own("rope.scaling.type", "linear" if factor not in (0.0, 1.0) else "none")
        if factors is not None:
            require(
                kind == "none",
                f"both rotary factors and rope.scaling.type {kind!r}",
                "one of them",
                where=self.source,
            )
            return {**base, **rope_scaling_fields(self._llama3_scaling(factors))}
        if kind == "none":
            return base
        return {**base, "rope_scaling": {"rope_type": kind, "factor": factor or None}}

    def _rope_base(self) -> float:
        return self.real("rope.freq_base", 1e6 if self.architecture == "gemma3" else 10000.0)

    def _llama3_scaling(self, factors: np.ndarray) -> RopeScaling:
        """The Llama 3 scaling whose divisors of the frequencies the file holds as a tensor."""
        scaling = RopeScaling(kind="llama3", factor=float(factors.max()), **_LLAMA3_CONSTANTS)
        plain = rope_frequencies(self.head_dim, self._rope_base(), RopeScaling())
        expected = plain / rope_frequencies(self.head_dim, self._rope_base(), scaling)
        require(
            factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4),
            "rope_freqs.weight with other factors than Llama 3's rotary scaling",
            "those of Llama 3.1 to 3.3",
            "use the safetensors of this model",
            where=self.source,
        )
        return scaling


def _short(value: object) -> str:
    return "missing" if value is None else short(value)
