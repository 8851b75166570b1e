"""What held-out rows say of params, adapted or not: their loss, and answers by free generation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from smoa_jax.adapter.tree import partition
from smoa_jax.adapter.types import Params
from smoa_jax.data.build import Data
from smoa_jax.data.pipeline import ExamplesIndex, eval_batches, num_eval_batches
from smoa_jax.evaluation.scoring import Answers, answer_questions
from smoa_jax.sharding.mesh import put_batch, rows_for_mesh
from smoa_jax.sharding.processes import batch_share, progressed
from smoa_jax.training.config import RunConfig
from smoa_jax.training.model import LoadedModel
from smoa_jax.training.step import Batch, make_eval_step

#: A batch on devices -> (summed loss, target tokens).
EvalStep = Callable[[Batch], tuple[jax.Array, jax.Array]]
#: Told how much is done, and of how much.
Progress = Callable[[int, int], None]


def eval_batch_size(config: RunConfig) -> int:
    """Rows of an evaluation batch: as given, or those of one part of a training batch."""
    train = config.train
    return train.eval_batch_size or train.batch_size // train.accumulate


def mean_loss(
    config: RunConfig,
    mesh: Mesh,
    rows: ExamplesIndex,
    eval_step: EvalStep,
    progress: Progress | None = None,
) -> float:
    """Loss per target token of all rows, each counted once; NaN if they have no target."""
    index, count = batch_share(mesh)
    size = eval_batch_size(config)
    sums = []
    for batch in eval_batches(rows, size, process_index=index, process_count=count):
        sums.append(eval_step(put_batch(batch, mesh)))
        progressed()
        if progress is not None:
            jax.block_until_ready(sums[-2:-1])  # not the one under way, so no device has to wait
            progress(len(sums) - 1, num_eval_batches(rows, size))
    if progress is not None:
        jax.block_until_ready(sums)
        progress(len(sums), len(sums))
    total, tokens = (float(sum(part)) for part in zip(*jax.device_get(sums), strict=True))
    return total / tokens if tokens else math.nan


def held_out_loss(
    config: RunConfig,
    loaded: LoadedModel,
    rows: ExamplesIndex,
    params: Params,
    progress: Progress | None = None,
) -> float:
    """``mean_loss`` of any params, adapted or not."""
    step = jax.jit(make_eval_step(loaded.model, chunk=config.train.loss_chunk))
    trainable, frozen = partition(params)
    return mean_loss(
        config, loaded.mesh, rows, lambda batch: step(trainable, frozen, batch), progress
    )


def held_out_answers(
    config: RunConfig,
    loaded: LoadedModel,
    data: Data,
    params: Params,
    tokenizer: Any,
    progress: Progress | None = None,
) -> Answers:
    """Answers to the first ``evaluation.rows`` held-out questions, as ``evaluation`` says."""
    settings = config.evaluation
    return answer_questions(
        loaded.model,
        params,
        data.questions,
        tokenizer,
        rows=settings.rows,
        max_new_tokens=settings.max_new_tokens,
        batch_size=rows_for_mesh(settings.batch_size, loaded.mesh),
        protocol=settings.answer,
        task=settings.task,
        progress=progress,
    )
