"""Damaged, incomplete and unfit files: one clear line each, always a CheckpointError."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.errors import CheckpointError
from tests.checkpoint.hf_files import CONFIG, llama_tensors, write_directory, write_gguf

INDEX = "model.safetensors.index.json"
PART = "model-00002-of-00003.safetensors"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_base(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def tensors():
    return llama_tensors(CONFIG)


@pytest.fixture
def whole(tmp_path, tensors):
    return write_directory(tmp_path / "whole", CONFIG, tensors)


@pytest.fixture
def parts(tmp_path, tensors):
    return write_directory(tmp_path / "parts", CONFIG, tensors, num_files=3)


@pytest.mark.parametrize("kept", [0, 4, 8, 200, 3000, -1])
def test_a_truncated_safetensors_file_is_named(whole, kept):
    file = whole / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refusal(whole)
    assert str(file) in message
    assert "not a whole safetensors file" in message
    assert "download or copy it again" in message


@pytest.mark.parametrize("start", [0, 8, 40])
def test_a_corrupted_header_is_named(whole, start):
    file = whole / "model.safetensors"
    stored = bytearray(file.read_bytes())
    stored[start : start + 8] = b"\xff" * 8
    file.write_bytes(stored)
    assert "not a whole safetensors file" in refusal(whole)


def test_a_git_lfs_pointer_is_recognised(whole):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (whole / "model.safetensors").write_text(text)
    assert "git lfs pull" in refusal(whole)


def test_missing_tensors_are_listed(tmp_path, tensors):
    for layer in range(3):
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    message = refusal(write_directory(tmp_path, CONFIG, tensors))
    assert "missing tensor model.layers.0.mlp.up_proj.weight, model.layers.1" in message


def test_a_missing_head_says_how_to_tie_it(tmp_path, tensors):
    del tensors["lm_head.weight"]
    message = refusal(write_directory(tmp_path, CONFIG, tensors))
    assert "missing tensor lm_head.weight" in message
    assert "tie_word_embeddings: true" in message


def test_surplus_tensors_are_listed(tmp_path, tensors):
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    message = refusal(write_directory(tmp_path, CONFIG, tensors))
    assert "surplus tensor model.layers.0.self_attn.q_proj.bias" in message


def test_more_layers_than_the_config_says_are_surplus(tmp_path, tensors):
    message = refusal(write_directory(tmp_path, {**CONFIG, "num_hidden_layers": 2}, tensors))
    assert "surplus tensor model.layers.2.input_layernorm.weight" in message
    assert "and 5 more" in message


def test_a_shape_that_does_not_fit_the_config_shows_both(tmp_path, tensors):
    message = refusal(write_directory(tmp_path, {**CONFIG, "intermediate_size": 48}, tensors))
    assert "mlp.gate_proj.weight of shape (96, 32); expected (48, 32)" in message


def test_quantised_safetensors_are_refused(tmp_path, tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    message = refusal(write_directory(tmp_path, CONFIG, tensors))
    assert "model.norm.weight stored as I8; expected one of F64, F32, F16, BF16" in message


def test_a_part_that_the_index_names_must_be_there(parts):
    (parts / PART).unlink()
    message = refusal(parts)
    assert INDEX in message
    assert PART in message


def test_a_truncated_part_is_named(parts):
    (parts / PART).write_bytes((parts / PART).read_bytes()[:-100])
    assert PART in refusal(parts)


def test_an_index_that_places_a_tensor_wrongly_is_refused(parts):
    index = json.loads((parts / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = PART
    (parts / INDEX).write_text(json.dumps(index))
    assert "places model.extra.weight in files that don't hold it" in refusal(parts)


def test_an_index_that_leaves_its_directory_is_refused(parts):
    index = json.loads((parts / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../whole/model.safetensors"
    (parts / INDEX).write_text(json.dumps(index))
    assert "expected files of its own directory" in refusal(parts)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(parts, text):
    (parts / INDEX).write_text(text)
    assert "not a safetensors index" in refusal(parts)


def test_parts_without_their_index_are_refused(parts):
    (parts / INDEX).unlink()
    message = refusal(parts)
    assert "3 safetensors files" in message
    assert "expected the index beside them" in message


def test_a_tensor_in_two_parts_is_refused(parts):
    first = parts / "model-00001-of-00003.safetensors"
    (parts / PART).write_bytes(first.read_bytes())
    assert "expected every name once" in refusal(parts)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_as_file_and_as_directory(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        message = refusal(path)
        assert name in message
        assert "opened; expected safetensors" in message


def test_a_directory_without_weights_or_config_says_what_is_missing(tmp_path, whole):
    assert "without config.json" in refusal(tmp_path)
    (whole / "model.safetensors").unlink()
    assert "without safetensors files; expected model.safetensors" in refusal(whole)


def test_an_adapter_is_not_a_model(whole):
    (whole / "model.safetensors").rename(whole / "adapter_model.safetensors")
    assert "only an adapter" in refusal(whole)


def test_a_single_safetensors_file_is_not_a_model(whole):
    assert "expected a directory with config.json" in refusal(whole / "model.safetensors")


@pytest.mark.parametrize(
    ("text", "expected"), [("{", "as JSON"), ("[1]", "expected a JSON object")]
)
def test_a_damaged_config_is_named(whole, text, expected):
    (whole / "config.json").write_text(text)
    message = refusal(whole)
    assert str(whole / "config.json") in message
    assert expected in message


def test_a_truncated_gguf_file_is_refused_wherever_it_ends(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, llama_tensors(CONFIG))
    stored = path.read_bytes()
    load_base(path)
    cuts = [0, 3, 10, len(stored) - 1, *range(24, len(stored) - 1, len(stored) // 60)]
    for kept in cuts:
        path.write_bytes(stored[:kept])
        assert "not a whole GGUF file" in refusal(path), kept


def test_a_gguf_array_of_impossible_length_is_refused_at_once(tmp_path):
    path = tmp_path / "m.gguf"
    key = "tokenizer.ggml.token_type"
    write_gguf(path, CONFIG, llama_tensors(CONFIG), extra={key: [1, 2, 3]})
    load_base(path)
    stored = bytearray(path.read_bytes())
    length = stored.index(key.encode()) + len(key) + 4 + 4  # after the types of array and items
    assert stored[length : length + 8] == (3).to_bytes(8, "little")
    stored[length : length + 8] = (2**40).to_bytes(8, "little")
    path.write_bytes(stored)
    assert "not a whole GGUF file (it ends at byte" in refusal(path)


def test_a_corrupted_gguf_header_never_hangs_or_leaks_another_error(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, llama_tensors(CONFIG))
    stored = path.read_bytes()
    header = stored.index(b"output_norm.weight") + 60
    messages = []
    for start in range(0, header, 7):
        damaged = bytearray(stored)
        damaged[start : start + 6] = b"\xff" * 6
        path.write_bytes(damaged)
        try:
            load_base(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > header // 7 // 2
    assert not any("\n" in message for message in messages)
