"""AdamW with warm-up, decay and clipping, over the trained factors alone."""

from __future__ import annotations

import jax
import optax

from smoa_jax.training.config import RunConfig


def warmup_steps(config: RunConfig, steps: int) -> int:
    """Steps of warm-up in a run of ``steps``: as configured, at most a share of the run.

    A short run would otherwise end where its warm-up does, at the peak rate.
    """
    optimizer = config.optimizer
    longest = max(round(optimizer.max_warmup_share * steps), 1)
    return min(optimizer.warmup_steps, longest, max(steps - 1, 0))


def make_schedule(
    config: RunConfig, steps: int, peak: float | jax.Array | None = None
) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up from 0, then decay until ``steps``.

    ``peak`` stands in the place of the configuration's rate. Traced, as the argument of a step, it
    lets runs that differ in it alone share what was compiled.
    """
    optimizer, peak = config.optimizer, config.learning_rate if peak is None else peak
    warmup = warmup_steps(config, steps)
    rest = max(steps - warmup, 1)
    if optimizer.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif optimizer.schedule == "linear":
        after = optax.linear_schedule(peak, peak * optimizer.final_fraction, rest)
    else:
        after = optax.cosine_decay_schedule(peak, rest, alpha=optimizer.final_fraction)
    if not warmup:
        return after
    # Step 0 of a warm-up from 0 would change nothing: it starts at peak / warmup.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
    config: RunConfig, steps: int, peak: float | jax.Array | None = None
) -> optax.GradientTransformation:
    """The transform for the trainable part of the params; frozen leaves never reach it.

    ``peak`` as for ``make_schedule``; the optimizer's state doesn't depend on it.
    """
    settings = config.optimizer
    adamw = optax.adamw(
        make_schedule(config, steps, peak),
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    if settings.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)
