"""Every command of ``smoa`` on a tiny base: what a user types, and what is then on the screen."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.tree import apply_smoa
from smoa_jax.checkpoint.base import load_base
from smoa_jax.checkpoint.export import merged
from smoa_jax.checkpoint.export.huggingface import export_huggingface
from smoa_jax.checkpoint.native.directory import load_adapter, read_adapter, save_adapter
from smoa_jax.cli import main
from smoa_jax.data.tokenizer import load_tokenizer
from smoa_jax.models.decoder import Decoder
from tests.cli.tiny import COLOURS, refusal, write_rows

TOKENS = np.random.default_rng(3).integers(0, 280, (2, 12))


def shown(capsys, arguments, status=0):
    """What a command prints on standard output and error."""
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == status
    return capsys.readouterr()


def generate(capsys, place, *words, adapter=True):
    options = ["--adapter", place.adapter] if adapter else []
    return shown(
        capsys, ["generate", "--model", place.base, *options, "--max_new_tokens", 6, *words]
    )


def export(place, output, *words):
    return ["export", "--model", place.base, "--adapter", place.adapter, "--output", output, *words]


def numbers_of(text, label):
    """The last two cells of a table's row."""
    row = next(line for line in text.splitlines() if label in line)
    return [cell.strip() for cell in row.strip("│ ").split("│")][-2:]


def adapted_logits(place):
    base = load_base(place.base)
    params = load_adapter(place.adapter, base.params, base_fingerprint=base.fingerprint)
    apply = jax.jit(Decoder(config=base.config, dtype=jnp.float32).apply)
    return tuple(
        np.asarray(apply({"params": tree}, jnp.asarray(TOKENS))) for tree in (params, base.params)
    )


def with_factors_times(place, directory, factor):
    """A copy of the trained adapter whose updates are ``factor`` times as large."""
    base = load_base(place.base)
    params = load_adapter(place.adapter, base.params, base_fingerprint=base.fingerprint)
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * factor if getattr(path[-1], "name", "") == "b" else leaf, params
    )
    save_adapter(
        scaled,
        read_adapter(place.adapter).config,
        directory,
        base_fingerprint=base.fingerprint,
        base_name="scaled",
    )
    return directory


# ------------------------------------------------------------------------------ train, evaluate


def test_training_shows_its_data_and_its_table_and_what_comes_next(trained):
    text = trained.printed
    summary = json.loads((trained.run / "summary.json").read_text())
    assert "data: 32 rows to train on, 8 held out" in text
    assert numbers_of(text, "│ held-out loss") == [
        f"{summary['loss_before']:.4f}",
        f"{summary['loss_after']:.4f}",
    ]
    assert numbers_of(text, "accuracy on 8 held-out rows") == ["0.0%", "100.0%"]
    base = f"step 0: held-out loss {summary['loss_before']:.4f}, the base's own\n"
    assert base in text[: text.index("training 120/120")]
    # Two kernels in 2 layers, rank 8 in two blocks: half of (inputs + outputs) * 8 each.
    trained_parameters = 2 * sum((i + o) * 4 for i, o in [(32, 64), (48, 32)])
    assert f"{trained_parameters:,} (" in text
    assert "row 0: " in text  # one row as the model sees it, and what it is computed on
    assert re.search(r"device: 1 x .*attention xla; jax \d", text)
    card = (trained.adapter / "README.md").read_text()
    assert f"| trained parameters | {trained_parameters:,} |" in card
    assert f"held-out loss | {summary['loss_after']:.4f}" in card
    assert "rows.jsonl" in card
    assert f"smoa export --model {trained.base} --adapter {trained.adapter}" in text


def test_evaluate_repeats_the_figures_of_the_run_from_the_written_configuration(
    trained, capsys, tmp_path, one_device
):
    words = ["--config", trained.run / "config.yaml", "--adapter_dir", trained.adapter]
    text = shown(capsys, ["evaluate", *words]).out
    summary = json.loads((trained.run / "summary.json").read_text())
    assert numbers_of(text, "│ loss") == [
        f"{summary['loss_before']:.4f}",
        f"{summary['loss_after']:.4f}",
    ]
    assert numbers_of(text, "accuracy on 8 rows") == ["0.0%", "100.0%"]
    assert "warning" not in text
    shutil.copytree(trained.adapter, tmp_path / "adapter")
    record = json.loads((trained.adapter / "adapter.json").read_text()) | {"template": "alpaca"}
    (tmp_path / "adapter" / "adapter.json").write_text(json.dumps(record))
    words = [*words[:2], "--adapter_dir", tmp_path / "adapter", "--evaluation.rows", 0]
    text = " ".join(shown(capsys, ["evaluate", *words]).err.split())
    assert "warning: the adapter was trained with the template alpaca, and data.template is" in text


