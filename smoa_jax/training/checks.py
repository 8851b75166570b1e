"""What is looked at before a run writes or deletes anything, and what it says of itself at first.

Everything that can be refused is refused here, in one line, while the output directory still is as
it was found.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smoa_jax.checkpoint.directories import check_apart
from smoa_jax.data.config import Data
from smoa_jax.evaluation.scoring import check_questions
from smoa_jax.sharding.mesh import check_batch
from smoa_jax.training.checkpoints import Identity, TrainingCheckpoints
from smoa_jax.training.config import RunConfig
from smoa_jax.training.model import LoadedModel

CONFIG_FILE = "config.yaml"

#: What data counts say in words, where they are not zero.
_COUNT_WORDS = {
    "bad_rows": "bad rows left out",
    "bad_rows_in_eval": "bad held-out rows left out",
    "eval_in_train": "held-out rows left out, since they occur in training",
    "prompt_too_long": "prompts left out, too long to leave room for a response",
    "responses_truncated": "responses cut",
}


class RunError(ValueError):
    """A run that cannot start or go on, in one line for people."""


def check_directory(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output directory that holds something else than the run to resume or replace."""
    directory = Path(config.train.output_dir)
    if resume and overwrite:
        raise RunError("got both resume and overwrite; expected one of them")
    if directory.exists() and not directory.is_dir():
        raise RunError(
            f"got train.output_dir={directory}, which is a file; expected a directory; choose "
            "another name"
        )
    holds_run = directory.exists() and any(directory.iterdir())
    if resume and not (directory / CONFIG_FILE).exists():
        raise RunError(
            f"got resume for {directory}, which holds no run (no {CONFIG_FILE}); expected the "
            "directory of an interrupted run; leave --resume out to start one"
        )
    if holds_run and overwrite:
        if not (directory / CONFIG_FILE).exists():
            raise RunError(
                f"got overwrite for {directory}, which is not empty but holds no run "
                f"(no {CONFIG_FILE}); expected a run's directory; choose another, or empty it "
                "yourself"
            )
        data = config.data
        check_apart(directory, [config.model.path, *data.train_files, *data.eval_files])
    if holds_run and not (overwrite or resume):
        raise RunError(
            f"got train.output_dir={directory}, which is not empty; expected a new directory; "
            "--resume goes on with the run there, --overwrite deletes it"
        )


def check_data(config: RunConfig, loaded: LoadedModel, data: Data) -> None:
    """Refuse data that the model, the mesh or the evaluation would only trip over later."""
    check_batch(loaded.mesh, eval_batch_size(config), "train.eval_batch_size")
    largest = max(int(rows.examples.tokens.max()) for rows in (data.train, data.eval) if rows)
    check_vocabulary(largest, loaded.base.config.vocab_size, config.model.path)
    check_questions(data.questions, config.evaluation.rows, config.evaluation.answer)
    _check_positions(config, loaded.base.config.max_positions, data)


def _check_positions(config: RunConfig, max_positions: int, data: Data) -> None:
    """Refuse rows and questions with more positions than the model was pretrained on."""
    longest = max(int(rows.examples.lengths.max()) for rows in (data.train, data.eval) if rows)
    if longest > max_positions:
        raise RunError(
            f"got a row of {longest} tokens for a model of {max_positions} positions; expected at "
            f"most as many; lower data.max_length={config.data.max_length}"
        )
    settings = config.evaluation
    prompts = data.questions.prompts[: settings.rows]
    longest = max((len(prompt) for prompt in prompts), default=0)
    if prompts and longest + settings.max_new_tokens > max_positions:
        raise RunError(
            f"got a held-out question of {longest} tokens and evaluation.max_new_tokens="
            f"{settings.max_new_tokens} for a model of {max_positions} positions; expected at most "
            "as many together; lower evaluation.max_new_tokens or data.max_length"
        )


def check_vocabulary(largest: int, vocab_size: int, model: str) -> None:
    """Refuse token ids that the model has no embedding for."""
    if largest >= vocab_size:
        raise RunError(
            f"got token id {largest} from the tokenizer of {model} for a model with "
            f"{vocab_size} embeddings; expected smaller ids; use the tokenizer of this model"
        )


def check_steps(steps: int, restored_step: int) -> None:
    """Refuse to resume a run that has gone further than it is now told to."""
    if restored_step > steps:
        raise RunError(
            f"got a run of {steps} steps to resume from step {restored_step}; expected at least "
            f"as many; raise train.steps, or start a new run in another train.output_dir"
        )


def describe_data(data: Data) -> str:
    """Rows to train on and held out, and what was left out or cut on the way."""
    counts: Counter[str] = Counter()
    for split in data.counts.values():
        counts.update(split)
    held_out = 0 if data.eval is None else len(data.eval.examples)
    parts = [f"{len(data.train.examples):,} rows to train on", f"{held_out:,} held out"]
    parts += [f"{counts[name]:,} {words}" for name, words in _COUNT_WORDS.items() if counts[name]]
    return "data: " + ", ".join(parts)


def eval_batch_size(config: RunConfig) -> int:
    """Rows of an evaluation batch: as given, or those of one part of a training batch."""
    train = config.train
    return train.eval_batch_size or train.batch_size // train.accumulate


def open_checkpoints(
    config: RunConfig, loaded: LoadedModel, directory: Path
) -> TrainingCheckpoints:
    """The checkpoints of a run; refused if they are another adapter's or base's."""
    return TrainingCheckpoints(
        directory / "checkpoints",
        keep_last=config.train.keep_last,
        keep_best=config.train.keep_best,
        identity=Identity(
            adapter_config=dataclasses.asdict(config.adapter),
            base_fingerprint=loaded.base.fingerprint,
        ),
    )


def write_config(config: RunConfig, path: Path) -> None:
    """The resolved configuration, as YAML (JSON is YAML), to run again."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(_as_json(config) + "\n", encoding="utf-8")
    draft.replace(path)


def changed_settings(config: RunConfig, path: Path) -> list[str]:
    """Settings that differ from those written at ``path``, as "name: was, is"; [] if unreadable."""
    try:
        before = dict(_flat(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError):
        return []
    now = dict(_flat(json.loads(_as_json(config))))
    return [
        f"{name}: {before.get(name, 'nothing')} before, {now.get(name, 'nothing')} now"
        for name in sorted({*before, *now})
        if before.get(name, "nothing") != now.get(name, "nothing")
    ]


def _as_json(config: RunConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2, default=list)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value
