"""What an earlier version left on disk is still good: it loads, goes on, and is written alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from smoa_jax.adapter.tree import find_modulations
from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.native.directory import load_adapter, read_adapter, save_adapter
from smoa_jax.cli import main
from smoa_jax.training.run import run
from tests.training.conftest import use_one_device
from tests.training.tiny_run import run_config

BEFORE = Path(__file__).with_name("before")
ADAPTERS = ("blocks_adapter", "bands_adapter")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Where the paths in those files hold."""
    monkeypatch.chdir(BEFORE)
    use_one_device(monkeypatch)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_loads_and_is_written_byte_for_byte_as_it_was(name, tmp_path):
    base = load_base("base")
    description = read_adapter(name)
    params = load_adapter(name, base.params, base_fingerprint=base.fingerprint)
    save_adapter(
        params,
        description.config,
        tmp_path / "again",
        base_fingerprint=base.fingerprint,
        base_name=description.base_name,
        template=description.template,
    )
    for file in ("adapter.safetensors", "adapter.json"):
        assert (tmp_path / "again" / file).read_bytes() == (BEFORE / name / file).read_bytes()


def test_bands_are_formed_from_the_cuts_in_the_file():
    base = load_base("base")
    params = load_adapter("bands_adapter", base.params, base_fingerprint=base.fingerprint)
    stored = load_file("bands_adapter/adapter.safetensors")
    for path, node, key in find_modulations(params).values():
        kernel = np.asarray(base.params["layers"][path[1]][path[2]][key], np.float64)
        for layer, weight in enumerate(kernel):
            cuts = stored["/".join((*path, "cuts"))][layer].astype(int)
            u, s, v = np.linalg.svd(weight, full_matrices=False)
            first = u[:, : cuts[0]] * s[: cuts[0]] @ v[: cuts[0]]
            np.testing.assert_allclose(node.bands[layer, 0], first, atol=1e-5)


def test_a_merged_export_holds_what_it_held(tmp_path):
    words = ["export", "--model", "base", "--adapter", "blocks_adapter", "--output"]
    assert main([*words, str(tmp_path / "merged")]) == 0
    assert main([*words, str(tmp_path / "peft"), "--format", "peft"]) == 0
    for name in ("merged", "peft"):
        old, new = BEFORE / name, tmp_path / name
        names = {p.name for p in new.iterdir()} - {"README.md"}  # which later versions add
        assert {p.name for p in old.iterdir()} == names
        for path in old.iterdir():
            if path.suffix == ".json":
                assert json.loads((new / path.name).read_text()) == json.loads(path.read_text())
    before, now = (
        load_file(d / "model.safetensors") for d in (BEFORE / "merged", tmp_path / "merged")
    )
    assert list(before) == list(now)
    for name, value in before.items():  # to the last bit with the version of JAX that wrote it
        np.testing.assert_allclose(now[name], value, rtol=0, atol=6e-8, err_msg=name)
    peft = (d / "adapter_model.safetensors" for d in (BEFORE / "peft", tmp_path / "peft"))
    old, new = (path.read_bytes() for path in peft)
    assert old == new


def test_a_stopped_run_goes_on_to_the_adapter_that_it_would_have_had(tmp_path, capsys):
    run_directory = shutil.copytree(BEFORE / "stopped", tmp_path / "stopped")
    config = run_config(
        Path("base"),
        run_directory,
        train_steps=4,
        train_save_every=2,
        train_keep_last=1,
        train_keep_best=0,
        optimizer_warmup_steps=0,
        adapter_rank=3,
        adapter_dropout=0.1,
        adapter_target_modules=["q_proj", "down_proj"],
    )
    assert run(config, resume=True).finished
    said = capsys.readouterr().out
    assert "whether the rows themselves are cannot be checked" in said
    assert "optimizer.max_warmup_share: nothing before, 0.1 now" in said
    expected = load_file(BEFORE / "blocks_adapter" / "adapter.safetensors")
    found = load_file(run_directory / "adapter" / "adapter.safetensors")
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(
            found[name].astype(float), value.astype(float), rtol=1e-4, atol=1e-6, err_msg=name
        )


def test_its_checkpoint_can_be_exported_as_it_is(tmp_path):
    words = ["export", "--model", "base", "--adapter", "stopped", "--checkpoint", "last"]
    assert main([*words, "--format", "peft", "--output", str(tmp_path / "peft")]) == 0
    final = load_file("peft/adapter_model.safetensors")
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert list(found) == list(final)
    assert any(not np.array_equal(found[name], value) for name, value in final.items())
