"""The ``config.json`` of every real model that tests and ``configs/`` speak of, with its size.

Fields are those that the models' makers publish, values and omissions alike: Llama 2 says no
``rope_theta``, Llama 3.1 no ``head_dim``, Gemma 1 still says ``gelu``, Gemma 3 from 4B up is
multimodal and leaves all but a few sizes to defaults, and Qwen names windows that it doesn't use.
Only fields that describe no function (token ids, dtypes, versions, the vision tower) are left out.

``parameters`` are published numbers, never computed here; ``source`` says whose:

- "hub": the parameter total that the hub reads from the headers of the model's safetensors files;
- "KerasHub": the exact count beside the preset in KerasHub's model list. It counts a trimmed
  vocabulary for Gemma 3 from 4B up, hence not used there.

Where a total holds more than the decoder, ``parameters`` is written as the difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from smoa_jax.checkpoint.huggingface.config import config_from_hf
from smoa_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealModel:
    """A published model: what its file says, and how many parameters its decoder has."""

    fields: Mapping[str, Any]
    parameters: int
    source: str
    repository: str

    @property
    def config(self) -> DecoderConfig:
        return config_from_hf(self.fields, self.repository)


def _sizes(layers: int, embed: int, mlp: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
    }


# --------------------------------------------------------------------------------------- Llama

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
_LLAMA_2 = {
    **_LLAMA,
    "max_position_embeddings": 4096,
    "rope_scaling": None,
    "vocab_size": 32000,
}
_LLAMA_3 = {
    **_LLAMA,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


_LLAMA_31 = {**_LLAMA_3, "rope_scaling": _llama3_rope(8.0)}
_LLAMA_32 = {**_LLAMA_3, "rope_scaling": _llama3_rope(32.0), "tie_word_embeddings": True}
_SMOLLM2 = {
    **_LLAMA,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
_INV_FREQ = "hub, less the 64 inverse frequencies that every layer of the files also stores"

# --------------------------------------------------------------------------------------- Gemma

_GEMMA_1 = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
_GEMMA_2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
_GEMMA_3_TEXT = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "vocab_size": 262144,
}
_EVERY_SIXTH = ["sliding_attention"] * 5 + ["full_attention"]


def _gemma_3(**text: Any) -> dict[str, Any]:
    """A multimodal file: whatever ``text`` leaves out is the default of the model type."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            **text,
        },
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


#: SigLIP So400m at 896 pixels, as every multimodal Gemma 3 has it: what KerasHub's counts with and
#: without vision differ by, less the projector.
_VISION_TOWER = 416_866_032
_LESS_VISION = "hub, less the vision tower and the projector (1152 x (D + 1))"


def _projector(embed: int) -> int:
    return 1152 * (embed + 1)


# -------------------------------------------------------------------------------------- neighbours

_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
_QWEN_25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
_OLMO_2 = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}

# --------------------------------------------------------------------------------------- the table

