"""Runs that must not start: one line on standard error, exit status 2, nothing harmed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from smoa_jax.cli import main
from smoa_jax.sharding import mesh
from smoa_jax.training import model as run_model
from tests.checkpoint.hf_files import CONFIG, llama_tensors, write_gguf
from tests.cli.damage import (
    UP,
    Damage,
    corrupt,
    pickle,
    shorten_vocabulary,
    truncate,
    with_config,
    with_tensors,
)
from tests.cli.tiny import check_refused, write_rows

pytestmark = pytest.mark.usefixtures("one_device")


# ----------------------------------------------------------------------------- the configuration

SETTINGS = {
    "no target matches": (
        ["--adapter.target_modules", "[q_prjo]"],
        ["'q_prjo', which matches no kernel", "near misses: q_proj"],
    ),
    "one target of several matches nothing": (
        ["--adapter.target_modules", "[q_proj, query]"],
        ["'query', which matches no kernel", "kernels there are: ", "q_proj"],
    ),
    "a name where a regular expression is expected": (
        ["--adapter.target_modules", "q_proj"],
        ["match a whole dotted path", "['q_proj']"],
    ),
    "not a regular expression": (["--adapter.target_modules", "(("], ["target_modules='(('"]),
    "everything excluded": (
        ["--adapter.exclude_modules", "all-linear"],
        ["leave no kernel"],
    ),
    "a rank pattern that matches nothing": (
        ["--adapter.rank_pattern", '{"mlp": 3}'],
        ["rank_pattern", "'mlp'", "whole dotted path"],
    ),
    "a layer that is not there": (
        ["--adapter.layers", "[5]"],
        ["layers=(5,)", "5 is no layer", "from 0 to 1"],
    ),
    "a rank above what a block holds": (
        ["--adapter.rank", "40"],
        ["rank 20 for subspace 0", "16", "lower the rank"],
    ),
    "ranks that do not sum": (["--adapter.ranks", "[1, 2]"], ["sum to 3", "rank=8"]),
    "too many ranks": (["--adapter.ranks", "[2, 3, 3]"], ["expected 2 positive ranks"]),
    "more subspaces than a dimension": (
        ["--adapter.num_subspaces", "33", "--adapter.rank", "33"],
        ["num_subspaces=33", "at most 32"],
    ),
    "an empty spectral band": (
        ["--adapter.partition=spectral_bands", "--adapter.num_subspaces=25", "--adapter.rank=25"],
        ["empty spectral band", "of 25", "layers.", "lower num_subspaces"],
    ),
    "a partition that nobody knows": (
        ["--adapter.partition", "spectral"],
        ["adapter.partition=spectral", "expected one of spectral_blocks, aligned_blocks"],
    ),
    "an unknown option": (["--train.stepz", "3"], ["--train.stepz", "did you mean --train.steps?"]),
    "a word for a number": (["--train.steps", "many"], ["train.steps=many", "expected int"]),
    "a single file for a list": (
        ["--data.train_files", "rows.jsonl"],
        ["data.train_files=rows.jsonl", "expected a list, such as '[rows.jsonl]'"],
    ),
    "a mesh of other devices": (["--mesh.data", "3"], ["3 devices", "change the mesh sizes"]),
    "a batch in unequal parts": (["--train.accumulate", "3"], ["batch_size=8", "accumulate=3"]),
    "more questions than rows": (
        ["--evaluation.rows", "9"],
        ["got 8 held-out questions", "evaluation.rows=9"],
    ),
    "a template that the tokenizer lacks": (
        ["--data.template", "chat"],
        ["without a chat template", "use template alpaca or plain"],
    ),
    "a remat policy that nobody knows": (
        ["--model.remat", "some"],
        ["model.remat=some", "one of none, dots"],
    ),
    "no rows for training": (["--data.train_files", "[]"], ["without data.train_files"]),
    "a task beside files": (["--data.source", "arithmetic"], ["data.source=arithmetic"]),
    "resume of nothing": (["--resume"], ["holds no run", "leave --resume out"]),
    "resume and overwrite": (["--resume", "--overwrite"], ["both resume and overwrite"]),
    "a model that is not there": (
        ["--model.path", "no/such/model"],
        ["no/such/model", "no such file or directory"],
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_bad_setting_starts_no_run(place, capsys, name):
    options, words = SETTINGS[name]
    check_refused(capsys, ["train", "--config", place.config, *options], words, [place.base])
    assert not place.run.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"model: {path: x}\ntrain: {output_dir: y, stepz: 3}\n", ["stepz"]),
        (b"model: [1\n", ["line"]),
        (b"just words\n", ["'just words'", "sections of a run"]),
        (b"", ["holds ''", "sections of a run"]),
        (b"\xff\xfe\x00", ["not text", "YAML in UTF-8"]),
        (b"train: {steps: 3}\n", ["model.path", "required"]),
    ],
)
def test_a_bad_configuration_file_is_refused(tmp_path, capsys, text, words):
    config = tmp_path / "bad.yaml"
    config.write_bytes(text)
    check_refused(capsys, ["train", "--config", config], words, [])
    assert sorted(tmp_path.iterdir()) == [config]


def test_a_configuration_that_is_not_there_is_named(tmp_path, capsys):
    check_refused(capsys, ["train", "--config", tmp_path / "no.yaml"], ["no.yaml"], [])


def test_a_batch_that_the_mesh_does_not_divide_is_refused(place, capsys, monkeypatch):
    monkeypatch.setattr(run_model, "make_mesh", mesh.make_mesh)  # all eight devices
    arguments = ["train", "--config", place.config]
    words = ["train.batch_size", "=12", "multiple of 8"]
    check_refused(capsys, [*arguments, "--train.batch_size", "12"], words, [])
    words = ["train.eval_batch_size=3", "multiple of 8"]
    check_refused(capsys, [*arguments, "--train.eval_batch_size", "3"], words, [])
    assert not place.run.exists()


# -------------------------------------------------------------------------------------- the rows

LONG = "a question that fills the whole length and more"
ROWS: dict[str, tuple[str, str, list[str]]] = {
    "a row without the fields": (
        "rows.jsonl",
        '{"instruction": "a", "output": "b"}\n{"words": "c"}\n',
        ["rows.jsonl row 2", "fields words", "instruction/output", "data.on_bad_row=skip"],
    ),
    "a torn row": ("rows.jsonl", '{"instruction": "a", "out', ["row 1", "not JSON", "on_bad_row"]),
    "an empty file": ("rows.jsonl", "", ["empty data set", "rows.jsonl"]),
    "an empty list": ("rows.json", "[]", ["empty data set", "rows.json"]),
    "lines in a .json": ("rows.json", '{"a": 1}\n{"a": 2}\n', ["rows.json", ".jsonl"]),
    "not a Parquet file": ("rows.parquet", "PAR1", ["rows.parquet", "Parquet"]),
    "another kind of file": ("rows.csv", "a,b\n", ["rows.csv", ".parquet"]),
    "only prompts that are too long": (
        "rows.jsonl",
        "".join(json.dumps({"instruction": f"{LONG} {n}", "output": "x"}) + "\n" for n in "1234"),
        ["no usable row", "prompt_too_long 4", "raise max_length above 20"],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows_start_no_run(place, tmp_path, capsys, name):
    file, text, words = ROWS[name]
    path = tmp_path / "bad" / file
    path.parent.mkdir()
    path.write_text(text)
    options = ["--data.train_files", f"[{path}]", "--data.eval_rows", "0", "--evaluation.rows", "0"]
    check_refused(capsys, ["train", "--config", place.config, *options], words, [path])
    assert not place.run.exists()


def test_rows_that_are_skipped_or_too_long_are_counted_and_never_nan(place, capsys):
    pairs = [(f"sky {n}", "blue") for n in range(8)] + [(f"{LONG} {n}", "x") for n in range(5)]
    write_rows(place.rows, pairs)
    with place.rows.open("a") as file:
        file.write('{"words": "c"}\n{"instruction": "a", "out\n')
    options = ["--data.on_bad_row", "skip", "--data.eval_rows", "0", "--evaluation.rows", "0"]
    arguments = ["train", "--config", str(place.config), "--train.steps", "2", *options]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "data: 8 rows to train on, 0 held out" in printed
    assert "2 bad rows left out" in printed
    assert "5 prompts left out, too long" in printed
    lines = (place.run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = [record["loss"] for record in records if record["event"] == "train"]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


# ------------------------------------------------------------------------------------- the model


MODELS: dict[str, tuple[Damage, list[str]]] = {
    "truncated": (truncate, ["model.safetensors", "not a whole safetensors file"]),
    "corrupted": (corrupt, ["model.safetensors", "download or copy it again"]),
    "a shape of another config": (
        with_config(intermediate_size=40),
        ["of shape (48, 32)", "expected (40, 32)"],
    ),
    "a missing tensor": (with_tensors(lambda t: t.pop(UP)), [f"missing tensor {UP}"]),
    "a surplus tensor": (
        with_tensors(lambda t: t.update({"model.layers.1.mlp.up_proj.bias": np.zeros(48, "f4")})),
        ["surplus tensor model.layers.1.mlp.up_proj.bias"],
    ),
    "pickles": (pickle, ["pytorch_model.bin", "when opened", "expected safetensors"]),
    "remote code": (with_config(auto_map={"AutoModel": "m.M"}), ["auto_map", "remote code"]),
    "another architecture": (with_config(model_type="mamba"), ["model_type 'mamba'", "llama"]),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), ["without tokenizer.json"]),
    "a broken tokenizer": (
        lambda m: (m / "tokenizer.json").write_text("{"),
        ["cannot read a tokenizer", "download it again"],
    ),
    "no configuration": (lambda m: (m / "config.json").unlink(), ["without config.json"]),
    "embeddings of a smaller vocabulary": (
        with_tensors(shorten_vocabulary),
        ["embed_tokens", "(40, 32)", "(288, 32)"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_unfit_model_starts_no_run_and_answers_no_prompt(place, model, capsys, name):
    damage, words = MODELS[name]
    damage(model)
    train = ["train", "--config", place.config, "--model.path", model]
    check_refused(capsys, train, words, [model])
    generate = ["generate", "--model", model, "--prompt", "sky 1"]
    check_refused(capsys, generate, words, [model])
    assert not place.run.exists()


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_is_refused_by_its_name(place, tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    words = [name, "a pickle", "refused"]
    train = ["train", "--config", place.config, "--model.path", tmp_path / name]
    check_refused(capsys, train, words, [tmp_path / name])
    check_refused(capsys, ["inspect", "--model", tmp_path / name], words, [])
    assert not place.run.exists()


@pytest.mark.parametrize("kept", [4, 2000, -1000])
def test_a_truncated_gguf_file_is_refused(place, tmp_path, capsys, kept):
    path = write_gguf(tmp_path / "model.gguf", CONFIG, llama_tensors(CONFIG))
    path.write_bytes(path.read_bytes()[:kept])
    words = ["model.gguf", "not a whole GGUF file", "download or copy it again"]
    train = ["train", "--config", place.config, "--model.path", path]
    check_refused(capsys, train, words, [path])
    check_refused(capsys, ["generate", "--model", path, "--prompt", "a"], words, [path])
    assert not place.run.exists()


def test_prompts_with_tokens_that_the_model_lacks_are_refused(model, capsys):
    """A tokenizer of another model: JAX would clamp the ids and answer nonsense."""
    with_tensors(shorten_vocabulary)(model)
    with_config(vocab_size=40)(model)
    words = ["token id", "40 embeddings", "use the tokenizer of this model"]
    check_refused(capsys, ["generate", "--model", model, "--prompt", "sky"], words, [model])
