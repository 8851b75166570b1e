"""An adapter's own directory: bit-exact, bound to its base, refused when anything is amiss."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from smoa_jax import SmoaConfig, apply_smoa, combine, partition
from smoa_jax.adapter.tree import count_trainable, strip_smoa
from smoa_jax.adapter.types import SMOA_KEY
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.native.directory import (
    load_adapter,
    read_adapter,
    save_adapter,
)
from smoa_jax.checkpoint.native.leaves import adapter_leaves

CONFIGS = {
    "blocks": SmoaConfig(rank=4, target_modules=["query"]),
    "blocks_of_unequal_ranks_in_two_layers": SmoaConfig(
        rank=6, num_subspaces=3, ranks=[1, 2, 3], layers=[0, 2], target_modules=["query"]
    ),
    "contiguous_blocks": SmoaConfig(
        rank=4, partition="contiguous_blocks", target_modules=["query"]
    ),
    "random_blocks": SmoaConfig(rank=4, partition="random_blocks", target_modules=["query"]),
    "melora": SmoaConfig.melora(4, 2, target_modules=["query"], alpha=8.0),
    "lora_in_one_layer": SmoaConfig.lora(3, layers=[1], target_modules=["query"], dropout=0.5),
    "hira_with_a_rank_pattern": SmoaConfig.hira(
        3, target_modules=["query", "other"], rank_pattern={"other": 5}
    ),
    "bands": SmoaConfig(
        rank=5, ranks=[2, 3], partition="spectral_bands", layers=[0, 2], target_modules=["query"]
    ),
    "one_band": SmoaConfig(
        rank=2, num_subspaces=1, partition="spectral_bands", target_modules=["query"]
    ),
    "a_view": SmoaConfig(rank=4, target_modules=["heads"], kernel_views={"heads": "L | D | N H"}),
}


def base_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "embed": {"embedding": jnp.ones((20, 16))},
        "attention": {"query": {"kernel": jax.random.normal(keys[0], (3, 16, 13))}},
        "other": {"kernel": jax.random.normal(keys[1], (13, 16))},
        "heads": {"kernel": jax.random.normal(keys[2], (2, 16, 2, 7))},
    }


def trained(config, dtype=jnp.float32):
    """An adapted tree whose b has values wherever its a has some column in use."""
    params = apply_smoa(base_params(), config, jax.random.key(1))
    trainable, frozen = partition(params)
    used = {name: leaf for name, leaf in adapter_leaves(params).items() if name.endswith("ranks")}
    if config.ranks or config.layers:
        trainable = jax.tree.map(lambda leaf: leaf * 3, trainable)
    else:
        trainable = jax.tree.map(lambda leaf: leaf + 0.5, trainable)
    assert used
    return combine(jax.tree.map(lambda leaf: leaf.astype(dtype), trainable), frozen)


def save(directory, name="blocks", **changes):
    config = CONFIGS[name]
    arguments = {"base_fingerprint": "f" * 64, "base_name": "a base"} | changes
    return save_adapter(trained(config), config, directory, **arguments)


def load(directory, base=None, fingerprint="f" * 64, **changes):
    return load_adapter(directory, base or base_params(), base_fingerprint=fingerprint, **changes)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), strict=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_comes_back_bit_for_bit(tmp_path, name):
    config = CONFIGS[name]
    params = trained(config)
    directory = save(tmp_path / "adapter", name)
    assert_same(load(directory), params)
    assert read_adapter(directory).config == config
    description = read_adapter(directory)
    assert description.num_trained == count_trainable(base_params(), config)
    assert description.num_base == sum(leaf.size for leaf in jax.tree.leaves(base_params()))
    assert (description.base_name, description.base_fingerprint) == ("a base", "f" * 64)
    names = {path.name for path in directory.iterdir()}
    assert names == {"README.md", "adapter.json", "adapter.safetensors"}


def test_factors_keep_the_dtype_they_were_saved_in(tmp_path):
    config = CONFIGS["blocks"]
    params = trained(config, jnp.bfloat16)
    save_adapter(params, config, tmp_path / "a", base_fingerprint="f", base_name="")
    loaded = load(tmp_path / "a", fingerprint="f")
    assert loaded["attention"]["query"][SMOA_KEY].a.dtype == jnp.bfloat16
    assert_same(loaded, params)


def test_facts_of_a_training_come_back_and_leave_no_trace_where_there_are_none(tmp_path):
    facts = {"steps": 12, "learning rate": 3e-4, "data": "rows.jsonl"}
    directory = save(tmp_path / "told", facts=facts)
    assert read_adapter(directory).facts == facts
    assert "| learning rate | 0.0003 |" in (directory / "README.md").read_text()
    plain = save(tmp_path / "plain") / "adapter.json"
    record = json.loads((directory / "adapter.json").read_text())
    assert record.pop("facts") == facts
    assert plain.read_text() == json.dumps(record, indent=2) + "\n"
    assert read_adapter(plain.parent).facts == {}


def test_a_file_holds_neither_the_base_nor_the_bands(tmp_path):
    directory = save(tmp_path / "adapter", "bands")
    tensors = load_file(directory / "adapter.safetensors")
    names = {name.rsplit("/", 1)[-1] for name in tensors}
    assert names == {"a", "b", "cuts", "norms", "ranks", "scale"}
    assert max(tensor.size for tensor in tensors.values()) < 3 * 2 * 16 * 13


def test_block_ids_come_from_the_file_and_not_from_the_weights(tmp_path):
    """On other weights, whose own partition would be another."""
    config = CONFIGS["blocks"]
    directory = save(tmp_path / "adapter")
    other = base_params(seed=5)
    loaded = load(directory, other, "e" * 64, force=True)
    node, saved = (tree["attention"]["query"][SMOA_KEY] for tree in (loaded, trained(config)))
    np.testing.assert_array_equal(node.in_block, saved.in_block)
    own = apply_smoa(other, config, jax.random.key(1))["attention"]["query"][SMOA_KEY]
    assert not np.array_equal(own.in_block, node.in_block)
    assert_same(strip_smoa(loaded), other)


def test_another_base_is_refused(tmp_path):
    directory = save(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"with fingerprint eeee.*a base; expected .*ffff"):
        load(directory, fingerprint="e" * 64)


def test_bands_of_another_base_are_refused_even_when_forced(tmp_path):
    directory = save(tmp_path / "adapter", "bands")
    with pytest.raises(CheckpointError, match=r"attention\.query.*it was trained on"):
        load(directory, base_params(seed=5), "e" * 64, force=True)
    base = base_params()
    base["attention"]["query"]["kernel"] *= 1.0 + 1e-4  # the same cuts, other norms
    with pytest.raises(CheckpointError, match="norms differ"):
        load(directory, base, "e" * 64, force=True)


@pytest.mark.parametrize("kind", ["truncated", "one byte flipped", "absent", "empty"])
def test_a_damaged_tensor_file_is_refused(tmp_path, kind):
    path = save(tmp_path / "adapter") / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    replaced = {"truncated": content[:-10], "one byte flipped": content, "empty": b""}
    path.unlink()
    if kind in replaced:
        path.write_bytes(bytes(replaced[kind]))
    with pytest.raises(CheckpointError, match=r"safetensors: got a file that is damaged or incom"):
        load(path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "isn't the description of an adapter"),
        (lambda text: text.replace('"rank"', '"renk"'), "isn't the description of an adapter"),
        (lambda text: text.replace('"sha256"', '"sha"'), "isn't the description of an adapter"),
        (lambda text: text.replace('"num_base": ', '"num_base": "1", "x": '), "num_base"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 9'), "format 9"),
        (lambda text: text.replace('"rank": 4', '"rank": 6'), "by the adapter's rank"),
        (lambda text: text.replace('"alpha": null', '"alpha": 8'), "another scale"),
        (lambda text: text.replace('"ranks": []', '"ranks": [1, 3]'), "by the adapter's rank"),
        (lambda text: text.replace("spectral_blocks", "spectral_bands"), "without .*cuts"),
        (lambda text: text.replace("spectral_blocks", "none"), "num_subspaces=2"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, change, message):
    path = save(tmp_path / "adapter") / "adapter.json"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(CheckpointError, match=message):
        load(path.parent)


def without(tensors):
    del tensors["attention/query/b"]


def with_one_more(tensors):
    tensors["attention/query/c"] = np.zeros(3, np.float32)


def another_block_id(tensors):
    tensors["attention/query/in_block"][0, :] = 1


def value_in_padding(tensors):
    tensors["attention/query/a"][0, :, -1] = 1.0


def other_ranks(tensors):
    tensors["attention/query/ranks"][1] = 2.0


def integer_factors(tensors):
    tensors["attention/query/b"] = tensors["attention/query/b"].astype(np.int32)


def rewrite(directory, change):
    """Other tensors in an adapter that says nothing of it."""
    path = directory / "adapter.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    description = json.loads((directory / "adapter.json").read_text())
    description["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (directory / "adapter.json").write_text(json.dumps(description))


def test_contiguous_blocks_whose_ids_dont_ascend_are_refused(tmp_path):
    def turn(tensors):
        for name in ("in_block", "a"):
            turned = tensors[f"attention/query/{name}"][:, ::-1]
            tensors[f"attention/query/{name}"] = np.ascontiguousarray(turned)

    rewrite(save(tmp_path / "random", "random_blocks"), turn)
    load(tmp_path / "random")
    directory = save(tmp_path / "contiguous", "contiguous_blocks")
    load(directory)
    rewrite(directory, turn)
    with pytest.raises(CheckpointError, match="in another order than contiguous_blocks's"):
        load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, "without attention/query/b"),
        (with_one_more, "with attention/query/c, which it has no place for"),
        (another_block_id, "in_block of attention.query that doesn't divide 16"),
        (value_in_padding, "in the padding of a of attention.query"),
        (other_ranks, "other ranks for attention.query"),
        (integer_factors, "dtype int32"),
    ],
)
def test_tensors_that_are_not_those_of_the_config_are_refused(tmp_path, change, message):
    directory = save(tmp_path / "adapter", "blocks_of_unequal_ranks_in_two_layers")
    rewrite(directory, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        load(directory)
    assert "\n" not in str(raised.value)


def test_a_base_of_another_shape_is_refused(tmp_path):
    directory = save(tmp_path / "adapter")
    base = base_params()
    base["attention"]["query"]["kernel"] = jnp.ones((3, 16, 14))
    with pytest.raises(CheckpointError, match=r"attention/query/b of shape \(3, 13, 2\)"):
        load(directory, base)
    del base["attention"]
    with pytest.raises(CheckpointError, match="'query', which matches no kernel"):
        load(directory, base)


def test_an_occupied_directory_is_left_alone_unless_told(tmp_path):
    directory = save(tmp_path / "adapter")
    before = (directory / "adapter.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="already exists and isn't empty"):
        save(directory, "melora")
    assert (directory / "adapter.safetensors").read_bytes() == before
    save(directory, "melora", overwrite=True)
    assert read_adapter(directory).config == CONFIGS["melora"]
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "one.jpg").write_bytes(b"irreplaceable")
    with pytest.raises(CheckpointError, match="isn't an adapter"):
        save(photos, overwrite=True)
    assert (photos / "one.jpg").read_bytes() == b"irreplaceable"
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "photos"}


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    directory = save(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def full_disk(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(directory, "melora", overwrite=True)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_params_and_config_that_do_not_belong_together_are_not_saved(tmp_path):
    other = dataclasses.replace(CONFIGS["blocks"], rank=6)
    arguments = {"base_fingerprint": "f", "base_name": ""}
    with pytest.raises(ValueError, match="by the adapter's rank"):
        save_adapter(trained(CONFIGS["blocks"]), other, tmp_path / "a", **arguments)
    with pytest.raises(ValueError, match="without any adapter"):
        save_adapter(base_params(), other, tmp_path / "a", **arguments)
    with pytest.raises(CheckpointError, match=r"a directory without adapter\.json"):
        load(tmp_path / "a")
    assert not list(tmp_path.iterdir())