REAL_MODELS: dict[str, RealModel] = {
    "SmolLM2-135M": RealModel(
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        fields={**_SMOLLM2, **_sizes(30, 576, 1536, 9, 3)},
        parameters=134_515_008,
        source="hub",
    ),
    "Llama-2-7B": RealModel(
        repository="meta-llama/Llama-2-7b-hf",
        fields={**_LLAMA_2, **_sizes(32, 4096, 11008, 32, 32)},
        parameters=6_738_417_664 - 32 * 64,
        source=_INV_FREQ,
    ),
    "Llama-2-13B": RealModel(
        repository="meta-llama/Llama-2-13b-hf",
        fields={**_LLAMA_2, **_sizes(40, 5120, 13824, 40, 40)},
        parameters=13_015_866_880 - 40 * 64,
        source=_INV_FREQ,
    ),
    "Llama-2-70B": RealModel(
        repository="meta-llama/Llama-2-70b-hf",
        fields={**_LLAMA_2, **_sizes(80, 8192, 28672, 64, 8)},
        parameters=68_976_653_312 - 80 * 64,
        source=_INV_FREQ,
    ),
    "Llama-3.1-8B": RealModel(
        repository="meta-llama/Llama-3.1-8B",
        fields={**_LLAMA_31, **_sizes(32, 4096, 14336, 32, 8)},
        parameters=8_030_261_248,
        source="hub",
    ),
    "Llama-3.1-70B": RealModel(
        repository="meta-llama/Llama-3.1-70B",
        fields={**_LLAMA_31, **_sizes(80, 8192, 28672, 64, 8)},
        parameters=70_553_706_496,
        source="hub",
    ),
    "Llama-3.1-405B": RealModel(
        repository="meta-llama/Llama-3.1-405B",
        fields={**_LLAMA_31, **_sizes(126, 16384, 53248, 128, 8)},
        parameters=405_853_388_800,
        source="hub",
    ),
    "Llama-3.2-1B": RealModel(
        repository="meta-llama/Llama-3.2-1B",
        fields={**_LLAMA_32, "head_dim": 64, **_sizes(16, 2048, 8192, 32, 8)},
        parameters=1_235_814_400,
        source="hub",
    ),
    "Llama-3.2-3B": RealModel(
        repository="meta-llama/Llama-3.2-3B",
        fields={**_LLAMA_32, "head_dim": 128, **_sizes(28, 3072, 8192, 24, 8)},
        parameters=3_212_749_824,
        source="hub",
    ),
    "Gemma-1-2B": RealModel(
        repository="google/gemma-2b",
        fields={**_GEMMA_1, **_sizes(18, 2048, 16384, 8, 1)},
        parameters=2_506_172_416,
        source="KerasHub",
    ),
    "Gemma-1-7B": RealModel(
        repository="google/gemma-7b",
        fields={**_GEMMA_1, **_sizes(28, 3072, 24576, 16, 16)},
        parameters=8_537_680_896,
        source="KerasHub",
    ),
    "Gemma-2-2B": RealModel(
        repository="google/gemma-2-2b",
        fields={**_GEMMA_2, **_sizes(26, 2304, 9216, 8, 4)},
        parameters=2_614_341_888,
        source="hub and KerasHub",
    ),
    "Gemma-2-9B": RealModel(
        repository="google/gemma-2-9b",
        fields={**_GEMMA_2, "sliding_window_size": 4096, **_sizes(42, 3584, 14336, 16, 8)},
        parameters=9_241_705_984,
        source="hub and KerasHub",
    ),
    "Gemma-2-27B": RealModel(
        repository="google/gemma-2-27b",
        fields={
            **_GEMMA_2,
            "head_dim": 128,
            "query_pre_attn_scalar": 144,
            "sliding_window_size": 4096,
            **_sizes(46, 4608, 36864, 32, 16),
        },
        parameters=27_227_128_320,
        source="hub and KerasHub",
    ),
    "Gemma-3-270M": RealModel(
        repository="google/gemma-3-270m",
        fields={
            **_GEMMA_3_TEXT,
            "_sliding_window_pattern": 6,
            "layer_types": _EVERY_SIXTH * 3,
            "use_bidirectional_attention": False,
            **_sizes(18, 640, 2048, 4, 1),
        },
        parameters=268_098_176,
        source="KerasHub",
    ),
    "Gemma-3-1B": RealModel(
        repository="google/gemma-3-1b-it",
        fields={
            **_GEMMA_3_TEXT,
            "cache_implementation": "hybrid",
            "sliding_window_pattern": 6,
            **_sizes(26, 1152, 6912, 4, 1),
        },
        parameters=999_885_952,
        source="hub and KerasHub",
    ),
    "Gemma-3-4B": RealModel(
        repository="google/gemma-3-4b-it",
        fields=_gemma_3(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
        parameters=4_300_079_472 - _VISION_TOWER - _projector(2560),
        source=_LESS_VISION,
    ),
    "Gemma-3-12B": RealModel(
        repository="google/gemma-3-12b-it",
        fields=_gemma_3(**_sizes(48, 3840, 15360, 16, 8)),
        parameters=12_187_325_040 - _VISION_TOWER - _projector(3840),
        source=_LESS_VISION,
    ),
    "Gemma-3-27B": RealModel(
        repository="google/gemma-3-27b-it",
        fields=_gemma_3(head_dim=128, query_pre_attn_scalar=168, **_sizes(62, 5376, 21504, 32, 16)),
        parameters=27_432_406_640 - _VISION_TOWER - _projector(5376),
        source=_LESS_VISION,
    ),
    "Mistral-7B-v0.1": RealModel(
        repository="mistralai/Mistral-7B-v0.1",
        fields={
            **_MISTRAL,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": 32000,
            **_sizes(32, 4096, 14336, 32, 8),
        },
        parameters=7_241_732_096,
        source="hub",
    ),
    "Mistral-7B-v0.3": RealModel(
        repository="mistralai/Mistral-7B-v0.3",
        fields={
            **_MISTRAL,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "vocab_size": 32768,
            **_sizes(32, 4096, 14336, 32, 8),
        },
        parameters=7_248_023_552,
        source="hub",
    ),
    "Ministral-8B": RealModel(
        repository="mistralai/Ministral-8B-Instruct-2410",
        fields={
            **_MISTRAL,
            "head_dim": 128,
            "rope_theta": 100000000.0,
            "sliding_window": 32768,
            "vocab_size": 131072,
            **_sizes(36, 4096, 12288, 32, 8),
        },
        parameters=8_019_808_256,
        source="hub",
    ),
    "Qwen2.5-0.5B": RealModel(
        repository="Qwen/Qwen2.5-0.5B",
        fields={
            **_QWEN_25,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "vocab_size": 151936,
            **_sizes(24, 896, 4864, 14, 2),
        },
        parameters=494_032_768,
        source="hub",
    ),
    "Qwen2.5-7B": RealModel(
        repository="Qwen/Qwen2.5-7B",
        fields={
            **_QWEN_25,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "sliding_window": 131072,
            "use_mrope": False,
            **_sizes(28, 3584, 18944, 28, 4),
        },
        parameters=7_615_616_512,
        source="hub",
    ),
    "Qwen2.5-72B": RealModel(
        repository="Qwen/Qwen2.5-72B-Instruct",
        fields={
            **_QWEN_25,
            "max_position_embeddings": 32768,
            "max_window_layers": 70,
            "sliding_window": 131072,
            **_sizes(80, 8192, 29568, 64, 8),
        },
        parameters=72_706_203_648,
        source="hub",
    ),
    "Qwen3-0.6B": RealModel(
        repository="Qwen/Qwen3-0.6B",
        fields={
            **_QWEN_3,
            "max_window_layers": 28,
            "tie_word_embeddings": True,
            **_sizes(28, 1024, 3072, 16, 8),
        },
        parameters=751_632_384 - 151_936 * 1024,
        source="hub, less the head that the file stores beside the embedding, equal to it",
    ),
    "Qwen3-8B": RealModel(
        repository="Qwen/Qwen3-8B",
        fields={**_QWEN_3, "max_window_layers": 36, **_sizes(36, 4096, 12288, 32, 8)},
        parameters=8_190_735_360,
        source="hub",
    ),
    "Qwen3-32B": RealModel(
        repository="Qwen/Qwen3-32B",
        fields={**_QWEN_3, "max_window_layers": 64, **_sizes(64, 5120, 25600, 64, 8)},
        parameters=32_762_123_264,
        source="hub",
    ),
    "SmolLM3-3B": RealModel(
        repository="HuggingFaceTB/SmolLM3-3B",
        fields={**_SMOLLM3, **_sizes(36, 2048, 11008, 16, 4)},
        parameters=3_075_098_624,
        source="hub",
    ),
    "OLMo-2-7B": RealModel(
        repository="allenai/OLMo-2-1124-7B",
        fields={**_OLMO_2, **_sizes(32, 4096, 11008, 32, 32)},
        parameters=7_298_617_344,
        source="hub",
    ),
    "OLMo-2-32B": RealModel(
        repository="allenai/OLMo-2-0325-32B",
        fields={**_OLMO_2, **_sizes(64, 5120, 27648, 40, 8)},
        parameters=32_234_279_936,
        source="hub",
    ),
}


# ------------------------------------------------------------------------------------- Gemma 4
# As Google's files say them, in its spelling; the multimodal ones leave no size of the decoder out.

_GEMMA_4_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1000000.0,
    },
}