def test_evaluate_says_how_far_it_is_beside_what_it_prints(trained, capsys, one_device):
    words = ["evaluate", "--adapter", trained.run, "--evaluation.batch_size", 4, "--json"]
    said = shown(capsys, [*words, "--train.eval_batch_size", 4])
    assert set(json.loads(said.out)) >= {"loss_adapted", "accuracy_adapted"}
    lines = [line.split("  ")[0] for line in said.err.splitlines()]
    both = ("base", "adapted")
    # On a slow machine there are lines in between.
    assert [line for line in lines if line.endswith((" 2/2", " 8/8"))][-4:] == [
        *(f"held-out loss, {which} 2/2" for which in both),
        *(f"answers, {which} 8/8" for which in both),
    ]


def test_evaluate_needs_no_more_than_an_adapter_and_data(trained, capsys, tmp_path, one_device):
    summary = json.loads((trained.run / "summary.json").read_text())
    # A run brings its data; its directory and its adapter's say the same.
    for place in (trained.run, trained.adapter):
        found = shown(capsys, ["evaluate", "--adapter", place, "--json"])
        scores = json.loads(found.out)
        assert scores["loss_adapted"] == pytest.approx(summary["loss_after"], rel=1e-6)
        assert scores["loss_base"] == pytest.approx(summary["loss_before"], rel=1e-6)
        assert (scores["accuracy_adapted"], scores["scored_rows"], scores["rows"]) == (1.0, 8, 8)
    # An adapter alone names its base and its template.
    adapter = shutil.copytree(trained.adapter, tmp_path / "adapter")
    rows = write_rows(tmp_path / "new.jsonl", [("sky 31", "blue"), ("leaf 30", "green")])
    words = ["evaluate", "--adapter", adapter, "--data.eval_files", f"[{rows}]", "--json"]
    alone = json.loads(shown(capsys, words).out)
    assert alone["rows"] == 2
    assert alone["loss_adapted"] < 0.5 * alone["loss_base"]
    assert "accuracy_base" not in alone
    # Other rows than the run's own take the place of its whole data.
    words[2] = trained.run
    other = json.loads(shown(capsys, [*words, "--evaluation.rows", 0]).out)
    assert other["loss_adapted"] == pytest.approx(alone["loss_adapted"], rel=1e-5)


def test_a_preview_shows_rows_with_what_is_learned_and_writes_nothing(place, capsys):
    text = shown(capsys, ["train", "--config", place.config, "--preview", 2]).out
    assert "data: 32 rows to train on, 8 held out; template plain" in text
    assert text.count("\u27e6") == 2 * 2  # the mark is explained once a row
    assert re.search(r"(sky|leaf) \d+\n\u27e6(blue|green).*\u27e7", text)
    assert not place.run.exists()


def test_resuming_with_other_settings_says_so_and_writes_them_down(finished, capsys, one_device):
    """The steps are all taken: what is left is to score and save again."""
    words = ["--config", finished.config, "--train.output_dir", finished.run, "--resume"]
    text = shown(capsys, ["train", *words, "--optimizer.learning_rate", 0.05]).out
    assert "resuming with another setting, optimizer.learning_rate: 0.1 before, 0.05 now" in text
    assert "train.steps" not in text
    assert yaml.safe_load(finished.config.read_text())["optimizer"]["learning_rate"] == 0.05
    assert numbers_of(text, "accuracy on 8 held-out rows") == ["0.0%", "100.0%"]
    assert read_adapter(finished.adapter).facts["learning rate"] == 0.1  # that it was trained at


def test_a_name_on_the_hub_serves_model_and_tokenizer(
    trained, capsys, tmp_path, one_device, monkeypatch
):
    asked = []

    def download(name, **options):
        asked.append(name)
        return str(trained.base)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    name = "organisation/tiny"
    words = ["--config", trained.config, "--adapter_dir", trained.adapter, "--model.path", name]
    text = shown(capsys, ["evaluate", *words, "--evaluation.rows", 0]).out
    assert numbers_of(text, "│ loss")[1] in trained.printed
    words = ["--adapter", trained.adapter, "--prompt", "sky 7", "--max_new_tokens", 6]
    assert shown(capsys, ["generate", "--model", name, *words]).out == "blue\n"
    assert set(asked) == {name}


