"""GGUF files of Llama's neighbours: the weights and config of the directory they came from.

The files are written here as llama.cpp's converter lays them out: rows of queries and keys (and
their biases) in the order of interleaved pairs where it converts a model as a Llama (SmolLM3), in
Hugging Face's own order elsewhere; names spelt out a second time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.gguf.files import GgufFile
from smoa_jax.checkpoint.huggingface.config import config_from_hf
from tests.checkpoint.hf_files import interleave_rows

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "llama": {**SIZES, "model_type": "llama"},
    "llama_biased": {**SIZES, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {**SIZES, "model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {**SIZES, "model_type": "qwen3"},
    "smollm3": {**SIZES, "model_type": "smollm3"},
    "olmo2": {**SIZES, "model_type": "olmo2", "tie_word_embeddings": False},
}
ATTENTION = {
    "self_attn.q_proj.weight": ("attn_q.weight", (96, 32)),
    "self_attn.k_proj.weight": ("attn_k.weight", (32, 32)),
    "self_attn.v_proj.weight": ("attn_v.weight", (32, 32)),
    "self_attn.o_proj.weight": ("attn_output.weight", (32, 96)),
}
MLP = {
    "mlp.gate_proj.weight": ("ffn_gate.weight", (96, 32)),
    "mlp.up_proj.weight": ("ffn_up.weight", (96, 32)),
    "mlp.down_proj.weight": ("ffn_down.weight", (32, 96)),
}
NORMS = {
    "input_layernorm.weight": ("attn_norm.weight", (32,)),
    "post_attention_layernorm.weight": ("ffn_norm.weight", (32,)),
}
QKV_BIASES = {
    "self_attn.q_proj.bias": ("attn_q.bias", (96,)),
    "self_attn.k_proj.bias": ("attn_k.bias", (32,)),
    "self_attn.v_proj.bias": ("attn_v.bias", (32,)),
}
LAYERS = {
    "llama": {**NORMS, **ATTENTION, **MLP},
    "llama_biased": {
        **NORMS,
        **ATTENTION,
        **MLP,
        **QKV_BIASES,
        "self_attn.o_proj.bias": ("attn_output.bias", (32,)),
        "mlp.gate_proj.bias": ("ffn_gate.bias", (96,)),
        "mlp.up_proj.bias": ("ffn_up.bias", (96,)),
        "mlp.down_proj.bias": ("ffn_down.bias", (32,)),
    },
    "qwen2": {**NORMS, **ATTENTION, **MLP, **QKV_BIASES},
    "qwen3": {
        **NORMS,
        **ATTENTION,
        **MLP,
        "self_attn.q_norm.weight": ("attn_q_norm.weight", (16,)),
        "self_attn.k_norm.weight": ("attn_k_norm.weight", (16,)),
    },
    "smollm3": {**NORMS, **ATTENTION, **MLP},
    "olmo2": {
        **ATTENTION,
        **MLP,
        "self_attn.q_norm.weight": ("attn_q_norm.weight", (96,)),
        "self_attn.k_norm.weight": ("attn_k_norm.weight", (32,)),
        "post_attention_layernorm.weight": ("post_attention_norm.weight", (32,)),
        "post_feedforward_layernorm.weight": ("post_ffw_norm.weight", (32,)),
    },
}
INTERLEAVED = ("llama", "llama_biased", "smollm3")


def tensors_of(family: str) -> dict[str, tuple[str, np.ndarray]]:
    """Hugging Face name -> (GGUF name, random weight in Hugging Face's form)."""
    rng = np.random.default_rng(0)
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("token_embd.weight", (64, 32)),
        "model.norm.weight": ("output_norm.weight", (32,)),
    }
    if not CONFIGS[family]["tie_word_embeddings"]:
        found["lm_head.weight"] = ("output.weight", (64, 32))
    for layer in range(SIZES["num_hidden_layers"]):
        for name, (other, shape) in LAYERS[family].items():
            found[f"model.layers.{layer}.{name}"] = (f"blk.{layer}.{other}", shape)
    return {
        name: (other, rng.standard_normal(shape).astype(np.float32))
        for name, (other, shape) in found.items()
    }


