"""What the commands must not do to runs, adapters and models that are there: nothing is harmed."""

from __future__ import annotations

import shutil
import sys

import pytest

from smoa_jax.cli import main
from smoa_jax.sharding import mesh
from smoa_jax.training import model as run_model
from tests.cli.damage import make_another_base
from tests.cli.tiny import check_refused

pytestmark = pytest.mark.usefixtures("one_device")


# ---------------------------------------------------------------------------------- other runs


RESUMED: dict[str, tuple[list[str], list[str]]] = {
    "another rank": (["--adapter.rank", "6"], ["belongs to another run", "rank=8, expected 6"]),
    "another adapter": (
        ["--adapter.partition", "random_blocks"],
        ["partition='spectral_blocks', expected 'random_blocks'"],
    ),
    "another base": (["--model.path", "MODEL"], ["base_fingerprint", "use a new directory"]),
    "another order of the data": (
        ["--data.seed", "5"],
        ["data position with seed 0", "start a new run"],
    ),
    "fewer steps than it has taken": (
        ["--train.steps", "30"],
        ["30 steps to resume from step 120", "raise train.steps"],
    ),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_is_not_resumed_as_another_one(finished, model, capsys, name):
    options, words = RESUMED[name]
    make_another_base(model)
    options = [str(model) if word == "MODEL" else word for word in options]
    arguments = ["train", "--config", finished.config, "--train.output_dir", finished.run]
    check_refused(capsys, [*arguments, "--resume", *options], words, [finished.run])


def test_a_run_is_not_overwritten_unasked(finished, capsys):
    arguments = ["train", "--config", finished.config, "--train.output_dir", finished.run]
    words = ["not empty", "--resume", "--overwrite"]
    check_refused(capsys, arguments, words, [finished.run])


def test_overwriting_is_refused_before_anything_is_deleted(finished, base, capsys, monkeypatch):
    arguments = ["train", "--config", finished.config, "--overwrite", "--train.output_dir"]
    check_refused(capsys, [*arguments, base], ["holds no run"], [base])
    check_refused(capsys, [*arguments, finished.config], ["is a file"], [finished.run])
    options = [finished.run, "--adapter.rank", 40]
    check_refused(capsys, [*arguments, *options], ["lower the rank"], [finished.run])
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    options = [finished.run, "--train.tensorboard", "true"]
    check_refused(capsys, [*arguments, *options], ["pip install"], [finished.run])


def test_overwriting_spares_the_model_and_the_rows_that_the_run_reads(finished, model, capsys):
    inside = finished.run / "merged"
    shutil.copytree(model, inside)
    arguments = ["train", "--config", finished.config, "--train.output_dir", finished.run]
    words = ["would replace", "choose another directory"]
    options = ["--overwrite", "--model.path", inside]
    check_refused(capsys, [*arguments, *options], words, [finished.run])
    rows = shutil.copy(finished.rows, finished.run / "rows.jsonl")
    options = ["--overwrite", "--data.train_files", f"[{rows}]"]
    check_refused(capsys, [*arguments, *options], words, [finished.run])


@pytest.mark.parametrize("command", ["generate", "export", "inspect", "evaluate"])
def test_an_adapter_goes_onto_its_own_base_alone(finished, model, tmp_path, capsys, command):
    make_another_base(model)
    arguments = {
        "generate": ["--prompt", "sky 1"],
        "export": ["--output", tmp_path / "merged"],
        "inspect": [],
        "evaluate": ["--config", finished.config],
    }[command]
    names = ("--model.path", "--adapter_dir") if command == "evaluate" else ("--model", "--adapter")
    words = ["for an adapter of", "expected the base that it was trained on"]
    options = [names[0], model, names[1], finished.adapter]
    check_refused(capsys, [command, *arguments, *options], words, [model, finished.run])
    assert not (tmp_path / "merged").exists()


def test_a_damaged_adapter_or_none_is_refused(finished, capsys):
    generate = ["generate", "--model", finished.base, "--prompt", "sky 1", "--adapter"]
    check_refused(capsys, [*generate, finished.base], ["without adapter.json", "adapter/"], [])
    tensors = finished.adapter / "adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    words = ["adapter.safetensors", "damaged or incomplete", "copy it again"]
    check_refused(capsys, [*generate, finished.adapter], words, [finished.adapter])
    description = finished.adapter / "adapter.json"
    description.write_text(description.read_text().replace('"rank": 8', '"rank": 6'))
    words = ["adapter.safetensors"]  # the digest of the tensors no longer fits them
    check_refused(capsys, [*generate, finished.adapter], words, [finished.adapter])


# ------------------------------------------------------------------------------- the other commands


def test_an_export_replaces_a_model_when_told_and_nothing_else(finished, model, tmp_path, capsys):
    export = ["export", "--model", model, "--adapter", finished.adapter, "--output"]
    told = ["--overwrite"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    check_refused(capsys, [*export, mine], ["already exists", "overwrite"], [mine])
    words = ["without config.json", "isn't an exported model"]
    check_refused(capsys, [*export, mine, *told], words, [mine])
    words = ["would replace", "choose another directory"]
    for output in (model, model / ".", finished.adapter, finished.run):
        for kind in ("huggingface", "orbax", "peft"):
            options = [output, "--format", kind, *told]
            check_refused(capsys, [*export, *options], words, [model, finished.run])
    words_of_import = ["import", "--model", model, "--peft", finished.adapter, "--output"]
    for output in (model, finished.adapter, finished.run):
        check_refused(capsys, [*words_of_import, output, *told], words, [model, finished.run])
    link = tmp_path / "link"
    link.symlink_to(model)
    check_refused(capsys, [*export, link, *told], words, [model])


COMMANDS = {
    "an unknown command": (["tune"], ["got command 'tune'", "expected train, evaluate"]),
    "no prompt": (["generate", "--model", "BASE"], ["prompt"]),
    "an empty list of prompts": (
        ["generate", "--model", "BASE", "--prompt", "[]"],
        ["got no prompt", "--prompt 'a text'"],
    ),
    "a prompt beyond the model's positions": (
        ["generate", "--model", "BASE", "--prompt", "sky 1"],
        ["64 new ones", "expected at most 64 together"],
    ),
    "no room for an answer": (
        ["generate", "--model", "BASE", "--prompt", "sky 1", "--max_new_tokens", "0"],
        ["max_new_tokens 0", "at least 1"],
    ),
    "a chat template that is not there": (
        ["generate", "--model", "BASE", "--prompt", "sky 1", "--template", "chat"],
        ["without a chat template"],
    ),
    "an unknown template": (
        ["generate", "--model", "BASE", "--prompt", "a", "--template", "alpacca"],
        ["template=alpacca", "auto, alpaca, chat, plain"],
    ),
    "evaluate without an adapter": (
        ["evaluate", "--config", "CONFIG"],
        ["adapter_dir"],
    ),
    "evaluate without held-out rows": (
        ["evaluate", "--config", "CONFIG", "--adapter_dir", "ADAPTER", "--data.eval_rows=0"],
        ["without held-out rows", "data.eval_rows"],
    ),
    "evaluate with too few rows": (
        ["evaluate", "--config", "CONFIG", "--adapter_dir", "ADAPTER", "--evaluation.rows", "9"],
        ["8 held-out questions", "evaluation.rows=9"],
    ),
}


def test_evaluation_batches_that_the_mesh_does_not_divide_are_refused(trained, capsys, monkeypatch):
    monkeypatch.setattr(run_model, "make_mesh", mesh.make_mesh)  # all eight devices
    arguments = ["evaluate", "--config", trained.config, "--adapter_dir", trained.adapter]
    words = ["train.eval_batch_size=3", "multiple of 8"]
    check_refused(capsys, [*arguments, "--train.eval_batch_size", 3], words, [trained.run])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_refuses_what_it_cannot_do(trained, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, words = COMMANDS[name]
    known = {"BASE": trained.base, "ADAPTER": trained.adapter, "CONFIG": trained.config}
    arguments = [known.get(word, word) for word in arguments]
    check_refused(capsys, arguments, words, [trained.base, trained.run])
    assert list(tmp_path.iterdir()) == []


def test_an_upload_without_a_token_says_so_before_anything_else(trained, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    capsys.readouterr()
    assert main(["upload", "--directory", str(trained.run), "--name", "me/mine"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "got no token of the hub" in said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--train.step", "5"], ["--train.step", "did you mean --train.steps?"]),
        (["generate", "--max_new_token", "3"], ["did you mean --max_new_tokens?"]),
        (
            ["generate", "--train.steps", "3"],
            ["got --train.steps, an option of smoa train, smoa experiment; expected one of smoa"],
        ),
        (
            ["train", "--max_new_tokens=3"],
            ["an option of smoa generate; expect", "did you mean --evaluation.max_new_tokens?"],
        ),
        (
            ["upload", "--checkpoint", "best"],
            ["an option of smoa evaluate, smoa generate, smoa export, smoa inspect; expected"],
        ),
        (["train", "--model", "model.gguf"], ["got --model,", "did you mean --model.path?"]),
        (["generate", "--model.path", "M", "--prompt", "a"], ["did you mean --model?"]),
        (["evaluate", "--adapter", "runs/nope"], ["runs/nope", "does not exist"]),
        (["generate", "--model.path=M"], ["got --model.path,"]),
    ],
)
def test_an_option_that_is_nearly_one_is_refused_with_the_one_that_is(
    tmp_path, capsys, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    check_refused(capsys, arguments, words, [])
