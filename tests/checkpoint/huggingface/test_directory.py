"""A Hugging Face directory becomes a params tree, on one device or sharded over many."""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from smoa_jax.checkpoint import assemble
from smoa_jax.checkpoint.base import abstract_base, load_base
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.huggingface.safetensors_files import SafetensorsFiles
from tests.checkpoint.hf_files import CONFIG, expected_tree, llama_tensors, write_directory

TIED = {**CONFIG, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def tensors():
    return llama_tensors(CONFIG)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tensors):
    return write_directory(tmp_path_factory.mktemp("model"), CONFIG, tensors)


def assert_trees_equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def make_shardings(params, mesh):
    """Kernels over both axes, layers apart; vectors replicated."""

    def spec(path, leaf):
        if path[-1].key == "kernel" and len(leaf.shape) == 3:
            return NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
        if path[-1].key == "embedding":
            return NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(spec, params)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_lands_in_its_place_exactly(tmp_path, num_files, tied):
    config = {**CONFIG, "tie_word_embeddings": tied}
    tensors = llama_tensors(config)
    base = load_base(write_directory(tmp_path / "m", config, tensors, num_files))
    assert_trees_equal(base.params, expected_tree(config, tensors))
    assert base.kind == "huggingface"
    assert base.source == tmp_path / "m"
    assert base.hf_config == config
    assert base.generation_config == {}


def test_generation_config_is_read(directory, tmp_path, tensors):
    write_directory(tmp_path, CONFIG, tensors)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_base(tmp_path).generation_config == {"eos_token_id": [2, 7]}


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_float_on_disk_becomes_the_wanted_dtype(tmp_path, tensors, stored, dtype):
    kept = {name: weight.astype(stored) for name, weight in tensors.items()}
    base = load_base(write_directory(tmp_path, CONFIG, kept), dtype=dtype)
    wanted = {name: weight.astype(dtype) for name, weight in kept.items()}
    assert_trees_equal(base.params, expected_tree(CONFIG, wanted))
    assert {leaf.dtype for leaf in jax.tree.leaves(base.params)} == {jnp.dtype(dtype)}


def test_sharded_weights_have_their_specs_and_the_same_values(directory, tensors, mesh):
    shardings = make_shardings(abstract_base(directory).params, mesh)
    base = load_base(directory, shardings=shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, base.params) == shardings
    assert_trees_equal(base.params, expected_tree(CONFIG, tensors))
    up_proj = base.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert up_proj.addressable_data(0).shape == (3, 16, 24)


def test_each_shard_is_read_once_and_nothing_else_is(directory, mesh, monkeypatch):
    read = []
    original = SafetensorsFiles.read

    def counted(self, name, index):
        values = original(self, name, index)
        read.append((name, values.size))
        return values

    monkeypatch.setattr(SafetensorsFiles, "read", counted)
    shardings = make_shardings(abstract_base(directory).params, mesh)
    base = load_base(directory, shardings=shardings)
    up_proj = [size for name, size in read if name == "model.layers.1.mlp.up_proj.weight"]
    assert up_proj == [32 * 96 // 8] * 8  # eight devices, an eighth each
    assert [size for name, size in read if name == "model.norm.weight"] == [32]  # replicated
    stored = sum(leaf.size for leaf in jax.tree.leaves(base.params))
    assert sum(size for _, size in read) == stored


def test_the_host_holds_one_shard_of_one_array_at_a_time(directory, mesh, monkeypatch):
    held = []
    original = assemble._read_shard

    def measured(*arguments):
        values = original(*arguments)
        held.append(values.nbytes)
        return values

    monkeypatch.setattr(assemble, "_read_shard", measured)
    abstract = abstract_base(directory).params
    load_base(directory, shardings=make_shardings(abstract, mesh))
    largest = max(3 * 32 * 96, 64 * 32) * 4
    assert max(held) == max(3 * 32 * 96 // 8, 64 * 32) * 4 < largest


def test_shardings_of_another_tree_are_refused(directory, mesh):
    shardings = make_shardings(abstract_base(directory).params, mesh)
    del shardings["lm_head"]
    with pytest.raises(ValueError, match=r"shardings that differ .* at lm_head/kernel"):
        load_base(directory, shardings=shardings)


def test_a_mesh_that_does_not_divide_is_refused_by_name(directory):
    mesh = jax.make_mesh((5,), ("tensor",), devices=jax.devices()[:5], axis_types=(AxisType.Auto,))
    params = abstract_base(directory).params
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
    shardings["embed_tokens"]["embedding"] = NamedSharding(mesh, PartitionSpec("tensor"))
    with pytest.raises(ValueError, match=r"embed_tokens/embedding of shape \(64, 32\) can't"):
        load_base(directory, shardings=shardings)


def test_fingerprint_is_what_its_definition_says(tmp_path):
    config = {**TIED, "vocab_size": 128, "num_hidden_layers": 1}  # an embedding of 16 KiB
    tensors = llama_tensors(config)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name].tobytes()
        digest.update(json.dumps([name, list(tensors[name].shape), "F32"]).encode())
        digest.update(stored[:4096] + stored[-4096:])
    base = load_base(write_directory(tmp_path, config, tensors))
    assert base.fingerprint == digest.hexdigest()


def test_fingerprint_does_not_depend_on_dtype_sharding_or_files(directory, tmp_path, tensors, mesh):
    base = load_base(directory)
    shardings = make_shardings(base.params, mesh)
    assert load_base(directory, jnp.bfloat16, shardings).fingerprint == base.fingerprint
    split = load_base(write_directory(tmp_path, CONFIG, tensors, num_files=4))
    assert split.fingerprint == base.fingerprint


@pytest.mark.parametrize("place", [(0, 0), (-1, -1)])
def test_fingerprint_tells_weights_apart_by_either_end(directory, tmp_path, tensors, place):
    changed = {name: weight.copy() for name, weight in tensors.items()}
    changed["model.layers.1.mlp.down_proj.weight"][place] += 1
    other = load_base(write_directory(tmp_path, CONFIG, changed))
    assert other.fingerprint != load_base(directory).fingerprint


def test_fingerprint_tells_stored_dtypes_apart(directory, tmp_path, tensors):
    doubled = {name: weight.astype(np.float64) for name, weight in tensors.items()}
    other = load_base(write_directory(tmp_path, CONFIG, doubled))
    assert other.fingerprint != load_base(directory).fingerprint


def test_rotary_buffers_of_old_writers_are_left_unread(tmp_path, tensors):
    buffers = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)
        for layer in range(3)
    }
    base = load_base(write_directory(tmp_path, CONFIG, {**tensors, **buffers}))
    assert_trees_equal(base.params, expected_tree(CONFIG, tensors))


def test_a_tied_head_may_be_stored_a_second_time(tmp_path):
    tensors = llama_tensors(TIED)
    stored = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    base = load_base(write_directory(tmp_path, TIED, stored))
    assert "lm_head" not in base.params


def test_a_head_of_its_own_under_a_tied_config_is_refused(tmp_path):
    tensors = llama_tensors(TIED)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    write_directory(tmp_path, TIED, {**tensors, "lm_head.weight": head})
    with pytest.raises(CheckpointError, match=r"lm_head.weight that differs .* set it to false"):
        load_base(tmp_path)


def test_the_abstract_base_needs_nothing_but_the_config(directory, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    abstract = abstract_base(tmp_path, jnp.bfloat16)
    base = load_base(directory, jnp.bfloat16)
    assert abstract.config == base.config
    assert abstract.params == jax.eval_shape(lambda: base.params)