# ------------------------------------------------------------------------------------- generate


def test_generate_answers_with_the_adapter_and_not_without(trained, capsys):
    for thing, colour in COLOURS.items():
        assert generate(capsys, trained, "--prompt", f"{thing} 7").out == f"{colour}\n"
    base = generate(capsys, trained, "--prompt", "sky 7", adapter=False).out
    assert not any(colour in base for colour in COLOURS.values())


def test_several_prompts_in_either_form_are_answered_in_order(trained, capsys):
    words = ["--prompt", "sky 1", "--prompt", '["leaf 2", "sky 31"]', "--prompt", "leaf 4"]
    lines = generate(capsys, trained, *words).out.splitlines()
    answers = {"sky 1": "blue", "leaf 2": "green", "sky 31": "blue", "leaf 4": "green"}
    assert lines == [line for pair in answers.items() for line in (f"> {pair[0]}", pair[1])]


def test_prompts_come_from_a_file_or_standard_input_too(trained, capsys, tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_text("sky 1\n\nleaf 2\n")
    expected = ["> sky 1", "blue", "> leaf 2", "green"]
    assert generate(capsys, trained, "--prompt_file", path).out.splitlines() == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("leaf 3\n"))
    words = ["--prompt", "sky 2", "--prompt_file", "-"]
    lines = generate(capsys, trained, *words).out.splitlines()
    assert lines == ["> sky 2", "blue", "> leaf 3", "green"]
    missing = ["generate", "--model", trained.base, "--prompt_file", tmp_path / "none.txt"]
    assert "expected a file of prompts" in refusal(capsys, missing)


def test_a_conversation_goes_on_from_what_was_said(trained, capsys, tmp_path, monkeypatch):
    model = shutil.copytree(trained.base, tmp_path / "base")
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    asked = []

    def respond(model, params, prompts, tokenizer, config, *, batch_size, key):
        asked.append((tokenizer.decode(prompts[0]), config.top_k))
        return ("blue",)

    monkeypatch.setattr("smoa_jax.commands.generate.respond", respond)
    monkeypatch.setattr("sys.stdin", io.StringIO("sky 1\nleaf 2\n\nleaf 3\n"))
    words = ["generate", "--model", model, "--chat", "--system", "red", "--temperature", 1]
    out = shown(capsys, [*words, "--top_k", 3]).out
    assert [text.split("\n") for text, _ in asked] == [
        ["red", "sky 1", ""],
        ["red", "sky 1", "blue", "leaf 2", ""],
    ]
    assert {top_k for _, top_k in asked} == {3}
    # Nobody typed the questions on the screen, so they are shown before their answers.
    assert out.splitlines() == ["> sky 1", "blue", "> leaf 2", "blue"]
    plain = ["generate", "--model", trained.base, "--prompt", "sky 1", "--system", "red"]
    assert "--system with the template plain" in refusal(capsys, plain)
    both = ["generate", "--model", model, "--prompt", "sky 1", "--chat"]
    assert "--chat with prompts" in refusal(capsys, both)


def test_sampling_repeats_with_its_seed_and_differs_without(trained, capsys):
    def sample(seed, top_p=1.0):
        words = ["--prompt", "sky 7", "--temperature", 3, "--seed", seed, "--top_p", top_p]
        return generate(capsys, trained, *words).out

    drawn = [sample(seed) for seed in (1, 2, 3)]
    assert sample(1) == drawn[0]
    assert len(set(drawn)) > 1
    assert sample(1, top_p=0.01) == "blue\n"  # nothing but the likeliest token is left


def test_beams_find_the_answer_and_refuse_to_be_sampled(trained, capsys):
    words = ["--prompt", "leaf 7", "--num_beams", 3]
    assert generate(capsys, trained, *words).out == "green\n"
    arguments = ["generate", "--model", trained.base, *words, "--temperature", 1]
    assert "sampling and beam search" in refusal(capsys, arguments)