def rows_of(family: str, name: str, weight: np.ndarray) -> np.ndarray:
    """The rows in the file's order."""
    heads = {"q_proj": 6, "k_proj": 2}.get(name.split(".")[-2])
    if family not in INTERLEAVED or heads is None:
        return weight
    return interleave_rows(weight.reshape(len(weight), -1), heads).reshape(weight.shape)


def write_gguf(
    path: Path,
    family: str,
    *,
    kind: Kind = Kind.F32,
    extra: dict[str, int] | None = None,
    more: dict[str, np.ndarray] | None = None,
    without: str = "",
) -> Path:
    architecture = family.split("_")[0]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(5)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(96)
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    for key, value in (extra or {}).items():
        writer.add_uint32(f"{architecture}.{key}", value)
    for name, (other, weight) in tensors_of(family).items():
        rows = rows_of(family, name, weight)
        if without and without in other:
            continue
        if rows.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(other, rows)
        else:
            writer.add_tensor(other, quantize(rows, kind), raw_dtype=kind)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_directory(directory: Path, family: str, kind: Kind = Kind.F32) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIGS[family]))
    tensors = {
        name: weight
        if kind == Kind.F32 or weight.ndim == 1
        else dequantize(quantize(weight, kind), kind)
        for name, (_, weight) in tensors_of(family).items()
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_gguf_file_is_the_model_of_its_directory(tmp_path, family, kind):
    there = load_base(write_gguf(tmp_path / "m.gguf", family, kind=kind))
    here = load_base(write_directory(tmp_path / "hf", family, kind))
    assert there.config == here.config
    assert config_from_hf(there.hf_config) == here.config
    assert there.hf_config["model_type"] == family.split("_")[0]
    assert jax.tree.structure(there.params) == jax.tree.structure(here.params)
    jax.tree.map(np.testing.assert_array_equal, there.params, here.params)


def test_slices_of_an_interleaved_bias_are_those_of_the_whole(tmp_path):
    file = GgufFile(write_gguf(tmp_path / "m.gguf", "llama_biased"))
    name = "model.layers.3.self_attn.q_proj.bias"
    _, bias = tensors_of("llama_biased")[name]
    np.testing.assert_array_equal(file.read(name, (slice(5, 90, 3),)), bias[5:90:3])
    assert not np.array_equal(rows_of("llama_biased", name, bias), bias)


def test_smollm3_has_the_interval_of_layers_that_llama_cpp_gives_it(tmp_path):
    config = load_base(write_gguf(tmp_path / "m.gguf", "smollm3")).config
    assert config.rope_layers == (True, True, True, False, True)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3", "olmo2"])
@pytest.mark.parametrize("key", ["expert_count", "attention.sliding_window"])
def test_experts_and_windows_are_refused(tmp_path, family, key):
    path = write_gguf(tmp_path / "m.gguf", family, extra={key: 4})
    with pytest.raises(CheckpointError, match=rf"{family}\.{key} 4; expected 0 or none"):
        load_base(path)


@pytest.mark.parametrize(
    ("family", "without", "message"),
    [
        ("qwen2", "attn_k.bias", r"missing tensor model.layers.0.self_attn.k_proj.bias"),
        ("llama_biased", "attn_output.bias", r"missing tensor model.layers.0.self_attn.o_proj"),
        ("olmo2", "post_ffw_norm", r"missing tensor model.layers.0.post_feedforward_layernorm"),
        ("qwen3", "attn_q_norm", r"missing tensor model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_a_file_that_lacks_what_its_family_has_is_refused(tmp_path, family, without, message):
    with pytest.raises(CheckpointError, match=message):
        load_base(write_gguf(tmp_path / "m.gguf", family, without=without))


def test_a_bias_that_the_architecture_has_no_place_for_is_refused(tmp_path):
    more = {"blk.2.attn_output.bias": np.zeros(32, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", "qwen2", more=more)
    with pytest.raises(CheckpointError, match=r"surplus tensor model.layers.2.self_attn.o_proj"):
        load_base(path)
