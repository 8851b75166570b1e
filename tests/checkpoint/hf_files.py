"""Small Llama checkpoints written by hand, in NumPy, for tests to load.

Names, orientation and GGUF's row order are spelt out a second time here, so that a test which loads
these files doesn't compare the project with itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors.numpy import save_file

#: A Llama whose sizes all differ, so that a mixed-up axis can't go unnoticed.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.40.0",
}

#: Hugging Face's module, the key of its array in our tree, GGUF's module.
LAYER_MODULES = (
    ("input_layernorm", "scale", "attn_norm"),
    ("self_attn.q_proj", "kernel", "attn_q"),
    ("self_attn.k_proj", "kernel", "attn_k"),
    ("self_attn.v_proj", "kernel", "attn_v"),
    ("self_attn.o_proj", "kernel", "attn_output"),
    ("post_attention_layernorm", "scale", "ffn_norm"),
    ("mlp.gate_proj", "kernel", "ffn_gate"),
    ("mlp.up_proj", "kernel", "ffn_up"),
    ("mlp.down_proj", "kernel", "ffn_down"),
)


def llama_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under Hugging Face names, kernels (outputs, inputs)."""
    generator = np.random.default_rng(seed)
    embed, mlp = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key_value = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], embed)
    }
    for layer in range(config["num_hidden_layers"]):
        sizes = {
            "input_layernorm": (embed,),
            "self_attn.q_proj": (query, embed),
            "self_attn.k_proj": (key_value, embed),
            "self_attn.v_proj": (key_value, embed),
            "self_attn.o_proj": (embed, query),
            "post_attention_layernorm": (embed,),
            "mlp.gate_proj": (mlp, embed),
            "mlp.up_proj": (mlp, embed),
            "mlp.down_proj": (embed, mlp),
        }
        for module, shape in sizes.items():
            shapes[f"model.layers.{layer}.{module}.weight"] = shape
    shapes["model.norm.weight"] = (embed,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], embed)
    return {
        name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }


def write_directory(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    num_files: int = 1,
) -> Path:
    """A Hugging Face directory; with several files the tensors are dealt out in turn."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config)))
    if num_files == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map: dict[str, str] = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = dict(list(tensors.items())[number::num_files])
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def interleave_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """GGUF's order of query and key rows: the halves of each head alternate."""
    heads = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.stack([heads[:, 0], heads[:, 1]], axis=2).reshape(weight.shape)


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    rope_factors: Sequence[float] = (),
    extra: Mapping[str, int | float | str | list[int]] | None = None,
) -> Path:
    """A GGUF file of the same weights, as llama.cpp's converter lays them out; norms stay F32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (extra or {}).items():
        adders: dict[type, Callable[[str, Any], None]] = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        adders[type(value)](key, value)
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_factors, np.float32))
    for name, weight in tensors.items():
        weight = gguf_rows(name, weight, config)
        if weight.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), weight)
        else:
            writer.add_tensor(gguf_name(name), quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_rows(name: str, weight: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """The rows of a Hugging Face weight in the order of a GGUF file."""
    if name.endswith("q_proj.weight"):
        return interleave_rows(weight, config["num_attention_heads"])
    if name.endswith("k_proj.weight"):
        return interleave_rows(weight, config["num_key_value_heads"])
    return weight


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor."""
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outer:
        return outer[name]
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    inner = {ours: theirs for ours, _, theirs in LAYER_MODULES}
    return f"blk.{layer}.{inner[module]}.weight"


def expected_tree(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The params tree that the weights must become, put together by hand."""
    layers: dict[str, Any] = {}
    for module, leaf, _ in LAYER_MODULES:
        node = layers
        for key in module.split("."):
            node = node.setdefault(key, {})
        weights = [
            tensors[f"model.layers.{layer}.{module}.weight"]
            for layer in range(config["num_hidden_layers"])
        ]
        node[leaf] = np.stack([w.T if leaf == "kernel" else w for w in weights])
    tree: dict[str, Any] = {
        "embed_tokens": {"embedding": tensors["model.embed_tokens.weight"]},
        "layers": layers,
        "norm": {"scale": tensors["model.norm.weight"]},
    }
    if not config["tie_word_embeddings"]:
        tree["lm_head"] = {"kernel": tensors["lm_head.weight"].T}
    return tree
