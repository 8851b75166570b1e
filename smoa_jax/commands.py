"""What the commands of ``smoa`` do, apart from reading their arguments.

Each function is one command: its keyword arguments are the command's options, its docstring their
help, its return value the exit status.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.merge import merge_report, merge_smoa
from smoa_jax.adapter.tree import find_modulations, strip_smoa
from smoa_jax.adapter.types import Params
from smoa_jax.checkpoint import adapter_files, huggingface, orbax_export, peft_files
from smoa_jax.checkpoint.adapter_files import load_adapter, read_adapter, save_adapter
from smoa_jax.checkpoint.base import BaseModel, abstract_base, load_base
from smoa_jax.checkpoint.directories import check_target
from smoa_jax.checkpoint.hf_config import is_multimodal
from smoa_jax.checkpoint.hf_export import export_huggingface
from smoa_jax.checkpoint.orbax_export import export_orbax
from smoa_jax.checkpoint.peft_files import export_peft
from smoa_jax.checkpoint.peft_import import import_peft
from smoa_jax.checkpoint.peft_names import module_naming
from smoa_jax.data.config import build_data
from smoa_jax.data.encode import encode_prompt
from smoa_jax.data.templates import make_template
from smoa_jax.data.tokenizer import SpecialIds, load_tokenizer, special_ids
from smoa_jax.evaluation.inspection import plot_spectra, target_rows, update_spectra
from smoa_jax.evaluation.scoring import answer_questions, respond
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.generation import GenerationConfig
from smoa_jax.sharding.processes import is_first
from smoa_jax.training.config import RunConfig
from smoa_jax.training.loop import Summary, held_out_loss, run
from smoa_jax.training.preparation import check_data, check_vocabulary, describe_data
from smoa_jax.training.setup import load_model, place, resolve_dtype

_console = Console(highlight=False)


def train(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> int:
    """Train, then show what came of it."""
    summary = run(config, resume=resume, overwrite=overwrite)
    if summary.finished and is_first():
        _console.print(summary_table(summary))
        _console.print(f"adapter: {summary.adapter_dir}", soft_wrap=True, markup=False)
        _console.print(
            f"next:    smoa export --model {config.model.path} --adapter {summary.adapter_dir} "
            f"--output {config.train.output_dir}/merged",
            soft_wrap=True,
            markup=False,
        )
    return 0


def summary_table(summary: Summary) -> Table:
    """Trainable share, loss and accuracy before and after."""
    table = Table(title=f"{summary.steps} steps in {summary.seconds:.0f} s")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    share = summary.trainable / summary.total
    table.add_row("trained parameters", "", f"{summary.trainable:,} ({share:.2%} of the base)")
    table.add_row("held-out loss", _shown(summary.loss_before), _shown(summary.loss_after))
    if summary.scored_rows:
        table.add_row(
            f"accuracy on {summary.scored_rows} held-out rows, free generation",
            _shown(summary.accuracy_before, "{:.1%}"),
            _shown(summary.accuracy_after, "{:.1%}"),
        )
    if summary.skipped:
        table.add_row("steps skipped (not finite)", "", str(summary.skipped))
    return table


def evaluate(config: RunConfig, adapter_dir: str) -> int:
    """Score an adapter on the held-out rows of a run's data: loss, and answers if asked for."""
    tokenizer = load_tokenizer(abstract_base(config.model.path).source)
    data = build_data(config.data, tokenizer)
    if data.eval is None:
        raise ValueError(
            "got data without held-out rows; expected some; set data.eval_files, data.eval_rows or "
            "data.task.eval_rows"
        )
    _console.print(describe_data(data), soft_wrap=True, markup=False)
    trained_with = read_adapter(adapter_dir).template
    if trained_with not in ("", config.data.template):
        _console.print(
            f"warning: the adapter was trained with the template {trained_with}, and "
            f"data.template is {config.data.template}; expected the same for a fair score",
            style="yellow",
            soft_wrap=True,
        )
    loaded = load_model(config)
    check_data(config, loaded, data)
    params = load_adapter(adapter_dir, loaded.base.params, base_fingerprint=loaded.base.fingerprint)
    params = place(params, loaded.mesh, config)
    loss = held_out_loss(config, loaded, data.eval, params)
    base_loss = held_out_loss(config, loaded, data.eval, strip_smoa(params))
    accuracies = [math.nan, math.nan]
    settings = config.evaluation
    if settings.rows:
        for place_, tree in enumerate((strip_smoa(params), params)):
            answers = answer_questions(
                loaded.model,
                tree,
                data.questions,
                tokenizer,
                rows=settings.rows,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                protocol=settings.answer,
            )
            accuracies[place_] = answers.score.accuracy
    table = Table(title=f"{adapter_dir} on {len(data.eval)} held-out rows")
    for column in ("", "base", "adapted"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("loss", _shown(base_loss), _shown(loss))
    if settings.rows:
        table.add_row(
            f"accuracy on {settings.rows} rows, free generation ({settings.answer})",
            *(_shown(value, "{:.1%}") for value in accuracies),
        )
    _console.print(table)
    return 0


def generate(
    *,
    model: str,
    prompt: list[str],
    adapter: str = "",
    template: Literal["auto", "alpaca", "chat", "plain"] = "auto",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> int:
    """Continue prompts.

    Args:
        model: Hugging Face directory or GGUF file.
        prompt: A prompt, or a list of them.
        adapter: Adapter directory; empty: the base alone.
        template: What the prompts are put into; auto: what the adapter was trained with, else the
            tokenizer's chat template if it has one, else plain.
        max_new_tokens: Longest response.
        temperature: 0: greedy.
        top_p: Share of probability that sampling keeps.
        num_beams: Above 1: beam search.
        seed: Of sampling.
        dtype: Of weights and activations; auto: float32 on CPU, else bfloat16.
    """
    if not prompt:
        raise ValueError("got no prompt; expected at least one; give --prompt 'a text'")
    numbers = resolve_dtype(dtype)
    base, params = _load(model, adapter, numbers)
    tokenizer = load_tokenizer(base.source)
    note = ""
    if template == "auto":
        template, reason = _template(adapter, tokenizer)
        note = f"template: {template} ({reason}); --template chooses another"
    maker = make_template(template, tokenizer)
    ids = special_ids(tokenizer)
    prompts = [encode_prompt(text, tokenizer, maker) for text in prompt]
    largest = max(int(tokens.max(initial=0)) for tokens in prompts)
    check_vocabulary(largest, base.config.vocab_size, model)
    responses = respond(
        Decoder(config=base.config, dtype=numbers),
        params,
        prompts,
        tokenizer,
        GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_ids=ids.eos,
            pad_id=ids.pad,
            temperature=temperature,
            top_p=top_p,
            num_beams=num_beams,
        ),
        batch_size=len(prompt),
        key=jax.random.key(seed),
    )
    if note:
        print(note, file=sys.stderr)
    for text, response in zip(prompt, responses, strict=True):
        if len(prompt) > 1:
            _console.print(f"> {text}", style="bold", markup=False)
        _console.print(response, markup=False, soft_wrap=True)
    return 0


def _template(adapter: str, tokenizer: Any) -> tuple[Any, str]:
    """The template that suits an adapter or, without one, the tokenizer; and why."""
    trained_with = read_adapter(adapter).template if adapter else ""
    if trained_with:
        return trained_with, "the adapter was trained with it"
    if tokenizer.chat_template:
        return "chat", "the tokenizer has one"
    return "plain", "the tokenizer has no chat template"


def export(
    *,
    model: str,
    adapter: str,
    output: str,
    format: Literal["huggingface", "orbax", "peft"] = "huggingface",
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
) -> int:
    """Write a trained adapter for other tools.

    Args:
        model: The base it was trained on: Hugging Face directory or GGUF file.
        adapter: Adapter directory.
        output: Directory to write; must not hold anything.
        format: huggingface, orbax: a merged model; peft: an adapter for PEFT.
        dtype: Of the merged weights; the merge itself is in float32.
        max_shard_bytes: Largest file of a merged Hugging Face model.
        overwrite: Replace what output holds.
    """
    marker, what = {
        "huggingface": (huggingface.CONFIG_FILE, "an exported model"),
        "orbax": (orbax_export.MARKER, "an exported Orbax checkpoint"),
        "peft": (peft_files.CONFIG_FILE, "a PEFT adapter"),
    }[format]
    check_target(
        Path(output), marker=marker, what=what, overwrite=overwrite, inputs=[model, adapter]
    )
    base, params = _load(model, adapter, jnp.float32)
    if format == "peft":
        export_peft(
            params,
            read_adapter(adapter).config,
            output,
            base_model_name=str(Path(model)),
            hf_module_name=module_naming(base.hf_config),
            overwrite=overwrite,
        )
        _console.print(f"PEFT adapter: {output}", soft_wrap=True, markup=False)
        return 0
    target = jnp.dtype(dtype)
    _show_rounding(params, dtype)
    write = functools.partial(
        export_huggingface,
        max_shard_bytes=max_shard_bytes,
        multimodal_source=base.source if is_multimodal(base.hf_config) else None,
    )
    if format == "orbax":
        write = export_orbax
    tokenizer = load_tokenizer(base.source)
    write(
        merge_smoa(params, target),
        base.config,
        output,
        dtype=target,
        hf_config=base.hf_config,
        generation_config=_with_stops(base.generation_config, special_ids(tokenizer)),
        tokenizer=tokenizer,
        overwrite=overwrite,
    )
    _console.print(f"merged model: {output}", soft_wrap=True, markup=False)
    return 0


def _show_rounding(params: Params, dtype: str) -> None:
    """What rounding the merged kernels loses, with a warning where that is much of the update."""
    report = merge_report(params, jnp.dtype(dtype))
    table = Table(title=f"rounding of the merged kernels to {dtype}")
    for column in ("kernel", "rounding / update", "update that passes"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for name, loss in report.items():
        table.add_row(name, f"{loss.relative:.2%}", f"{loss.kept:.2%}")
    _console.print(table)
    worst = max(loss.relative for loss in report.values())
    if worst > 0.05:
        _console.print(
            f"warning: rounding to {dtype} disturbs an update by {worst:.0%} of its size; "
            "--dtype float32 keeps it, or serve the adapter unmerged",
            style="yellow",
            soft_wrap=True,
        )


def _with_stops(generation_config: dict[str, Any], ids: SpecialIds) -> dict[str, Any]:
    """The source's own; if it names no EOS, which other tools would never stop at, with ours."""
    if generation_config.get("eos_token_id") is not None:
        return generation_config
    own = {"eos_token_id": list(ids.eos), "pad_token_id": ids.pad}
    if ids.bos >= 0:
        own["bos_token_id"] = ids.bos
    return {**own, **{key: value for key, value in generation_config.items() if value is not None}}


def inspect(
    *,
    model: str,
    adapter: str = "",
    rank: int = 32,
    num_subspaces: int = 2,
    partition: str = "spectral_blocks",
    modulation: str = "weight",
    target_modules: list[str] | str | None = None,
    layers: list[int] | int | None = None,
    plot: str = "",
) -> int:
    """Show targets, counts and, for a trained adapter, the spectra of its updates.

    Args:
        model: Hugging Face directory or GGUF file.
        adapter: Adapter directory; empty: what the options below would train.
        rank: Total rank R.
        num_subspaces: M.
        partition: As in a run's adapter section.
        modulation: weight or none.
        target_modules: Names, a regular expression, or all-linear; none: the papers' five.
        layers: Layers whose updates to show, one or a list; none: all.
        plot: PNG file for the singular values of the updates.
    """
    if plot and not adapter:
        raise ValueError("got --plot without --adapter; expected a trained adapter to plot")
    if plot and Path(plot).suffix != ".png":
        raise ValueError(f"got --plot {plot}; expected a name that ends in .png")
    abstract = abstract_base(model)
    params: Params = {}
    chosen = (layers,) if isinstance(layers, int) else tuple(layers or ())
    if adapter:
        config = read_adapter(adapter).config
        _check_layers(chosen, abstract.config.num_layers)
        _, params = _load(model, adapter, jnp.float32)
    else:
        options: dict[str, Any] = {"partition": partition, "modulation": modulation}
        if target_modules is not None:
            options["target_modules"] = target_modules
        config = SmoaConfig(rank=rank, num_subspaces=num_subspaces, **options)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
    rows = target_rows(abstract.params, config)
    table = Table(title=f"{config.partition}, modulation {config.modulation}, rank {config.rank}")
    for column in ("kernel", "layers", "inputs x outputs", "ranks", "trained"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for row in rows:
        shape = f"{row.shape[0]} x {row.shape[1]}"
        ranks = "+".join(map(str, row.ranks))
        table.add_row(row.name, str(row.layers), shape, ranks, f"{row.trainable:,}")
    _console.print(table)
    trained = sum(row.trainable for row in rows)
    _console.print(f"trained {trained:,} of {total:,} base parameters: {trained / total:.3%}")
    if adapter:
        _show_updates(params, chosen, plot)
    return 0


def _check_layers(layers: tuple[int, ...], depth: int) -> None:
    if any(not 0 <= layer < depth for layer in layers):
        raise ValueError(f"got --layers {list(layers)}; expected indices from 0 to {depth - 1}")


def _show_updates(params: Params, layers: tuple[int, ...], plot: str) -> None:
    spectra = update_spectra(params, layers)
    table = Table(title="updates W' - W")
    for column in ("kernel", "layer", "rank", "norm / |W|", "largest", "median"):
        justify = "left" if column == "kernel" else "right"
        table.add_column(column, justify=justify, no_wrap=column == "kernel")
    for spectrum in spectra:
        values = spectrum.singular_values
        table.add_row(
            spectrum.name.removeprefix("layers."),
            str(spectrum.layer),
            f"{spectrum.rank} of {len(values)}",
            f"{spectrum.relative_norm:.2%}",
            f"{values[0]:.2e}",
            f"{values[len(values) // 2]:.2e}",
        )
    _console.print(table)
    if plot:
        Path(plot).parent.mkdir(parents=True, exist_ok=True)
        plot_spectra(spectra, plot)
        _console.print(f"plot: {plot}", soft_wrap=True, markup=False)


def _load(model: str, adapter: str, dtype: Any) -> tuple[BaseModel, Params]:
    base = load_base(model, dtype)
    if not adapter:
        return base, base.params
    params = load_adapter(adapter, base.params, base_fingerprint=base.fingerprint)
    return dataclasses.replace(base, params={}), params


def _shown(value: float, form: str = "{:.4f}") -> str:
    return form.format(value) if math.isfinite(value) else "-"


def import_adapter(*, model: str, peft: str, output: str, overwrite: bool = False) -> int:
    """Make an adapter of one that PEFT wrote.

    Args:
        model: The base it was trained on: Hugging Face directory or GGUF file.
        peft: Directory of a LoRA or HiRA adapter, or organisation/adapter on the hub.
        output: Adapter directory to write; must not hold anything.
        overwrite: Replace the adapter that output holds.
    """
    check_target(
        Path(output),
        marker=adapter_files.CONFIG_FILE,
        what="an adapter",
        overwrite=overwrite,
        inputs=[model, peft],
    )
    base = load_base(model, resolve_dtype("auto"))
    params, config = import_peft(peft, base.params)
    save_adapter(
        params,
        config,
        output,
        base_fingerprint=base.fingerprint,
        base_name=model,
        overwrite=overwrite,
    )
    kind = "HiRA" if config.modulation == "weight" else "LoRA"
    kernels = len(find_modulations(params))
    _console.print(
        f"{kind} of rank {config.rank} on {kernels} kernels; adapter: {output}",
        soft_wrap=True,
        markup=False,
    )
    return 0