def test_generate_uses_the_template_that_the_adapter_was_trained_with(trained, capsys, tmp_path):
    remembered = generate(capsys, trained, "--prompt", "sky 7")
    assert remembered.err.startswith("template: plain (the adapter was trained with it)")
    assert generate(capsys, trained, "--prompt", "sky 7", "--template", "plain").err == ""
    # Alpaca's prompt does not fit the 64 positions of the tiny base: a sign that it was used.
    adapter = shutil.copytree(trained.adapter, tmp_path / "adapter")
    description = json.loads((adapter / "adapter.json").read_text())
    (adapter / "adapter.json").write_text(json.dumps(description | {"template": "alpaca"}))
    words = ["--adapter", adapter, "--prompt", "sky 7", "--max_new_tokens", 6]
    arguments = ["generate", "--model", trained.base, *words]
    assert re.search(r"prompt of \d\d\d tokens", refusal(capsys, arguments))
    # An adapter from before templates were remembered falls back, and says so.
    del description["template"]
    (adapter / "adapter.json").write_text(json.dumps(description))
    assert "no chat template" in shown(capsys, arguments).err


def test_generate_without_a_choice_takes_the_chat_template_that_there_is(trained, capsys, tmp_path):
    model = shutil.copytree(trained.base, tmp_path / "base")
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    arguments = ["generate", "--model", model, "--prompt", "sky 7", "--max_new_tokens", 6]
    chat = shown(capsys, arguments)
    assert chat.err.startswith("template: chat (")
    # This chat template writes what the plain one writes.
    assert shown(capsys, [*arguments, "--template", "plain"]).out == chat.out


# --------------------------------------------------------------------------------------- export


@pytest.mark.parity
def test_the_merged_export_gives_the_adapted_logits_in_transformers(trained, capsys, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = shown(capsys, export(trained, tmp_path / "merged")).out
    assert f"merged model: {tmp_path / 'merged'}" in text
    assert "warning" not in text
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    adapted, plain = adapted_logits(trained)
    np.testing.assert_allclose(theirs, adapted, atol=1e-3)
    assert np.abs(theirs - plain).max() > 0.1
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompt = tokenizer("sky 7\n", return_tensors="pt").input_ids
    # Stops by itself: the base's own files name no EOS, only its tokenizer does.
    answer = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer, skip_special_tokens=True) == "blue"


def test_the_merged_export_answers_like_the_adapter_in_one_file_or_several(
    trained, capsys, tmp_path
):
    output = tmp_path / "merged"
    shown(capsys, export(trained, output, "--max_shard_bytes", 60_000))
    assert len(list(output.glob("model-*.safetensors"))) > 1
    arguments = ["generate", "--model", output, "--prompt", "leaf 7", "--max_new_tokens", 6]
    assert shown(capsys, arguments).out == "green\n"
    # In float32, as the base is, nothing is rounded, and no table of nothing is shown.
    text = shown(capsys, export(trained, output, "--overwrite")).out
    assert "rounding: none" in text
    assert "rounding / update" not in text
    assert [path.name for path in output.glob("*.safetensors")] == ["model.safetensors"]
    assert shown(capsys, arguments).out == "green\n"


def test_a_bf16_export_reports_its_rounding_and_warns_of_a_gentle_adapter(
    trained, capsys, tmp_path
):
    gentle = with_factors_times(trained, tmp_path / "gentle", 1e-3)
    losses = []
    for adapter in (gentle, trained.adapter):
        output = tmp_path / f"{adapter.name}-merged"
        words = ["--adapter", adapter, "--output", output, "--dtype", "bfloat16"]
        text = shown(capsys, ["export", "--model", trained.base, *words]).out
        lost, passed = numbers_of(text, "layers.self_attn.q_proj")
        losses.append(float(lost.rstrip("%")))
        assert re.fullmatch(r"\d+\.\d\d%", passed)
        assert ("warning: rounding to bfloat16" in text) == (adapter == gentle)
        assert ("--dtype float32 keeps it" in text) == (adapter == gentle)
        written = json.loads((output / "config.json").read_text())
        assert "bfloat16" in (written.get("dtype"), written.get("torch_dtype"))
    assert losses[0] > 50 > 5 > losses[1]