def _gemma_4(period: int, positions: int, model_type: str = "gemma4", **text: Any) -> dict:
    layers = text["num_hidden_layers"]
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": model_type,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": f"{model_type}_text",
            "attention_bias": False,
            "final_logit_softcapping": 30.0,
            "global_head_dim": 512,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": [
                "sliding_attention" if (layer + 1) % period else "full_attention"
                for layer in range(layers)
            ],
            "max_position_embeddings": positions,
            "rms_norm_eps": 1e-06,
            "rope_parameters": _GEMMA_4_ROPE,
            "tie_word_embeddings": True,
            "vocab_size": 262144,
            **text,
        },
    }


_COUNTED = "counted once from transformers' own modules on the meta device"
REAL_GEMMA4: dict[str, RealModel] = {
    "Gemma-4-E2B": RealModel(
        repository="google/gemma-4-E2B-it",
        fields=_gemma_4(
            5,
            131072,
            **_sizes(35, 1536, 6144, 8, 1),
            attention_k_eq_v=False,
            hidden_size_per_layer_input=256,
            num_kv_shared_layers=20,
            sliding_window=512,
            use_double_wide_mlp=True,
            vocab_size_per_layer_input=262144,
        ),
        parameters=4_628_569_379,
        source=_COUNTED,
    ),
    "Gemma-4-E4B": RealModel(
        repository="google/gemma-4-E4B-it",
        fields=_gemma_4(
            6,
            131072,
            **_sizes(42, 2560, 10240, 8, 2),
            attention_k_eq_v=False,
            hidden_size_per_layer_input=256,
            num_kv_shared_layers=18,
            sliding_window=512,
            use_double_wide_mlp=False,
            vocab_size_per_layer_input=262144,
        ),
        parameters=7_463_013_418,
        source=_COUNTED,
    ),
    "Gemma-4-12B": RealModel(
        repository="google/gemma-4-12B-it",
        fields=_gemma_4(
            6,
            262144,
            "gemma4_unified",
            **_sizes(48, 3840, 15360, 16, 8),
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            num_kv_shared_layers=0,
            sliding_window=1024,
            use_bidirectional_attention="vision",
        ),
        parameters=11_907_350_320,
        source=_COUNTED,
    ),
    "Gemma-4-31B": RealModel(
        repository="google/gemma-4-31B-it",
        fields=_gemma_4(
            6,
            262144,
            **_sizes(60, 5376, 21504, 32, 16),
            attention_k_eq_v=True,
            hidden_size_per_layer_input=0,
            num_global_key_value_heads=4,
            num_kv_shared_layers=0,
            sliding_window=1024,
            use_bidirectional_attention="vision",
        ),
        parameters=30_697_345_340,
        source=_COUNTED,
    ),
}
