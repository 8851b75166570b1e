"""A merged model as an Orbax checkpoint: opened by a program that knows nothing of this project."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from smoa_jax import SmoaConfig, apply_smoa, merge_smoa
from smoa_jax.adapter.targets import walk
from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.export import orbax as orbax_export
from smoa_jax.checkpoint.export.huggingface import export_huggingface
from smoa_jax.checkpoint.export.orbax import export_orbax
from smoa_jax.checkpoint.huggingface.config import config_from_hf
from smoa_jax.checkpoint.native.directory import save_adapter
from smoa_jax.cli import main
from smoa_jax.models.params import init_params
from tests.checkpoint.hf_files import CONFIG, expected_tree, llama_tensors
from tests.training.tiny_run import write_base

DECODER = config_from_hf(CONFIG)

#: What somebody else's program does, and nothing but that: Orbax's plain calls on a mesh of eight.
READER = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec as P

path, out, whole = sys.argv[1:]
checkpointer = ocp.StandardCheckpointer()
if whole == "whole":
    tree = checkpointer.restore(path)
else:
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    def target(leaf):
        spec = P(*[None] * (len(leaf.shape) - 2), "x", "y") if len(leaf.shape) > 2 else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    stored = checkpointer.metadata(path).item_metadata.tree
    abstract = jax.tree.map(target, stored)
    tree = checkpointer.restore(path, abstract)
    for leaf, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), leaf.sharding
    assert len(tree["layers"]["mlp"]["up_proj"]["kernel"].addressable_shards) == 8
assert isinstance(tree["norm"]["scale"], jax.Array)
assert "smoa_jax" not in sys.modules and "flax" not in sys.modules
paths = jax.tree_util.tree_leaves_with_path(tree)
bits = {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in paths}
np.savez(out, **{name: x.view(f"u{x.dtype.itemsize}") for name, x in bits.items()})
"""


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, expected_tree(CONFIG, llama_tensors(CONFIG)))


def sharded(params):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = {1: PartitionSpec(), 2: PartitionSpec(), 3: PartitionSpec(None, "tensor", "fsdp")}
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, specs[leaf.ndim])), params
    )


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def restored(directory):
    return ocp.StandardCheckpointer().restore(directory.absolute() / "params")


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), got, expected)


@pytest.mark.parametrize(
    ("source", "dtype", "reading"),
    [("one_device", "float32", "whole"), ("eight_devices", "bfloat16", "onto_a_mesh")],
)
def test_orbax_alone_restores_every_bit(tmp_path, params, source, dtype, reading):
    given = params if source == "one_device" else sharded(params)
    export_orbax(given, DECODER, tmp_path / "out", dtype=dtype)
    (tmp_path / "reader.py").write_text(READER)
    subprocess.run(
        [sys.executable, "reader.py", tmp_path / "out/params", tmp_path / "bits.npz", reading],
        cwd=tmp_path,
        check=True,
    )
    expected = dict(walk(params))
    with np.load(tmp_path / "bits.npz") as bits:
        assert set(bits.files) == {"/".join(path) for path in expected}
        for path, leaf in expected.items():
            rounded = np.asarray(leaf.astype(dtype))
            got = bits["/".join(path)]
            np.testing.assert_array_equal(got, rounded.view(got.dtype), strict=True)


def test_config_and_tokenizer_lie_beside_the_weights(tmp_path, params):
    (tmp_path / "vocab.txt").write_text("a")
    target = export_orbax(
        params,
        DECODER,
        tmp_path / "deep" / "out",
        dtype=jnp.bfloat16,
        hf_config=CONFIG,
        generation_config={"top_p": 0.9},
        tokenizer=lambda directory: (directory / "tokenizer.json").write_text("made"),
        tokenizer_files=[tmp_path / "vocab.txt"],
    )
    assert names_in(target) == [
        "config.json",
        "generation_config.json",
        "params",
        "tokenizer.json",
        "vocab.txt",
    ]
    written = json.loads((target / "config.json").read_text())
    assert written == {**CONFIG, "torch_dtype": "bfloat16"}
    assert config_from_hf(written) == DECODER
    assert json.loads((target / "generation_config.json").read_text()) == {"top_p": 0.9}
    assert jax.tree.leaves(restored(target))[0].dtype == jnp.bfloat16


def test_only_the_text_part_of_a_multimodal_config_is_written(tmp_path):
    text = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 48}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}}
    decoder = config_from_hf(whole)
    params = init_params(decoder, jax.random.key(0))
    export_orbax(params, decoder, tmp_path / "out", dtype=jnp.float32, hf_config=whole)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["model_type"] == "gemma3_text"
    assert "vision_config" not in written
    assert config_from_hf(written) == decoder
    assert_same(restored(tmp_path / "out"), params)