@pytest.mark.parametrize(("size", "dtype"), [(1e-3, "float32"), (3.0, "bfloat16")])
def test_a_merged_model_is_in_the_bases_own_dtype_unless_that_loses_the_update(
    base, capsys, tmp_path, monkeypatch, size, dtype
):
    own = load_base(base)
    model = export_huggingface(
        own.params,
        own.config,
        tmp_path / "base",
        dtype=jnp.bfloat16,
        hf_config=own.hf_config,
        tokenizer=load_tokenizer(base),
    )
    stored = load_base(model)
    config = SmoaConfig(rank=4, num_subspaces=2, target_modules=["q_proj"])
    params = apply_smoa(stored.params, config, jax.random.key(0))
    node = params["layers"]["self_attn"]["q_proj"]["smoa"]
    params["layers"]["self_attn"]["q_proj"]["smoa"] = dataclasses.replace(node, b=node.b + size)
    known = {"base_fingerprint": stored.fingerprint, "base_name": "organisation/tiny"}
    adapter = save_adapter(params, config, tmp_path / "adapter", **known)
    words = ["export", "--model", model, "--adapter", adapter, "--output"]
    formed = []
    for name in ("merge_layer", "layer_loss"):
        function = getattr(merged, name)
        monkeypatch.setattr(
            merged, name, lambda *a, of=function, name=name: formed.append(name) or of(*a)
        )
    text = shown(capsys, [*words, tmp_path / "merged"]).out
    # Of each layer once to decide, and once to write.
    assert formed == ["layer_loss"] * 2 + ["merge_layer"] * 2
    count = sum(leaf.size for leaf in jax.tree.leaves(own.params))
    assert f"writing {count:,} parameters in {dtype}, " in text
    assert ("would disturb the update of layers.self_attn.q_proj" in text) == (dtype == "float32")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert dtype in (written.get("dtype"), written.get("torch_dtype"))
    # A card beside each says what it is and how to open it.
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "SMoA, spectral blocks" in card
    name = ["--format", "peft", "--base_name", "organisation/tiny"]
    shown(capsys, [*words, tmp_path / "peft", *name])
    config_file = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config_file["base_model_name_or_path"] == "organisation/tiny"
    card = (tmp_path / "peft" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {
        "tags": ["smoa", "jax", "peft"],
        "base_model": "organisation/tiny",
        "library_name": "peft",
    }


def test_every_export_says_of_the_training_what_the_adapter_says(trained, capsys, tmp_path):
    def table(directory):
        lines = (directory / "README.md").read_text().splitlines()
        return [line for line in lines if line.startswith("| ")]

    said = table(trained.adapter)
    for name in ("data", "rows of a step", "learning rate", "seed", "steps", "held-out loss"):
        assert any(line.startswith(f"| {name} | ") for line in said), name
    for kind in ("huggingface", "orbax", "peft"):
        shown(capsys, export(trained, tmp_path / kind, "--format", kind))
        assert table(tmp_path / kind) == said
    # Of another checkpoint, its own: it has as many steps, and nothing was measured after them.
    shown(capsys, export(trained, tmp_path / "half", "--format", "peft", "--checkpoint", 60))
    whole = [line for line in said if "held-out loss" not in line]
    half = ["| steps | 60 |" if line == "| steps | 120 |" else line for line in whole]
    assert table(tmp_path / "half") == half != whole


def test_an_adapter_that_goes_to_peft_and_back_answers_the_same(trained, capsys, tmp_path):
    shown(capsys, export(trained, tmp_path / "peft", "--format", "peft"))
    words = ["--peft", tmp_path / "peft", "--output", tmp_path / "back"]
    text = shown(capsys, ["import", "--model", trained.base, *words]).out
    assert text == f"HiRA of rank 8 on 2 kernels; adapter: {tmp_path / 'back'}\n"
    words = ["--adapter", tmp_path / "back", "--prompt", "leaf 7", "--max_new_tokens", 6]
    printed = shown(capsys, ["generate", "--model", trained.base, *words])
    assert printed.out == "green\n"
    assert printed.err.startswith("template: plain (the tokenizer has no chat template)")


@pytest.mark.parity
def test_the_peft_export_gives_the_adapted_logits_in_peft(trained, capsys, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    output = tmp_path / "peft"
    text = shown(capsys, export(trained, output, "--format", "peft")).out
    assert text == f"PEFT adapter: {output}\n"
    named = json.loads((output / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(trained.base)
    base = transformers.AutoModelForCausalLM.from_pretrained(trained.base)
    model = peft.PeftModel.from_pretrained(base, output).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(theirs, adapted_logits(trained)[0], atol=1e-3)
