"""A params tree goes out as a Hugging Face directory, whole or not at all."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file

from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.export import huggingface as hf_export
from smoa_jax.checkpoint.export.huggingface import export_huggingface
from smoa_jax.checkpoint.huggingface.config import config_from_hf
from tests.checkpoint.hf_files import CONFIG, expected_tree, llama_tensors, write_directory

DECODER = config_from_hf(CONFIG)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tensors():
    return llama_tensors(CONFIG)


@pytest.fixture(scope="module")
def params(tensors):
    return jax.tree.map(jnp.asarray, expected_tree(CONFIG, tensors))


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def stored_tensors(directory):
    stored = {}
    for path in sorted(directory.glob("*.safetensors")):
        stored.update(load_file(path))
    return stored


def test_what_is_written_is_what_was_loaded_bit_for_bit(tmp_path, tensors):
    source = write_directory(tmp_path / "source", CONFIG, tensors)
    base = load_base(source)
    target = export_huggingface(
        base.params, base.config, tmp_path / "out", dtype=jnp.float32, hf_config=base.hf_config
    )
    assert target == tmp_path / "out"
    written = stored_tensors(target)
    assert written.keys() == tensors.keys()
    for name, weight in tensors.items():
        np.testing.assert_array_equal(written[name], weight)
    assert names_in(target) == ["config.json", "generation_config.json", "model.safetensors"]
    with safe_open(target / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert json.loads((target / "config.json").read_text()) == CONFIG
    assert load_base(target).fingerprint == base.fingerprint


def test_a_tied_head_stays_tied_on_disk(tmp_path):
    config = {**CONFIG, "tie_word_embeddings": True}
    params = expected_tree(config, llama_tensors(config))
    export_huggingface(params, config_from_hf(config), tmp_path / "out", dtype=jnp.float32)
    assert "lm_head.weight" not in stored_tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_bfloat16_is_rounded_to_nearest_and_said_in_the_config(tmp_path, params, tensors):
    export_huggingface(params, DECODER, tmp_path / "out", dtype=jnp.bfloat16, hf_config=CONFIG)
    for name, weight in stored_tensors(tmp_path / "out").items():
        assert weight.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(weight, tensors[name].astype(ml_dtypes.bfloat16))
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == {**CONFIG, "torch_dtype": "bfloat16"}


def test_shards_keep_to_their_size_and_the_index_finds_every_tensor(tmp_path, params, tensors):
    limit = 40_000
    export_huggingface(params, DECODER, tmp_path / "out", dtype=jnp.float32, max_shard_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        assert sum(weight.nbytes for weight in load_file(file).values()) <= limit
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in tensors.values())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"].keys() == tensors.keys()
    back = load_base(tmp_path / "out").params
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_tensor_larger_than_a_shard_has_a_file_of_its_own(tmp_path, params, tensors):
    export_huggingface(params, DECODER, tmp_path / "out", dtype=jnp.float32, max_shard_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(tensors)
    jax.tree.map(np.testing.assert_array_equal, load_base(tmp_path / "out").params, params)


def test_sharded_params_are_written_whole(tmp_path, params, tensors):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = {1: PartitionSpec(), 2: PartitionSpec(), 3: PartitionSpec(None, "tensor", "fsdp")}
    spread = jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, specs[leaf.ndim])), params
    )
    export_huggingface(spread, DECODER, tmp_path / "out", dtype=jnp.float32)
    for name, weight in stored_tensors(tmp_path / "out").items():
        np.testing.assert_array_equal(weight, tensors[name])


def test_only_one_shard_is_in_host_memory_when_it_is_written(tmp_path, params, monkeypatch):
    alive, written = [], []

    def tensor(leaves, slot, dtype):
        value = original(leaves, slot, dtype)
        alive.append(slot.name)
        return value

    def save(tensors, path, metadata):
        # Everything fetched so far is either in an earlier file or in this one.
        assert set(alive) - set(written) == set(tensors)
        written.extend(tensors)
        save_file(tensors, path, metadata=metadata)

    original, save_file = hf_export._tensor, hf_export.save_file
    monkeypatch.setattr(hf_export, "_tensor", tensor)
    monkeypatch.setattr(hf_export, "save_file", save)
    export_huggingface(params, DECODER, tmp_path / "out", dtype=jnp.float32, max_shard_bytes=40_000)
    assert len(written) == len(alive) == 30


def test_generation_config_is_the_sources_or_its_token_ids(tmp_path, params):
    source = {**CONFIG, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}
    for name, none in (("a", None), ("empty", {})):  # as of a directory without the file
        export_huggingface(
            params,
            DECODER,
            tmp_path / name,
            dtype=jnp.float32,
            hf_config=source,
            generation_config=none,
        )
        written = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert written == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    export_huggingface(
        params, DECODER, tmp_path / "b", dtype=jnp.float32, generation_config={"top_p": 0.9}
    )
    assert json.loads((tmp_path / "b/generation_config.json").read_text()) == {"top_p": 0.9}


class Tokenizer:
    def save_pretrained(self, directory):
        with open(f"{directory}/tokenizer.json", "w") as file:
            file.write("saved")


def test_tokenizers_come_as_object_function_or_files(tmp_path, params):
    (tmp_path / "vocab.txt").write_text("a")
    export_huggingface(
        params,
        DECODER,
        tmp_path / "a",
        dtype=jnp.float32,
        tokenizer=Tokenizer(),
        tokenizer_files=[tmp_path / "vocab.txt"],
    )
    assert (tmp_path / "a/tokenizer.json").read_text() == "saved"
    assert (tmp_path / "a/vocab.txt").read_text() == "a"
    export_huggingface(
        params,
        DECODER,
        tmp_path / "b",
        dtype=jnp.float32,
        tokenizer=lambda directory: (directory / "tok.json").write_text("called"),
    )
    assert (tmp_path / "b/tok.json").read_text() == "called"


def test_an_occupied_directory_is_left_as_it_is(tmp_path, params):
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"isn't empty|isn't an exported model"):
            export_huggingface(params, DECODER, target, dtype=jnp.float32, overwrite=overwrite)
    assert names_in(tmp_path) == ["out"]
    assert names_in(target) == ["notes.txt"]


def test_an_empty_directory_may_be_filled(tmp_path, params):
    (tmp_path / "out").mkdir()
    export_huggingface(params, DECODER, tmp_path / "out", dtype=jnp.float32)
    assert load_base(tmp_path / "out").config == DECODER


def test_a_model_is_replaced_only_when_told(tmp_path, params):
    target = tmp_path / "deep" / "out"
    export_huggingface(params, DECODER, target, dtype=jnp.float32, max_shard_bytes=40_000)
    with pytest.raises(CheckpointError, match=r"already exists and isn't empty"):
        export_huggingface(params, DECODER, target, dtype=jnp.float32)
    assert (target / INDEX).exists()
    export_huggingface(params, DECODER, target, dtype=jnp.float32, overwrite=True)
    assert names_in(target) == ["config.json", "generation_config.json", "model.safetensors"]
    assert names_in(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_leaves_the_old_model_and_no_draft(tmp_path, params, existed):
    target = tmp_path / "out"
    if existed:
        export_huggingface(params, DECODER, target, dtype=jnp.float32)
    before = load_base(target).fingerprint if existed else None

    def fail(directory):
        assert not existed or load_base(target).fingerprint == before
        raise KeyboardInterrupt

    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    with pytest.raises(KeyboardInterrupt):
        export_huggingface(
            changed, DECODER, target, dtype=jnp.float32, tokenizer=fail, overwrite=True
        )
    assert names_in(tmp_path) == (["out"] if existed else [])
    assert not existed or load_base(target).fingerprint == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_dim": 48}, r"up_proj.weight and 5 more|of shape \(96, 32\)"),
        ({"num_layers": 2}, r"of 3 layers; expected 2, as the config"),
        ({"num_layers": 4}, r"of 3 layers; expected 4, as the config"),
        ({"tie_embeddings": True}, r"lm_head.weight \(lm_head.weight is of shape \(64, 32\)\)"),
    ],
)
def test_params_of_another_config_are_refused(tmp_path, params, changes, message):
    config = dataclasses.replace(DECODER, **changes)
    with pytest.raises(ValueError, match=message):
        export_huggingface(params, config, tmp_path / "out", dtype=jnp.float32)
    assert names_in(tmp_path) == []


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, params):
    target = tmp_path / "out"
    with pytest.raises(ValueError, match=r"got dtype float16; expected one of float32, b"):
        export_huggingface(params, DECODER, target, dtype=jnp.float16)
    with pytest.raises(ValueError, match=r"max_shard_bytes 0; expected at least 1"):
        export_huggingface(params, DECODER, target, dtype=jnp.float32, max_shard_bytes=0)
    with pytest.raises(ValueError, match=r"absent.json; expected an existing file"):
        export_huggingface(
            params, DECODER, target, dtype=jnp.float32, tokenizer_files=[tmp_path / "absent.json"]
        )
    with pytest.raises(ValueError, match=r"hf_config that differs .* in rope_base"):
        export_huggingface(
            params, DECODER, target, dtype=jnp.float32, hf_config={**CONFIG, "rope_theta": 5.0}
        )
    assert names_in(tmp_path) == []
