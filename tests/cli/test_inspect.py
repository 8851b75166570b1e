"""``smoa inspect``: a plan, an adapter, two of them; what is shown of each and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import struct

import jax
import pytest

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.tree import apply_smoa, find_modulations
from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.native.directory import save_adapter
from smoa_jax.cli import main
from smoa_jax.commands import inspect as command
from tests.cli.tiny import check_refused, refusal


def write_adapter(place, directory, config, fill=None):
    """An adapter of ``config``, untrained, or with ``fill`` of a key and a shape as its B."""
    base = load_base(place.base)
    params = apply_smoa(base.params, config, jax.random.key(0))
    for path, node, _ in find_modulations(params).values() if fill else ():
        module = functools.reduce(dict.__getitem__, path, params)
        module["smoa"] = dataclasses.replace(node, b=fill(jax.random.key(1), node.b.shape))
    return save_adapter(
        params, config, directory, base_fingerprint=base.fingerprint, base_name=str(place.base)
    )


@pytest.fixture(scope="module")
def lora(trained, tmp_path_factory):
    """LoRA beside the trained SMoA, as if trained, with as many parameters.

    (I + O) R for R = 4 here, (I + O) R / 2 for R = 8 there.
    """
    config = SmoaConfig.lora(4, target_modules=["q_proj", "down_proj"])
    directory = tmp_path_factory.mktemp("lora") / "adapter"
    return write_adapter(trained, directory, config, fill=jax.random.normal)


def shown(capsys, place, *words):
    capsys.readouterr()
    assert main(["inspect", "--model", str(place.base), *map(str, words)]) == 0
    return capsys.readouterr().out


def as_json(capsys, place, *words):
    return json.loads(shown(capsys, place, "--json", *words))


def layers_of(said):
    """The layers shown of each kernel, by its last name."""
    found = {}
    for update in said["updates"]:
        found.setdefault(update["kernel"].rsplit(".")[-1], []).append(update["layer"])
    return found


# ---------------------------------------------------------------------------------------- a plan


def test_a_plan_counts_what_an_adapter_would_train(trained, capsys):
    words = ["--rank", 4, "--num_subspaces", 2, "--target_modules", '["q_proj", "down_proj"]']
    text = shown(capsys, trained, *words)
    assert "layers.self_attn.q_proj" in text
    assert "layers.mlp.down_proj" in text
    assert "k_proj" not in text
    count = 2 * ((32 + 64) * 2 + (48 + 32) * 2)
    total = sum(leaf.size for leaf in jax.tree.leaves(load_base(trained.base).params))
    assert f"trained {count:,} of {total:,} base parameters: {count / total:.3%}" in text


MODULES = {
    "q_proj": {"q_proj"},
    "q_proj,down_proj": {"q_proj", "down_proj"},
    "q_proj, down_proj": {"q_proj", "down_proj"},
    "[q_proj, down_proj]": {"q_proj", "down_proj"},
    '["q_proj"]': {"q_proj"},
    "self_attn.q_proj": {"q_proj"},
    r".*\.(q|down)_proj": {"q_proj", "down_proj"},
    "all-linear": {"q_proj", "down_proj"},
}


@pytest.mark.parametrize("text", MODULES)
def test_modules_are_named_alike_of_a_plan_and_of_an_adapter(trained, capsys, text):
    planned = as_json(capsys, trained, "--rank", 4, "--target_modules", text)
    names = {kernel["name"].rsplit(".")[-1] for kernel in planned["kernels"]}
    assert names >= MODULES[text]
    assert names == MODULES[text] or text == "all-linear"
    learned = as_json(capsys, trained, "--adapter", trained.adapter, "--target_modules", text)
    assert {kernel["name"].rsplit(".")[-1] for kernel in learned["kernels"]} == MODULES[text]
    assert set(layers_of(learned)) == MODULES[text]


@pytest.mark.parametrize(
    ("text", "layers"), [("1", [1]), ("0,1", [0, 1]), ("[0,1]", [0, 1]), ("[1]", [1])]
)
def test_layers_are_named_alike_of_a_plan_and_of_an_adapter(trained, capsys, text, layers):
    planned = as_json(capsys, trained, "--rank", 4, "--layers", text)
    assert {tuple(kernel["layers"]) for kernel in planned["kernels"]} == {tuple(layers)}
    learned = as_json(capsys, trained, "--adapter", trained.adapter, "--layers", text)
    assert layers_of(learned) == {"q_proj": layers, "down_proj": layers}


def test_a_plan_without_partition_is_lora(trained, capsys):
    words = ["--partition", "none", "--modulation", "none", "--num_subspaces", 1, "--rank", 3]
    said = as_json(capsys, trained, *words)
    assert said["method"].startswith("LoRA")
    assert {tuple(kernel["ranks"]) for kernel in said["kernels"]} == {(3,)}


# ------------------------------------------------------------------------------------ an adapter


def test_details_show_full_rank_updates_of_a_low_rank_adapter(trained, capsys):
    """The method's point: rank 8 factors, updates of the full rank of 32."""
    text = shown(capsys, trained, "--adapter", trained.adapter, "--layers", 1, "--details")
    rows = [line for line in text.splitlines() if " of 32 " in line]
    assert [row.split()[1] for row in rows] == ["mlp.down_proj", "self_attn.q_proj"]
    assert all(int(re.search(r"(\d+) of 32", row)[1]) > 16 for row in rows)


