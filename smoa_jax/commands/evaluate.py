"""Score an adapter on held-out rows."""

from __future__ import annotations

import dataclasses
import json
import math

from rich.console import Console
from rich.table import Table

from smoa_jax.adapter.tree import strip_smoa
from smoa_jax.checkpoint.base import abstract_base
from smoa_jax.checkpoint.native.directory import load_adapter, read_adapter
from smoa_jax.checks import refuse
from smoa_jax.commands.tables import console, shown
from smoa_jax.data.build import Data, build_data
from smoa_jax.data.tokenizer import load_tokenizer
from smoa_jax.sharding.processes import initialize, is_first, together
from smoa_jax.training.checks import check_data, describe_data
from smoa_jax.training.config import RunConfig
from smoa_jax.training.directory import jsonable
from smoa_jax.training.held_out import held_out_answers, held_out_loss
from smoa_jax.training.metrics import ProgressReport
from smoa_jax.training.model import load_model, spectra_cache
from smoa_jax.training.saved_adapter import adapter_directory


def evaluate(
    config: RunConfig, adapter_dir: str, checkpoint: str = "", *, as_json: bool = False
) -> int:
    """Score an adapter on the held-out rows of a run's data: loss, and answers if asked for."""
    initialize(config.distributed)
    say = console.print if is_first() and not as_json else _silent
    aside = Console(stderr=True, quiet=not is_first())
    with together():
        tokenizer = load_tokenizer(abstract_base(config.model.path).source)
        data = build_data(config.data, tokenizer, held_out_only=True)
        config = dataclasses.replace(config, data=data.config)
        if data.eval is None:
            refuse(
                "data without held-out rows",
                "some",
                "set data.eval_files, data.eval_rows or data.task.eval_rows",
            )
        say(describe_data(data), soft_wrap=True, markup=False)
    with adapter_directory(adapter_dir, checkpoint, config.model.path) as directory:
        trained_with = read_adapter(directory).template
        if trained_with not in ("", config.data.template):
            aside.print(
                f"warning: the adapter was trained with the template {trained_with}, and "
                f"data.template is {config.data.template}; expected the same for a fair score",
                style="yellow",
                soft_wrap=True,
            )
        loaded = load_model(config)
        check_data(config, loaded, data)
        with ProgressReport("planning spectra", 1, console=aside) as report:
            params = load_adapter(
                directory,
                loaded.base.params,
                base_fingerprint=loaded.base.fingerprint,
                cache_dir=spectra_cache(config.model.spectra_cache),
                progress=report.resize,
            )
    both = {"base": strip_smoa(params), "adapted": params}
    losses, accuracies = [], [math.nan, math.nan]
    for name, tree in both.items():
        with ProgressReport(f"held-out loss, {name}", 1, console=aside) as report:
            losses.append(held_out_loss(config, loaded, data.eval, tree, report.resize))
    for index, (name, tree) in enumerate(both.items() if config.evaluation.rows else ()):
        with ProgressReport(f"answers, {name}", 1, console=aside) as report:
            found = held_out_answers(config, loaded, data, tree, tokenizer, report.resize)
        accuracies[index] = found.score.accuracy
    if as_json and is_first():
        scores = {"loss_base": losses[0], "loss_adapted": losses[1], "rows": len(data.eval)}
        if config.evaluation.rows:
            scores |= {
                "accuracy_base": accuracies[0],
                "accuracy_adapted": accuracies[1],
                "scored_rows": config.evaluation.rows,
            }
        print(json.dumps(jsonable({"adapter": adapter_dir, "checkpoint": checkpoint, **scores})))
    name = f"{adapter_dir}{f' at {checkpoint}' if checkpoint else ''}"
    say(_table(config, name, data, losses, accuracies))
    return 0


def _table(
    config: RunConfig, name: str, data: Data, losses: list[float], accuracies: list[float]
) -> Table:
    assert data.eval is not None
    table = Table(title=f"{name} on {len(data.eval)} held-out rows")
    for column in ("", "base", "adapted"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("loss", *map(shown, losses))
    settings = config.evaluation
    if settings.rows:
        table.add_row(
            f"accuracy on {settings.rows} rows, free generation ({settings.answer})",
            *(shown(value, "{:.1%}") for value in accuracies),
        )
    return table


def _silent(*_: object, **__: object) -> None:
    """What the other processes print."""