def test_a_tied_head_is_not_written_twice(tmp_path):
    config = {**CONFIG, "tie_word_embeddings": True}
    params = jax.tree.map(jnp.asarray, expected_tree(config, llama_tensors(config)))
    export_orbax(params, config_from_hf(config), tmp_path / "out", dtype=jnp.float32)
    assert_same(restored(tmp_path / "out"), params)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_host_memory_holds_no_more_than_the_limit_or_one_array(tmp_path, params, monkeypatch):
    limit = 30_000
    sizes = {path: leaf.nbytes for path, leaf in walk(params)}
    on_host, peaks = set(), []

    class Watch(orbax_export._InBatches):
        def on_transfer_end(self, keypath):
            on_host.add(tuple(key.key for key in keypath))
            peaks.append([sizes[path] for path in on_host])

        def on_write_end(self, keypath):
            on_host.remove(tuple(key.key for key in keypath))

    monkeypatch.setattr(orbax_export, "_InBatches", Watch)
    monkeypatch.setattr(orbax_export, "_HOST_GIGABYTES", limit / 1e9)
    export_orbax(params, DECODER, tmp_path / "out", dtype=jnp.float32)
    assert len(peaks) == len(sizes)
    assert not on_host
    assert all(sum(peak) < limit or len(peak) == 1 for peak in peaks)
    assert max(len(peak) for peak in peaks) > 1
    assert_same(restored(tmp_path / "out"), params)


@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_leaves_the_old_checkpoint_and_no_draft(tmp_path, params, existed):
    target = tmp_path / "out"
    if existed:
        export_orbax(params, DECODER, target, dtype=jnp.float32)

    def fail(_):
        raise KeyboardInterrupt

    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    with pytest.raises(KeyboardInterrupt):
        export_orbax(changed, DECODER, target, dtype=jnp.float32, tokenizer=fail, overwrite=True)
    assert names_in(tmp_path) == (["out"] if existed else [])
    if existed:
        assert_same(restored(target), params)


def test_only_an_exported_checkpoint_is_ever_replaced(tmp_path, params):
    target = tmp_path / "out"
    export_orbax(params, DECODER, target, dtype=jnp.float32)
    with pytest.raises(CheckpointError, match="already exists and isn't empty"):
        export_orbax(params, DECODER, target, dtype=jnp.float32)
    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    export_orbax(changed, DECODER, target, dtype=jnp.float32, overwrite=True)
    assert_same(restored(target), changed)
    export_huggingface(params, DECODER, tmp_path / "hf", dtype=jnp.float32)
    with pytest.raises(CheckpointError, match="isn't an exported Orbax checkpoint"):
        export_orbax(params, DECODER, tmp_path / "hf", dtype=jnp.float32, overwrite=True)
    assert (tmp_path / "hf/model.safetensors").exists()


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, params):
    target = tmp_path / "out"
    with pytest.raises(ValueError, match=r"got dtype float16; expected one of float32, b"):
        export_orbax(params, DECODER, target, dtype=jnp.float16)
    with pytest.raises(ValueError, match=r"gate_proj.weight is of shape"):
        export_orbax(params, dataclasses.replace(DECODER, mlp_dim=48), target, dtype=jnp.float32)
    adapted = apply_smoa(params, SmoaConfig.lora(2), jax.random.key(0))
    with pytest.raises(ValueError, match="merge the adapter first"):
        export_orbax(adapted, DECODER, target, dtype=jnp.float32)
    assert names_in(tmp_path) == []


def test_smoa_export_writes_the_merged_model(tmp_path, capsys):
    base = load_base(write_base(tmp_path / "base"))
    config = SmoaConfig.lora(2, target_modules=["q_proj"])
    params = apply_smoa(base.params, config, jax.random.key(0))
    node = params["layers"]["self_attn"]["q_proj"]["smoa"]
    trained = dataclasses.replace(node, b=jnp.ones_like(node.b))
    params["layers"]["self_attn"]["q_proj"]["smoa"] = trained
    where = {"base_fingerprint": base.fingerprint, "base_name": "tiny"}
    save_adapter(params, config, tmp_path / "adapter", **where)
    paths = [f"--model={tmp_path / 'base'}", f"--adapter={tmp_path / 'adapter'}"]
    assert main(["export", *paths, f"--output={tmp_path / 'out'}", "--format=orbax"]) == 0
    assert "merged model" in capsys.readouterr().out
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert_same(restored(tmp_path / "out"), merge_smoa(params))
