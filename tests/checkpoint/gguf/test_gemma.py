"""GGUF files of Gemma: the same weights and config as the Hugging Face directory they came from.

The files are written here as llama.cpp's converter lays them out: norms as 1 + w, rows of queries
and keys in Hugging Face's own order, names spelt out a second time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.gguf.config import GgufMetadata
from smoa_jax.checkpoint.huggingface.config import config_from_hf
from smoa_jax.models.config import RopeScaling

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
CONFIGS = {
    "gemma": {**SIZES, "model_type": "gemma", "rope_theta": 10000.0},
    "gemma2": {
        **SIZES,
        "model_type": "gemma2",
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "attn_logit_softcapping": 40.0,
        "final_logit_softcapping": 20.0,
    },
    "gemma3": {
        **SIZES,
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
LAYER_NAMES = {
    "gemma": {**NAMES, "post_attention_layernorm": "ffn_norm"},
    "gemma2": {**NAMES, **POST_NORMS},
    "gemma3": {
        **NAMES,
        **POST_NORMS,
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    },
}


def tensors_of(architecture: str) -> dict[str, tuple[str, np.ndarray]]:
    """Hugging Face name -> (GGUF name, random weight in Hugging Face's form)."""
    rng = np.random.default_rng(0)
    embed, mlp, query, key = 32, 48, 64, 32
    shapes = {
        "self_attn.q_proj": (query, embed),
        "self_attn.k_proj": (key, embed),
        "self_attn.v_proj": (key, embed),
        "self_attn.o_proj": (embed, query),
        "self_attn.q_norm": (16,),
        "self_attn.k_norm": (16,),
        "mlp.gate_proj": (mlp, embed),
        "mlp.up_proj": (mlp, embed),
        "mlp.down_proj": (embed, mlp),
    }
    found = {
        "model.embed_tokens.weight": ("token_embd.weight", (64, embed)),
        "model.norm.weight": ("output_norm.weight", (embed,)),
    }
    for layer in range(SIZES["num_hidden_layers"]):
        for theirs, ours in LAYER_NAMES[architecture].items():
            shape = shapes.get(theirs, (embed,))
            found[f"model.layers.{layer}.{theirs}.weight"] = (f"blk.{layer}.{ours}.weight", shape)
    return {
        name: (other, rng.standard_normal(shape).astype(np.float32))
        for name, (other, shape) in found.items()
    }


def write_gguf(path: Path, architecture: str, extra: dict[str, Any] | None = None) -> Path:
    config = CONFIGS[architecture]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(40.0)
        writer.add_final_logit_softcapping(20.0)
    if architecture == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    for key, value in (extra or {}).items():
        add = writer.add_array if isinstance(value, list) else writer.add_float32
        add(f"{architecture}.{key}", value)
    for name, (other, weight) in tensors_of(architecture).items():
        writer.add_tensor(other, weight + 1 if name.endswith("norm.weight") else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_directory(directory: Path, architecture: str) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIGS[architecture]))
    tensors = {name: weight for name, (_, weight) in tensors_of(architecture).items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_gguf_file_is_the_model_of_its_directory(tmp_path, architecture):
    there = load_base(write_gguf(tmp_path / "m.gguf", architecture))
    here = load_base(write_directory(tmp_path / "hf", architecture))
    assert there.config == here.config
    assert config_from_hf(there.hf_config) == here.config

    def compare(one, other):
        np.testing.assert_allclose(one, other, atol=1e-6)

    jax.tree.map(compare, there.params, here.params)


def test_what_newer_files_say_of_local_layers_is_heeded(tmp_path):
    extra = {
        "attention.sliding_window_pattern": [True, False] * 3 + [True],
        "rope.freq_base_swa": 500.0,
    }
    config = load_base(write_gguf(tmp_path / "m.gguf", "gemma3", extra)).config
    assert config.local_layers == (True, False, True, False, True, False, True)
    assert config.local_rope_base == 500.0
    assert config.rope_scaling == RopeScaling(kind="linear", factor=8.0)


def test_a_soft_cap_that_gemma_3_has_no_place_for_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "gemma3", {"attn_logit_softcapping": 30.0})
    with pytest.raises(CheckpointError, match=r"gemma3.attn_logit_softcapping 30\.0; expected"):
        load_base(path)


class Field:
    """What ``gguf.GGUFReader`` keeps of one entry."""

    def __init__(self, value: Any):
        self._value = value

    def contents(self) -> Any:
        return self._value


@pytest.mark.parametrize(
    ("architecture", "layers", "embed_dim", "head_dim", "scalar"),
    [
        ("gemma2", 42, 3584, 256, 256),
        ("gemma2", 46, 4608, 128, 144),
        ("gemma3", 48, 3840, 256, 256),
        ("gemma3", 62, 5376, 128, 168),
    ],
)
def test_the_query_scale_of_the_27b_models_is_that_of_their_makers(
    architecture, layers, embed_dim, head_dim, scalar
):
    own = {
        "block_count": layers,
        "embedding_length": embed_dim,
        "feed_forward_length": 64,
        "context_length": 128,
        "attention.head_count": 16 if head_dim == 256 else 32,
        "attention.key_length": head_dim,
        "attention.sliding_window": 1024,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    fields = {f"{architecture}.{key}": Field(value) for key, value in own.items()}
    fields["general.architecture"] = Field(architecture)
    metadata = GgufMetadata("m.gguf", fields)
    config = metadata.hf_config(vocab_size=64, has_head=False, rope_factors=None)
    assert config["query_pre_attn_scalar"] == scalar
    assert config_from_hf(config).attention_scale == scalar**-0.5
