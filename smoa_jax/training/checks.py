"""What is looked at before a run writes or deletes anything, and what it says of its data.

Everything that can be refused is refused here, in one line, while the output directory still is as
it was found.
"""

from __future__ import annotations

from collections import Counter

from smoa_jax.checkpoint.directories import check_apart
from smoa_jax.checks import require
from smoa_jax.data.build import Data
from smoa_jax.evaluation.scoring import check_questions
from smoa_jax.sharding.mesh import check_batch
from smoa_jax.sharding.processes import is_first
from smoa_jax.storage import check_writable, is_remote
from smoa_jax.training.config import RunConfig
from smoa_jax.training.directory import RunDirectory, RunError
from smoa_jax.training.held_out import eval_batch_size
from smoa_jax.training.model import LoadedModel

#: What data counts say in words, where they are not zero.
_COUNT_WORDS = {
    "bad_rows": "bad rows left out",
    "bad_rows_in_eval": "bad held-out rows left out",
    "eval_in_train": "held-out rows left out, since they occur in training",
    "train_in_eval": "rows left out, whose questions are held out",
    "prompt_too_long": "prompts left out, too long to leave room for a response in data.max_length",
    "responses_truncated": "responses cut at data.max_length",
    "texts_divided": "texts longer than data.max_length divided into several rows",
}


def check_directory(
    config: RunConfig, directory: RunDirectory, *, resume: bool, overwrite: bool
) -> None:
    """Refuse a directory that holds something else than the run to resume or replace."""
    path = directory.path
    require(
        not resume or not overwrite,
        "both resume and overwrite",
        "one of them",
        "leave one out",
        error=RunError,
    )
    require(
        is_remote(path) or not path.exists() or path.is_dir(),
        f"train.output_dir={path}, which is a file",
        "a directory",
        "choose another",
        error=RunError,
    )
    require(
        not resume or directory.holds_run,
        f"resume for {path}, which holds no run (no {directory.config_file.name})",
        "the directory of an interrupted run",
        "leave --resume out to start one",
        error=RunError,
    )
    require(
        not directory.is_occupied or (resume or overwrite),
        f"train.output_dir={path}, which is not empty",
        "a new directory",
        "--resume goes on with the run there, --overwrite deletes it",
        error=RunError,
    )
    if directory.is_occupied and overwrite:
        require(
            directory.holds_run,
            f"overwrite for {path}, which is not empty but holds no run (no "
            f"{directory.config_file.name})",
            "a run's directory",
            "choose another, or empty it yourself",
            error=RunError,
        )
        check_apart(path, [config.model.path, *config.data.train_files, *config.data.eval_files])
    if is_first():
        check_writable(path)


def check_data(config: RunConfig, loaded: LoadedModel, data: Data) -> None:
    """Refuse data that the model, the mesh or the evaluation would only trip over later."""
    check_batch(loaded.mesh, eval_batch_size(config), "train.eval_batch_size")
    largest = max(int(rows.examples.tokens.max()) for rows in (data.train, data.eval) if rows)
    check_vocabulary(largest, loaded.base.config.vocab_size, config.model.path)
    if data.streamed is not None:
        data.streamed.require_ids_below(loaded.base.config.vocab_size)
    require(
        data.eval is not None or not config.train.patience,
        f"train.patience={config.train.patience} without held-out rows",
        "some",
        "set data.eval_rows or data.eval_files, or leave patience out",
        error=RunError,
    )
    settings = config.evaluation
    check_questions(data.questions, settings.rows, settings.answer, settings.task)
    _check_positions(config, loaded.base.config.max_positions, data)


def _check_positions(config: RunConfig, max_positions: int, data: Data) -> None:
    """Refuse rows and questions with more positions than the model was pretrained on."""
    longest = max(int(rows.examples.lengths.max()) for rows in (data.train, data.eval) if rows)
    if data.streamed is not None:  # of which the longest is yet to come
        longest = config.data.max_length
    require(
        longest <= max_positions,
        f"a row of {longest} tokens for a model of {max_positions} positions",
        "at most as many",
        f"lower data.max_length={config.data.max_length}",
        error=RunError,
    )
    settings = config.evaluation
    prompts = data.questions.prompts[: settings.rows]
    longest = max((len(prompt) for prompt in prompts), default=0)
    require(
        not prompts or longest + settings.max_new_tokens <= max_positions,
        f"a held-out question of {longest} tokens and "
        f"evaluation.max_new_tokens={settings.max_new_tokens} for a model of "
        f"{max_positions} positions",
        "at most as many together",
        "lower evaluation.max_new_tokens or data.max_length",
        error=RunError,
    )


def check_vocabulary(largest: int, vocab_size: int, model: str) -> None:
    """Refuse token ids that the model has no embedding for."""
    require(
        largest < vocab_size,
        f"token id {largest} from the tokenizer of {model} for a model with "
        f"{vocab_size} embeddings",
        "smaller ids",
        "use the tokenizer of this model",
        error=RunError,
    )


def check_steps(steps: int, restored_step: int) -> None:
    """Refuse to resume a run that has gone further than it is now told to."""
    require(
        restored_step <= steps,
        f"a run of {steps} steps to resume from step {restored_step}",
        "at least as many",
        "raise train.steps, or start a new run in another train.output_dir",
        error=RunError,
    )


def describe_data(data: Data) -> str:
    """Rows to train on and held out, and what was left out or cut on the way."""
    counts: Counter[str] = Counter()
    train = 0 if data.train is None else len(data.train.examples)
    for split in data.counts.values():
        counts.update(split)
    held_out = 0 if data.eval is None else len(data.eval.examples)
    to_train_on = f"{train:,} rows to train on"
    if data.streamed is not None:
        to_train_on = f"{len(data.streamed):,} rows to train on, streamed"
    parts = [f"{held_out:,} held out"]
    if data.train is not None:
        parts.insert(0, to_train_on)
    parts += _in_words(counts)
    return "data: " + ", ".join(parts) + f"; template {data.config.template}"


def describe_dropped(data: Data) -> str:
    """What was left out of rows that were streamed; empty for nothing."""
    counts = data.streamed.counts if data.streamed is not None else Counter()
    parts = _in_words(counts)
    return f"streamed, read ahead included: {', '.join(parts)}" if parts else ""


def _in_words(counts: Counter[str]) -> list[str]:
    return [f"{counts[name]:,} {words}" for name, words in _COUNT_WORDS.items() if counts[name]]


def advice_on_length(config: RunConfig, data: Data) -> str:
    """What to say of rows that are mostly padding, which costs as much as words; empty if few are.

    Packed rows and rows in buckets are as long as they need to be.
    """
    if data.train is None or config.data.pack or config.data.buckets or config.data.stream:
        return ""
    lengths = data.train.examples.lengths
    longest, limit = int(lengths.max()), config.data.max_length
    if 2 * longest > limit:
        return ""
    return (
        f"padding: the longest row has {longest} tokens, and every row is filled up to "
        f"data.max_length={limit}; {longest} would be as good and faster"
    )


def advice_on_steps(config: RunConfig, steps: int) -> str:
    """What to say of a run too short to learn much from; empty for others."""
    if steps >= 10 or config.train.steps:
        return ""
    return (
        f"steps: {steps} in all, of train.batch_size={config.train.batch_size} rows over "
        f"train.epochs={config.train.epochs:g}; few to learn from: lower the one or raise the other"
    )
