"""A Gemma 4's GGUF file: the weights and config of the directory it came from.

The names are those that the gguf package gives Hugging Face's, the metadata is laid out as
llama.cpp's converter does it: plain keys for global layers, lists where layers differ.
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
from smoa_jax.checkpoint.huggingface.config import config_from_hf
from smoa_jax.checkpoint.names import tensor_slots
from smoa_jax.models.params import abstract_params

LOCAL, GLOBAL = "sliding_attention", "full_attention"
COMMON: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 6,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 4,
    "max_position_embeddings": 128,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        LOCAL: {"rope_type": "default", "rope_theta": 1e4},
        GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "e2b": {
        **COMMON,
        "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL, GLOBAL],
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 12,
        "vocab_size_per_layer_input": 64,
    },
    "31b": {
        **COMMON,
        "layer_types": [LOCAL, LOCAL, GLOBAL] * 2,
        "num_hidden_layers": 6,
        "num_key_value_heads": 3,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
    },
}


def tensors_of(kind: str) -> dict[str, np.ndarray]:
    config = config_from_hf(CONFIGS[kind])
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(slot.shape).astype(np.float32)
        for name, slot in tensor_slots(abstract_params(config), config).items()
    }
    if kind == "e2b":  # the unused keys that Google ships
        tensors["model.layers.5.self_attn.k_proj.weight"] = np.zeros((8, 32), np.float32)
    return tensors


def write_directory(directory: Path, kind: str) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIGS[kind]))
    save_file(tensors_of(kind), directory / "model.safetensors")
    return directory


def gguf_name(name: str) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, 8)
    suffix = "" if name.endswith("layer_scalar") else ".weight"
    return f"{names.get_name(name.removesuffix('.weight'))}{suffix or '.weight'}"


def write_gguf(path: Path, kind: str, **changes: Any) -> Path:
    fields = {**CONFIGS[kind], **changes}
    local = [entry == LOCAL for entry in fields["layer_types"]]
    count, shared = len(local), fields.get("num_kv_shared_layers", 0)
    writer = gguf.GGUFWriter(path, "gemma4")
    writer.add_block_count(count)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_head_count(6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_final_logit_softcapping(30.0)
    writer.add_sliding_window(4)
    writer.add_sliding_window_pattern(local)
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(fields["hidden_size_per_layer_input"])
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_key_length_swa(8)
    writer.add_value_length_swa(8)
    writer.add_rope_dimension_count(16)
    writer.add_rope_dimension_count_swa(8)
    writer.add_rope_freq_base(1e6)
    writer.add_feed_forward_length(
        [48 * (1 + (layer >= count - shared)) for layer in range(count)] if shared else 48
    )
    if "num_global_key_value_heads" in fields:
        writer.add_head_count_kv([3 if is_local else 2 for is_local in local])
    else:
        writer.add_head_count_kv(fields["num_key_value_heads"])
    factors = fields.get("factors", [1.0, 1.0] + [1e30] * 6)
    writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
    for name, weight in tensors_of(kind).items():
        writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_gguf_file_is_the_model_of_its_directory(tmp_path, kind):
    there = load_base(write_gguf(tmp_path / "m.gguf", kind))
    here = load_base(write_directory(tmp_path / "hf", kind))
    assert there.config == here.config
    assert config_from_hf(there.hf_config) == here.config
    assert jax.tree.structure(there.params) == jax.tree.structure(here.params)
    jax.tree.map(np.testing.assert_array_equal, there.params, here.params)


def test_other_rotary_factors_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "31b", factors=[1.0, 2.0] + [1e30] * 6)
    with pytest.raises(CheckpointError, match="other factors than a Gemma 4's"):
        load_base(path)
