"""The schedule and the optimizer, by values worked out apart from optax."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoa_jax.training.optimizer import make_optimizer, make_schedule, warmup_steps
from tests.training.tiny_run import run_config


def config(tmp_path, **changes):
    return run_config(tmp_path, tmp_path, **{f"optimizer_{k}": v for k, v in changes.items()})


def rates(tmp_path, steps, **changes):
    schedule = make_schedule(config(tmp_path, **changes), steps)
    return [float(schedule(step)) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("constant", [8.0] * 6),
        ("linear", [8.0, 7.0, 6.0, 5.0, 4.0, 3.0]),
        ("cosine", [2 + 6 * (1 + np.cos(np.pi * n / 6)) / 2 for n in range(6)]),
    ],
)
def test_a_rate_rises_to_its_peak_and_falls_to_its_share_of_it(tmp_path, schedule, after):
    got = rates(
        tmp_path,
        10,
        learning_rate=8.0,
        warmup_steps=4,
        max_warmup_share=1.0,
        schedule=schedule,
        final_fraction=0.25,
    )
    # From a peak of 8 to 2 in six steps: the rate *after* the last step would be the final one.
    np.testing.assert_allclose(got, [2.0, 4.0, 6.0, 8.0, *after], rtol=1e-6)


def test_without_warm_up_the_first_step_is_at_the_peak(tmp_path):
    got = rates(tmp_path, 4, learning_rate=8.0, warmup_steps=0, schedule="linear")
    np.testing.assert_allclose(got, [8.0, 6.0, 4.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("asked", "steps", "share", "expected"),
    [
        (100, 75, 0.1, 8),  # the defaults on a short run: it would have ended at its peak
        (100, 1000, 0.1, 100),
        (100, 5000, 0.1, 100),
        (8, 80, 0.1, 8),
        (2, 4, 0.1, 1),
        (100, 3, 1.0, 2),
        (5, 1, 0.1, 0),
        (0, 50, 0.1, 0),
        (100, 75, 1.0, 74),
    ],
)
def test_a_warm_up_takes_at_most_its_share_of_the_run(tmp_path, asked, steps, share, expected):
    settings = config(tmp_path, warmup_steps=asked, max_warmup_share=share)
    assert warmup_steps(settings, steps) == expected


def test_the_last_step_of_a_short_run_of_the_defaults_is_near_the_end_of_the_decay(tmp_path):
    got = rates(tmp_path, 75, learning_rate=1.0, warmup_steps=100)
    assert np.argmax(got) == 7
    assert got[-1] < 0.02


def adamw(gradients, start, learning_rates, *, decay, clip, b1=0.8, b2=0.95, epsilon=1e-3):
    """AdamW with decoupled decay and clipping by the global norm, in float64 [2, 3 values]."""
    values = [np.array(value, np.float64) for value in start]
    first, second = ([np.zeros_like(value) for value in values] for _ in range(2))
    for count, (gradient, rate) in enumerate(zip(gradients, learning_rates, strict=True), start=1):
        norm = np.sqrt(sum((part**2).sum() for part in gradient))
        scale = min(1.0, clip / norm) if clip else 1.0
        for i, part in enumerate(gradient):
            first[i] = b1 * first[i] + (1 - b1) * part * scale
            second[i] = b2 * second[i] + (1 - b2) * (part * scale) ** 2
            step = first[i] / (1 - b1**count)
            step /= np.sqrt(second[i] / (1 - b2**count)) + epsilon
            values[i] = values[i] - rate * (step + decay * values[i])
    return values


@pytest.mark.parametrize(("decay", "clip"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.5), (0.3, 0.5)])
def test_updates_are_those_of_adamw_with_decay_and_clipping(tmp_path, decay, clip):
    rng = np.random.default_rng(5)
    start = [rng.normal(size=(2,)), rng.normal(size=(3,))]
    # Some above the clipping norm, some below it.
    gradients = [
        [size * rng.normal(size=part.shape) for part in start] for size in (3, 0.05, 1, 0.1, 2)
    ]
    settings = config(
        tmp_path,
        learning_rate=0.1,
        warmup_steps=2,
        max_warmup_share=1.0,
        weight_decay=decay,
        clip_norm=clip,
        beta1=0.8,
        beta2=0.95,
        epsilon=1e-3,
    )
    optimizer = make_optimizer(settings, 5)
    params = [jnp.asarray(part, jnp.float32) for part in start]
    state = optimizer.init(params)
    for gradient in gradients:
        found = [jnp.asarray(part, jnp.float32) for part in gradient]
        updates, state = optimizer.update(found, state, params)
        params = optax.apply_updates(params, updates)
    learning_rates = [0.05, 0.1, 0.1, 0.1 * 2 / 3, 0.1 / 3]
    expected = adamw(gradients, start, learning_rates, decay=decay, clip=clip)
    chex.assert_trees_all_close(
        params, [np.float32(part) for part in expected], rtol=2e-5, atol=1e-6
    )
