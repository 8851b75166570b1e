"""What the runs of a grid learn and are scored on: rows, encoded once for each seed.

The capacity probe's pairs are random, so nothing of them can be held out: every pair is learned and
asked for. Every other task has training, validation and test rows without a common question;
validation chooses the rate, the test is reported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import random
from collections import Counter
from typing import Any

import numpy as np

from smoa_jax.checks import require
from smoa_jax.data.build import index_rows, load_rows
from smoa_jax.data.config import DataConfig
from smoa_jax.data.encode import Questions, encode_questions, encode_rows
from smoa_jax.data.packing import plan_rows
from smoa_jax.data.pipeline import ExamplesIndex, TrainStream
from smoa_jax.data.rows import AnyRow, Row, Text
from smoa_jax.data.splits import drop_overlap
from smoa_jax.data.templates import make_template
from smoa_jax.experiments.config import ExperimentConfig, ProbeConfig

#: Tokens of English that are had from so many characters, at the least.
_CHARACTERS_A_TOKEN = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Rows to be scored on: their loss, and answers to their questions."""

    rows: ExamplesIndex
    questions: Questions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What runs of one seed share.

    Attributes:
        batches: Of all steps, each array (steps, rows, positions).
        splits: ``test``, and ``validation`` where something is held out for it.
        counts: Rows of each part, and what was dropped.
        digest: Changes with every token of any row.
    """

    batches: dict[str, np.ndarray]
    splits: dict[str, Split]
    counts: dict[str, int]
    digest: str


def probe_rows(probe: ProbeConfig, seed: int) -> list[AnyRow]:
    """Distinct random keys, each with a random value; a pure function of its arguments."""
    rng = random.Random(f"pairs/{probe.pairs}/{probe.characters}/{seed}")

    def word() -> str:
        return "".join(rng.choice("0123456789abcdef") for _ in range(probe.characters))

    pairs: dict[str, str] = {}
    while len(pairs) < probe.pairs:
        pairs.setdefault(word(), word())
    return [Row(instruction=key, output=value) for key, value in pairs.items()]


def build_task(config: ExperimentConfig, seed: int, tokenizer: Any) -> Task:
    """The task of a seed.

    Raises:
        ValueError: for rows that don't fit into ``data.max_length``, or too few of them.
    """
    data = dataclasses.replace(config.data, seed=seed)
    if config.probe.pairs:
        train = probe_rows(config.probe, seed)
        parts, counts = {"test": train}, Counter()
    else:
        train, parts, counts = _split_rows(config, data)
    template = make_template(data.template, tokenizer)
    digest = hashlib.sha256()

    def encode(rows: list[AnyRow]) -> ExamplesIndex:
        index = index_rows(rows, data, template, tokenizer)
        examples = index.examples
        cut = examples.counts["responses_truncated"] + examples.counts["prompt_too_long"]
        require(
            not (config.probe.pairs and cut),
            f"{cut} of {len(rows)} pairs longer than data.max_length={data.max_length}",
            "room for every one of them",
            "raise it",
        )
        counts.update(
            prompts_too_long=examples.counts["prompt_too_long"],
            responses_cut=examples.counts["responses_truncated"],
        )
        digest.update(examples.tokens.tobytes())
        return index

    index = encode(train)
    splits = {
        name: Split(
            rows=index if rows is train else encode(rows),
            questions=encode_questions(
                rows, template, tokenizer, max_length=data.max_length, on_bad_row=data.on_bad_row
            ),
        )
        for name, rows in parts.items()
    }
    return Task(
        batches=_batches(config, index, seed),
        splits=splits,
        counts={"train": len(train), **{name: len(rows) for name, rows in parts.items()}, **counts},
        digest=digest.hexdigest()[:16],
    )


def _split_rows(
    config: ExperimentConfig, data: DataConfig
) -> tuple[list[AnyRow], dict[str, list[AnyRow]], Counter[str]]:
    """Training rows, validation and test rows, and counts of what was dropped."""
    # The choice of held-out rows is not of the run's seed: all runs are scored on the same.
    train, held_out, counts = load_rows(dataclasses.replace(data, seed=config.data.seed))
    scoring = config.scoring
    if scoring.test_rows:
        require(
            len(held_out) > scoring.test_rows,
            f"{len(held_out)} held-out rows and scoring.test_rows={scoring.test_rows}",
            "more of the first, since validation rows choose the rate",
            "hold out more rows",
        )
        cut = len(held_out) - scoring.test_rows
        return train, {"validation": held_out[:cut], "test": held_out[cut:]}, counts
    _, test, in_train = load_rows(dataclasses.replace(data, eval_files=scoring.test_files))
    test, in_validation = drop_overlap(held_out, test)
    counts["test_in_train"] = in_train["eval_in_train"]
    counts["test_in_validation"] = in_validation["eval_in_train"]
    require(bool(held_out), "no validation rows", "some, to choose the rate", "set data.eval_files")
    return train, {"validation": held_out, "test": test}, counts


def _batches(config: ExperimentConfig, index: ExamplesIndex, seed: int) -> dict[str, np.ndarray]:
    """The same rows in the same order for every method."""
    stream = TrainStream(index, config.train.batch_size, seed, prefetch=0)
    try:
        found = [next(stream)[0] for _ in range(config.train.steps)]
    finally:
        stream.close()
    return {name: np.stack([batch[name] for batch in found]) for name in found[0]}


def plain_text(config: ExperimentConfig, tokenizer: Any) -> tuple[ExamplesIndex, str]:
    """Rows of plain English that every Python brings along, and what they are.

    It is the text of Python's own help on its topics, a reference manual of some 700,000
    characters; another version of Python may have another text, so it is named with a digest.
    """
    from pydoc_data.topics import topics

    scoring = config.scoring
    wanted = scoring.text_rows * scoring.text_length * _CHARACTERS_A_TOKEN
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))[:wanted]
    examples = encode_rows(
        [Text(text=text)],
        make_template("plain", tokenizer),
        tokenizer,
        max_length=scoring.text_length,
        response_only=False,
    )
    require(
        len(examples) >= scoring.text_rows,
        f"{len(examples)} rows of plain text",
        f"scoring.text_rows={scoring.text_rows}",
        "lower it",
    )
    end = examples.offsets[scoring.text_rows]
    first = dataclasses.replace(
        examples,
        tokens=examples.tokens[:end],
        trained=examples.trained[:end],
        offsets=examples.offsets[: scoring.text_rows + 1],
    )
    digest = hashlib.sha256(first.tokens.tobytes()).hexdigest()[:12]
    rows = ExamplesIndex(examples=first, plan=plan_rows(first, max_length=scoring.text_length))
    return rows, f"pydoc_data.topics of Python {platform.python_version()} ({digest})"
