"""One training step against the same step written out over the whole batch at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.tree import apply_smoa, combine, partition
from smoa_jax.adapter.types import is_modulation
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.params import init_params
from smoa_jax.training.step import batch_loss, initial_state, make_eval_step, make_train_step
from tests.training.tiny_run import DECODER

ROWS, LENGTH = 8, 11
#: Trained tokens of each row: uneven, so that a mean of means is another number.
COUNTS = (1, 9, 0, 3, 7, 2, 10, 5)
MODEL = Decoder(config=DECODER, dtype=jnp.float32)


@pytest.fixture(scope="module")
def params():
    """An adapted tiny Llama, its head too, whose B is not zero: every factor has a gradient."""
    config = SmoaConfig(rank=4, num_subspaces=2, target_modules=["q_proj", "down_proj", "lm_head"])
    adapted = apply_smoa(init_params(DECODER, jax.random.key(0)), config, jax.random.key(1))
    trainable, frozen = partition(adapted)
    keys = iter(jax.random.split(jax.random.key(2), 64))
    moved = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), trainable
    )
    return moved, frozen


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    mask = np.zeros((ROWS, LENGTH), np.float32)
    for row, count in enumerate(COUNTS):
        mask[row, LENGTH - 1 - count : LENGTH - 1] = 1
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[4, 9:] = 0
    mask[4, 9:] = 0
    return {
        "tokens": rng.integers(0, DECODER.vocab_size, (ROWS, LENGTH)).astype(np.int32),
        "targets": rng.integers(0, DECODER.vocab_size, (ROWS, LENGTH)).astype(np.int32),
        "loss_mask": mask,
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "segment_ids": segments,
    }


def plain_loss(trainable, frozen, batch):
    """The mean over trained targets of the whole batch, without chunks or parts."""
    logits = MODEL.apply(
        {"params": combine(trainable, frozen)},
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(losses * batch["loss_mask"]) / batch["loss_mask"].sum()


def take(params, batch, optimizer, **settings):
    trainable, frozen = params
    step = make_train_step(MODEL, optimizer, **{"seed": 0, "chunk": 4, **settings})
    return jax.jit(step)(initial_state(trainable, optimizer), frozen, batch)


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 1e-3), (4, None), (4, 1e-3)])
def test_a_step_is_that_of_the_mean_over_the_whole_batch(params, batch, accumulate, clip):
    trainable, frozen = params
    optimizer = optax.sgd(0.5)
    if clip:
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
    state, metrics = take(params, batch, optimizer, accumulate=accumulate)
    loss, gradient = jax.jit(jax.value_and_grad(plain_loss))(trainable, frozen, batch)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    scale = 0.5 * (min(1.0, clip / norm) if clip else 1.0)
    assert norm > 10 * (clip or 0)
    expected = jax.tree.map(lambda value, g: value - scale * g, trainable, gradient)
    chex.assert_trees_all_close(state["trainable"], expected, rtol=1e-4, atol=2e-6)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), state["trainable"], trainable)
    assert all(size > 0 for size in jax.tree.leaves(moved))  # the adapted head's factors too
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)  # before clipping
    assert int(metrics["target_tokens"]) == batch["loss_mask"].sum()
    assert int(metrics["tokens"]) == ROWS * LENGTH - 2
    assert (int(state["step"]), int(state["skipped"])) == (1, 0)


def test_only_targets_under_the_mask_matter(params, batch):
    masked = batch["loss_mask"] == 0
    elsewhere = {**batch, "targets": np.where(masked, 7, batch["targets"])}
    row, place = np.argwhere(~masked)[3]
    within = {**batch, "targets": batch["targets"].copy()}
    within["targets"][row, place] += 1
    states = [take(params, b, optax.sgd(0.5))[0]["trainable"] for b in (batch, elsewhere, within)]
    chex.assert_trees_all_equal(states[0], states[1])
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(states[0], states[2])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(params, batch, accumulate):
    trainable, frozen = params
    broken = {**frozen, "norm": {"scale": frozen["norm"]["scale"] * np.nan}}
    optimizer = optax.adam(0.1)
    before = initial_state(trainable, optimizer)
    state, metrics = take((trainable, broken), batch, optimizer, accumulate=accumulate)
    chex.assert_trees_all_equal(state["trainable"], before["trainable"])
    chex.assert_trees_all_equal(state["opt_state"], before["opt_state"])
    assert (int(state["step"]), int(state["skipped"])) == (1, 1)
    assert not np.isfinite(metrics["loss"])


def test_a_batch_without_targets_is_no_division_by_zero(params, batch):
    empty = {**batch, "loss_mask": np.zeros_like(batch["loss_mask"])}
    state, metrics = take(params, empty, optax.sgd(0.5))
    assert (float(metrics["loss"]), int(state["skipped"])) == (0.0, 0)
    chex.assert_trees_all_equal(state["trainable"], params[0])


def with_dropout(params, dropping=("q_proj", "down_proj", "lm_head")):
    """The same adapter, under dropout where asked for."""

    def visit(path, node):
        if not is_modulation(node):
            return node
        return dataclasses.replace(node, dropout=0.5 * (path[-2].key in dropping))

    tree = combine(*params)
    return partition(jax.tree_util.tree_map_with_path(visit, tree, is_leaf=is_modulation))


def test_dropout_is_drawn_by_seed_and_step_and_part(params, batch):
    trainable, frozen = with_dropout(params)
    optimizer = optax.sgd(0.0)

    def loss(seed=0, step=0, accumulate=1):
        take_step = make_train_step(
            MODEL, optimizer, seed=seed, accumulate=accumulate, chunk=4, dropout=True
        )
        state = initial_state(trainable, optimizer) | {"step": jnp.int32(step)}
        rows = {name: np.concatenate([value[:2]] * 2) for name, value in batch.items()}
        return float(jax.jit(take_step)(state, frozen, rows)[1]["loss"])

    first = loss()
    assert len({first, loss(seed=1), loss(step=1), loss(accumulate=2)}) == 4
    assert loss() == first


def test_parts_of_a_batch_have_masks_of_their_own(params, batch):
    """Equal rows in both parts: with one mask for both, halves would have one loss."""
    trainable, frozen = with_dropout(params)
    optimizer = optax.sgd(0.0)
    state = initial_state(trainable, optimizer)
    rows = {name: np.repeat(value[1:2], 2, axis=0) for name, value in batch.items()}
    one = {name: value[:1] for name, value in rows.items()}
    step = make_train_step(MODEL, optimizer, seed=0, accumulate=2, chunk=4, dropout=True)
    together = float(jax.jit(step)(state, frozen, rows)[1]["loss"])
    key, count = jax.random.fold_in(jax.random.key(0), 0), one["loss_mask"].sum()
    parts = [
        float(batch_loss(MODEL, trainable, frozen, one, 4, jax.random.fold_in(key, index)) / count)
        for index in range(2)
    ]
    assert parts[0] != parts[1]
    np.testing.assert_allclose(together, np.mean(parts), rtol=1e-5)


class Toy:
    """A model of one factor: logits are ``hidden + bias``, the factor sits at token 1."""

    head = None  # on one device
    config = DECODER  # whose head is its own

    def apply(self, variables, *args, method, rngs=None):
        params = variables["params"]
        if method == "unembed":
            return args[0] + params["lm_head"]["bias"].reshape(1, 1, -1)
        tokens = args[0]
        factor = params["w"] if self.of_w is None else self.of_w(params["w"])
        return jax.nn.one_hot(tokens, 3) * factor

    def __init__(self, of_w=None):
        self.of_w = of_w


def toy_step(model, *, bias=(0.0, 0.0, 0.0), mask=((1.0, 0.5),), **state):
    """One step of it on one row; the state and metrics that come out."""
    optimizer: Any = optax.sgd(0.5)
    trainable = {"w": jnp.float32(0.0), "lm_head": {"bias": None}}
    frozen = {"w": None, "lm_head": {"bias": jnp.asarray(bias, jnp.float32)}}
    before = initial_state(trainable, optimizer)
    before |= {name: jnp.int32(value) for name, value in state.items()}
    rows = {
        "tokens": jnp.asarray([[1, 2]]),
        "positions": jnp.asarray([[0, 1]]),
        "segment_ids": jnp.asarray([[1, 1]]),
        "targets": jnp.asarray([[0, 2]]),
        "loss_mask": jnp.asarray(mask, jnp.float32),
    }
    step = jax.jit(make_train_step(model, optimizer, seed=0, chunk=1))
    return step(before, frozen, rows)


@pytest.mark.parametrize(
    ("model", "bias"),
    [
        (Toy(), (-np.inf, 0.0, 0.0)),  # the loss is infinite, its gradient is not
        (Toy(jnp.sqrt), (0.0, 0.0, 0.0)),  # the gradient is infinite, the loss is not
    ],
)
def test_a_loss_or_a_gradient_alone_that_is_not_finite_skips_the_step(model, bias):
    state, metrics = toy_step(model, bias=bias, skipped=3, step=7)
    finite = np.isfinite([float(metrics["loss"]), float(metrics["grad_norm"])])
    assert sorted(finite) == [False, True]
    assert float(state["trainable"]["w"]) == 0.0
    assert (int(state["skipped"]), int(metrics["skipped"]), int(state["step"])) == (4, 4, 8)


@pytest.mark.parametrize(
    ("mask", "tokens", "loss"),
    # At w = 0 every position costs log 3, whatever its weight.
    [([[1.0, 0.5]], 1.5, np.log(3)), ([[1.0, 0.0]], 1.0, np.log(3)), ([[0.5, 0]], 0.5, None)],
)
def test_the_mean_is_over_the_weights_of_the_targets(mask, tokens, loss):
    _, metrics = toy_step(Toy(), mask=mask)
    assert float(metrics["target_tokens"]) == tokens
    expected = 0.5 * np.log(3) if loss is None else loss  # less than one token counts as one
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


def test_an_adapted_head_drops_out(params, batch):
    trainable, frozen = with_dropout(params, ["lm_head"])
    losses = {
        float(batch_loss(MODEL, trainable, frozen, batch, 4, key))
        for key in (None, jax.random.key(0), jax.random.key(1))
    }
    assert len(losses) == 3


def test_a_step_is_traced_once_whatever_its_number(params, batch):
    trainable, frozen = params
    optimizer = optax.adam(1e-2)
    step = jax.jit(chex.assert_max_traces(make_train_step(MODEL, optimizer, seed=0), n=1))
    state = initial_state(trainable, optimizer)
    losses = []
    for _ in range(4):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert int(state["step"]) == 4


def test_the_evaluation_step_sums_what_the_training_step_averages(params, batch):
    trainable, frozen = params
    total, tokens = make_eval_step(MODEL, chunk=5)(trainable, frozen, batch)
    np.testing.assert_allclose(total / tokens, plain_loss(trainable, frozen, batch), rtol=1e-5)
    assert int(tokens) == batch["loss_mask"].sum()