def test_a_summary_has_a_row_for_each_kernel_with_the_extremes_of_its_layers(trained, capsys):
    adapter = ["--adapter", trained.adapter]
    text = shown(capsys, trained, *adapter)
    _, summary = text.split("least, median and greatest")
    updates = as_json(capsys, trained, *adapter)["updates"]
    for name in ("mlp.down_proj", "self_attn.q_proj"):
        (row,) = [line for line in summary.splitlines() if name in line]
        norms = sorted(100 * u["relative_norm"] for u in updates if u["kernel"].endswith(name))
        assert len(norms) == 2
        figures = [f"{value:.3g}" for value in (norms[0], sum(norms) / 2, norms[1])]
        assert " ".join(figures) in row
    assert max(len(line) for line in text.splitlines()) <= 80


def test_json_is_all_that_is_printed_and_counts_as_the_run_did(trained, lora, capsys):
    said = as_json(capsys, trained, "--adapter", trained.run, "--compare", lora)
    description = json.loads((trained.adapter / "adapter.json").read_text())
    assert said["trained_parameters"] == description["num_trained"]
    assert said["base_parameters"] == description["num_base"]
    assert said["compared"]["method"].startswith("LoRA")
    assert {update["rank"] for update in said["compared"]["updates"]} == {4}
    assert min(update["rank"] for update in said["updates"]) > 16
    assert said["compared"]["trained_parameters"] == said["trained_parameters"]


def test_how_far_it_is_goes_to_standard_error(trained, capsys):
    capsys.readouterr()
    words = ["--model", str(trained.base), "--adapter", str(trained.run), "--json"]
    assert main(["inspect", *words]) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)["updates"]) == 4
    assert said.err.startswith("spectra of updates 4/4")


def test_a_plot_compares_two_adapters_under_their_methods_names(
    trained, lora, capsys, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        command, "plot_spectra", lambda adapters, path: drawn.append((adapters, path))
    )
    plot = tmp_path / "new" / "spectra.png"
    words = ["--adapter", trained.adapter, "--compare", lora, "--plot", plot]
    text = shown(capsys, trained, *words)
    assert f"plot: {plot}" in text
    assert text.count("updates W' - W") == 2
    ((adapters, path),) = drawn
    assert path == str(plot)
    assert [adapter.label.split()[0] for adapter in adapters] == ["SMoA,", "LoRA"]
    assert [set(adapter.ranks.values()) for adapter in adapters] == [{8}, {4}]
    shown(capsys, trained, "--adapter", trained.run, "--compare", trained.adapter, "--plot", plot)
    first, second = (adapter.label for adapter in drawn[1][0])
    assert first.endswith(str(trained.run))
    assert second.endswith(str(trained.adapter))
    assert as_json(capsys, trained, *words)["adapter"] == str(trained.adapter)
    assert len(drawn) == 3


def test_a_plot_is_written_where_no_directory_was(trained, capsys, tmp_path):
    plot = tmp_path / "new" / "spectra.png"
    shown(capsys, trained, "--adapter", trained.adapter, "--layers", 1, "--plot", plot)
    data = plot.read_bytes()
    assert data[:16] == b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 400
    assert height > 400


# -------------------------------------------------------------------------------------- refusals

REFUSED = {
    "a rank of an adapter": (
        ["--adapter", "ADAPTER", "--rank", "32"],
        ["got --rank with --adapter", "leave out --adapter to see a plan"],
    ),
    "several settings of an adapter": (
        ["--adapter", "ADAPTER", "--num_subspaces=2", "--partition=none", "--modulation=none"],
        ["got --num_subspaces, --partition, --modulation with --adapter"],
    ),
    "a comparison of nothing": (["--compare", "ADAPTER"], ["--compare without --adapter"]),
    "details of nothing": (["--details"], ["--details without --adapter"]),
    "a plot of nothing": (["--plot", "p.png"], ["--plot without --adapter"]),
    "a checkpoint of nothing": (["--checkpoint", "best"], ["--checkpoint without --adapter"]),
    "a plot that is no PNG": (["--adapter", "ADAPTER", "--plot", "p.jpeg"], ["p.jpeg", ".png"]),
    "a layer that is not there": (
        ["--adapter", "ADAPTER", "--layers", "[2]"],
        ["--layers [2]", "from 0 to 1"],
    ),
    "a layer that a plan cannot have": (["--layers", "0,2"], ["2 is no layer", "from 0 to 1"]),
    "a layer that is no number": (["--layers", "first"], ["--layers first", "3 or 0,1"]),
    "a module that is not there": (
        ["--target_modules", "q_porj"],
        ["'q_porj'", "near misses: q_proj", "kernels there are: down_proj, gate_proj"],
    ),
    "a module that the adapter leaves alone": (
        ["--adapter", "ADAPTER", "--target_modules", "q_proj,k_proj"],
        ["--target_modules entry 'k_proj'", "kernels there are: down_proj, q_proj"],
    ),
    "an unknown partition": (["--partition", "bands"], ["partition='bands'", "spectral_bands"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_effect_or_is_not_there_is_refused(
    trained, tmp_path, capsys, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    words, expected = REFUSED[name]
    words = [str(trained.adapter) if word == "ADAPTER" else word for word in words]
    arguments = ["inspect", "--model", trained.base, *words]
    check_refused(capsys, arguments, expected, [trained.base, trained.run])
    assert list(tmp_path.iterdir()) == []


def test_layers_that_an_adapter_leaves_alone_are_refused_with_those_that_it_has(
    trained, capsys, tmp_path
):
    config = SmoaConfig.lora(4, target_modules=["q_proj"], layers=(1,))
    adapter = write_adapter(trained, tmp_path / "adapter", config)
    inspect = ["inspect", "--model", trained.base, "--adapter", adapter, "--layers", "0"]
    assert "layers that the adapter changes: from 1 to 1" in refusal(capsys, inspect)
    assert layers_of(as_json(capsys, trained, "--adapter", adapter)) == {"q_proj": [1]}
