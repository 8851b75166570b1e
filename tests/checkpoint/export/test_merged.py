"""A merged model read from disk, kernel by kernel, is the one that is merged in memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.factors import used_of
from smoa_jax.adapter.merge import merge_report, merge_smoa
from smoa_jax.adapter.targets import replaced, walk
from smoa_jax.adapter.tree import apply_smoa, find_modulations
from smoa_jax.checkpoint.base import load_base, open_base
from smoa_jax.checkpoint.errors import CheckpointError
from smoa_jax.checkpoint.export.huggingface import export_huggingface, export_stored
from smoa_jax.checkpoint.export.merged import MergedReader
from smoa_jax.checkpoint.native.directory import open_adapter, save_adapter
from smoa_jax.cli import main
from tests.checkpoint.hf_files import CONFIG, llama_tensors, write_directory, write_gguf
from tests.checkpoint.test_load_memory import WIDE, peak_of
from tests.training.tiny_run import make_tokenizer

KINDS = {
    "blocks": SmoaConfig(rank=5, num_subspaces=2),
    "bands": SmoaConfig(rank=6, num_subspaces=3, partition="spectral_bands"),
    "hira": SmoaConfig.hira(3, layers=(1,)),
    "lora": SmoaConfig.lora(3, target_modules=["o_proj", "gate_proj"], scaling="alpha/sqrt(r)"),
    "ranks": SmoaConfig(rank=4, num_subspaces=2, rank_pattern={r".*\.k_proj": 2}),
}


def adapt(base_directory, config, directory):
    """An adapter whose B is not zero, saved; and the adapted tree."""
    base = load_base(base_directory)
    params = apply_smoa(base.params, config, jax.random.key(1))
    for name, (path, node, _) in find_modulations(params).items():
        key = jax.random.fold_in(jax.random.key(2), len(name))
        a = node.a + 0.2 * jax.random.normal(key, node.a.shape) * used_of(node, "a")
        b = 0.2 * jax.random.normal(key, node.b.shape) * used_of(node, "b")
        params = replaced(params, (*path, "smoa"), dataclasses.replace(node, a=a, b=b))
    save_adapter(params, config, directory, base_fingerprint=base.fingerprint, base_name="tiny")
    return base, params


@pytest.fixture(scope="module")
def base_directory(tmp_path_factory):
    directory = write_directory(tmp_path_factory.mktemp("m"), CONFIG, llama_tensors(CONFIG), 3)
    make_tokenizer().save_pretrained(str(directory))
    return directory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_exported_from_disk_is_what_is_exported_from_memory(
    base_directory, tmp_path, kind, dtype
):
    config = KINDS[kind]
    base, params = adapt(base_directory, config, tmp_path / "adapter")
    settings = {"dtype": dtype, "hf_config": base.hf_config, "max_shard_bytes": 10_000}
    export_huggingface(merge_smoa(params, dtype), base.config, tmp_path / "memory", **settings)
    stored = open_base(base_directory)
    found, found_config = open_adapter(
        tmp_path / "adapter", stored.params, base_fingerprint=stored.fingerprint
    )
    assert found_config == config
    reader = MergedReader(stored, found, config, rounded_to=dtype)
    export_stored(reader, stored.slots, stored.config, tmp_path / "disk", **settings)
    names = sorted(path.name for path in (tmp_path / "memory").iterdir())
    assert len([name for name in names if name.endswith("safetensors")]) > 3
    assert names == sorted(path.name for path in (tmp_path / "disk").iterdir())
    for name in names:
        memory, disk = ((tmp_path / kind / name).read_bytes() for kind in ("memory", "disk"))
        assert memory == disk, name
    expected = merge_report(params, dtype)
    got = reader.report()
    assert MergedReader(stored, found, config).measure(dtype) == got
    assert list(got) == list(expected)
    for name, loss in expected.items():
        for field in dataclasses.fields(loss):
            values = getattr(got[name], field.name), getattr(loss, field.name)
            assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-7), (name, field.name)


@pytest.mark.parametrize("kind", ["tied", "untied", "gguf"])
def test_a_merged_reader_gives_every_tensor_of_the_merged_tree(tmp_path, kind):
    """Whatever the base is stored as; the head too, where it is a kernel of its own."""
    model = {**CONFIG, "tie_word_embeddings": kind == "tied"}
    tensors = llama_tensors(model)
    path = tmp_path / "m.gguf"
    path = (
        write_gguf(path, model, tensors)
        if kind == "gguf"
        else write_directory(tmp_path / "m", model, tensors, 2)
    )
    heads = [] if kind == "tied" else ["lm_head"]
    config = SmoaConfig(rank=4, num_subspaces=2, target_modules=["q_proj", "down_proj", *heads])
    base, params = adapt(path, config, tmp_path / "adapter")
    merged = dict(walk(merge_smoa(params, jnp.float32)))
    stored = open_base(path)
    found, _ = open_adapter(
        tmp_path / "adapter", stored.params, base_fingerprint=stored.fingerprint
    )
    reader = MergedReader(stored, found, config)
    changed = set()
    for name, slot in stored.slots.items():
        got = reader.read(name, tuple(slice(0, size) for size in slot.shape))
        expected = merged[slot.path] if slot.layer is None else merged[slot.path][slot.layer]
        np.testing.assert_array_equal(got, expected.T if slot.transpose else expected)
        before = dict(walk(base.params))[slot.path]
        before = before if slot.layer is None else before[slot.layer]
        if not np.array_equal(expected, before):
            changed.add(slot.path[-2])
    assert changed == {"q_proj", "down_proj", *heads}


def test_layers_are_walked_kernel_by_kernel_and_can_be_chosen(base_directory, tmp_path):
    config = KINDS["blocks"]
    _, params = adapt(base_directory, config, tmp_path / "adapter")
    stored = open_base(base_directory)
    found, _ = open_adapter(
        tmp_path / "adapter", stored.params, base_fingerprint=stored.fingerprint
    )
    reader = MergedReader(stored, found, config)
    names = ["down_proj", "up_proj", "k_proj", "q_proj", "v_proj"]
    depth = CONFIG["num_hidden_layers"]
    walked = [(layer.name.rsplit(".")[-1], layer.layer) for layer in reader.layers()]
    assert walked == [(name, layer) for name in names for layer in range(depth)]
    (only,) = reader.layers({"layers.self_attn.k_proj": [1]})
    kernel = params["layers"]["self_attn"]["k_proj"]["kernel"][1]
    np.testing.assert_array_equal(only.weight, kernel)


def test_a_peft_export_reads_no_weights(base_directory, tmp_path, monkeypatch):
    adapt(base_directory, KINDS["hira"], tmp_path / "adapter")

    def refuse(self, name, index):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(
        "smoa_jax.checkpoint.huggingface.safetensors_files.SafetensorsFiles.read", refuse
    )
    words = ["--model", str(base_directory), "--adapter", str(tmp_path / "adapter")]
    done = main(["export", *words, "--output", str(tmp_path / "peft"), "--format", "peft"])
    assert done == 0
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()


def test_bands_of_another_base_are_refused(base_directory, tmp_path):
    config = KINDS["bands"]
    adapt(base_directory, config, tmp_path / "adapter")
    tensors = llama_tensors(CONFIG)
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][5:9] *= 1.5  # away from the edges that a fingerprint covers, if it is large
    other = open_base(write_directory(tmp_path / "other", CONFIG, tensors, 2))
    own = open_base(base_directory)
    found, _ = open_adapter(tmp_path / "adapter", own.params, base_fingerprint=own.fingerprint)
    reader = MergedReader(other, found, config)
    with pytest.raises(ValueError, match=r"bands of layers\.self_attn\.q_proj\[1\] whose norms"):
        list(reader.layers())
    with pytest.raises(CheckpointError, match="expected the base that it was trained on"):
        open_adapter(tmp_path / "adapter", other.params, base_fingerprint=other.fingerprint)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A wide model at two depths, with a blocks adapter each."""
    made = {}
    for depth in (3, 9):
        config = {**WIDE, "num_hidden_layers": depth}
        folder = tmp_path_factory.mktemp("deep")
        directory = write_directory(folder / "base", config, llama_tensors(config), 4)
        make_tokenizer().save_pretrained(str(directory))
        adapt(
            directory,
            SmoaConfig(rank=4, num_subspaces=2, partition="contiguous_blocks"),
            folder / "adapter",
        )
        made[depth] = folder
    return made


def test_an_export_holds_no_more_of_a_deeper_model(deep, tmp_path):
    peaks, sizes = {}, {}
    for depth, folder in deep.items():
        arguments = [folder / "base", folder / "adapter", tmp_path / str(depth)]
        peaks[depth] = peak_of("export/export_memory.py", arguments)[0]
        written = (tmp_path / str(depth)).glob("*.safetensors")
        sizes[depth] = sum(path.stat().st_size for path in written)
    assert sizes[9] - sizes[3] > 150e6
    # Six more layers leave nothing behind but what allocators keep, which varies with load.
    assert peaks[9] - peaks[3] < 0.4 * (sizes[9] - sizes[3])
