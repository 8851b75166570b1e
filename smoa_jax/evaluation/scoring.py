"""Scoring held-out questions by free generation: what a user of the model would see.

In float32 the adapter is merged first, which is the same function and saves forming the residual
for every token; below float32 the adapted model itself generates, since a rounded merge is not it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smoa_jax.adapter.merge import merge_smoa
from smoa_jax.adapter.tree import find_modulations
from smoa_jax.adapter.types import Params
from smoa_jax.checks import require
from smoa_jax.data.encode import Questions
from smoa_jax.data.tokenizer import special_ids
from smoa_jax.evaluation.answers import (
    Protocol,
    Score,
    check_task,
    expected_answer,
    score_responses,
)
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.generation import GenerationConfig, generate
from smoa_jax.sharding.processes import fetch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """Responses to questions, and how many of them were right."""

    responses: tuple[str, ...]
    score: Score


def generation_params(model: Decoder, params: Params) -> Params:
    """The params to generate with: merged where that is exact, adapted otherwise."""
    if not find_modulations(params) or jnp.dtype(model.dtype) != jnp.float32:
        return params
    kernels = [leaf.dtype for leaf in jax.tree.leaves(params)]
    return merge_smoa(params) if all(dtype == jnp.float32 for dtype in kernels) else params


def respond(
    model: Decoder,
    params: Params,
    prompts: Sequence[np.ndarray],
    tokenizer: Any,
    config: GenerationConfig,
    *,
    batch_size: int,
    key: jax.Array | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, ...]:
    """Continue every prompt; responses come back as text, in the prompts' order.

    Prompts of like length share a batch; the last batch is filled up with a repeated row.
    """
    params = generation_params(model, params)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    responses = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        filled = rows + rows[-1:] * (batch_size - len(rows))
        lengths = np.asarray([len(prompts[row]) for row in filled])
        tokens = np.full((batch_size, int(lengths.max())), config.pad_id, np.int32)
        for place, row in enumerate(filled):
            tokens[place, : lengths[place]] = prompts[row]
        batch_key = None if key is None else jax.random.fold_in(key, start)
        result = generate(model, params, tokens, lengths, config, batch_key)
        produced, counts = fetch((result.tokens, result.lengths))
        for place, row in enumerate(rows):
            ids = produced[place, : counts[place]].tolist()
            responses[row] = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return tuple(responses)


def answer_questions(
    model: Decoder,
    params: Params,
    questions: Questions,
    tokenizer: Any,
    *,
    rows: int,
    max_new_tokens: int,
    batch_size: int,
    protocol: Protocol,
    task: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Greedy answers to the first ``rows`` questions, scored against their references.

    A known ``task`` narrows the labels that protocol ``choice`` looks for to the task's own.

    Raises:
        ValueError: as ``check_questions``.
    """
    check_questions(questions, rows, protocol, task)
    ids = special_ids(tokenizer)
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_ids=ids.eos, pad_id=ids.pad)
    responses = respond(
        model,
        params,
        questions.prompts[:rows],
        tokenizer,
        config,
        batch_size=batch_size,
        progress=progress,
    )
    score = score_responses(responses, questions.references[:rows], task, protocol)
    return Answers(responses=responses, score=score)


def check_questions(questions: Questions, rows: int, protocol: Protocol, task: str = "") -> None:
    """Refuse to score more questions than there are, or any whose reference holds no answer.

    Raises:
        ValueError: naming both numbers, or the reference; also as ``check_task``.
    """
    check_task(task, protocol)
    require(
        rows <= len(questions),
        f"{len(questions)} held-out questions",
        f"at least evaluation.rows={rows}",
        "hold out more rows (data.eval_rows, data.task.eval_rows) or lower evaluation.rows",
    )
    for reference in questions.references[:rows]:
        expected_answer(reference, task, protocol)
