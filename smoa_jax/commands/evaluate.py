"""Score an adapter on held-out rows."""

from __future__ import annotations

import math

from rich.table import Table

from smoa_jax.adapter.tree import strip_smoa
from smoa_jax.checkpoint.base import abstract_base
from smoa_jax.checkpoint.native.directory import load_adapter, read_adapter
from smoa_jax.commands.tables import console, shown
from smoa_jax.data.config import build_data
from smoa_jax.data.tokenizer import load_tokenizer
from smoa_jax.evaluation.scoring import answer_questions
from smoa_jax.training.checks import check_data, describe_data
from smoa_jax.training.config import RunConfig
from smoa_jax.training.model import load_model
from smoa_jax.training.run import held_out_loss
from smoa_jax.training.state import place


def evaluate(config: RunConfig, adapter_dir: str) -> int:
    """Score an adapter on the held-out rows of a run's data: loss, and answers if asked for."""
    tokenizer = load_tokenizer(abstract_base(config.model.path).source)
    data = build_data(config.data, tokenizer)
    if data.eval is None:
        raise ValueError(
            "got data without held-out rows; expected some; set data.eval_files, data.eval_rows or "
            "data.task.eval_rows"
        )
    console.print(describe_data(data), soft_wrap=True, markup=False)
    trained_with = read_adapter(adapter_dir).template
    if trained_with not in ("", config.data.template):
        console.print(
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
    table.add_row("loss", shown(base_loss), shown(loss))
    if settings.rows:
        table.add_row(
            f"accuracy on {settings.rows} rows, free generation ({settings.answer})",
            *(shown(value, "{:.1%}") for value in accuracies),
        )
    console.print(table)
    return 0
