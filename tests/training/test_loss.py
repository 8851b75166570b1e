"""The chunked loss against a dense one in float64, whose gradients are written out."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax.training.loss import summed_cross_entropy

ROWS, LENGTH, WIDTH, VOCABULARY, RANK = 3, 13, 5, 11, 2


def head(trainable, frozen, hidden, key=None):
    """A head with an additive adapter, so that its factors have gradients to lose."""
    kernel = frozen["kernel"] + trainable["a"] @ trainable["b"].T
    return jnp.matmul(hidden, kernel, precision="highest").astype(jnp.float32)


def problem(dtype=jnp.float32):
    """Uneven weights: rows with one, many and no targets, whole and fractional."""
    rng = np.random.default_rng(1)
    weights = np.zeros((ROWS, LENGTH), np.float32)
    weights[0, 12] = 1.0  # the last position of the last chunk alone
    weights[1, 2:11] = rng.uniform(0.2, 3.0, 9)
    return {
        "trainable": {
            "a": jnp.asarray(rng.normal(size=(WIDTH, RANK)), jnp.float32),
            "b": jnp.asarray(rng.normal(size=(VOCABULARY, RANK)), jnp.float32),
        },
        "frozen": {"kernel": jnp.asarray(rng.normal(size=(WIDTH, VOCABULARY)), jnp.float32)},
        "hidden": jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), dtype),
        "targets": jnp.asarray(rng.integers(0, VOCABULARY, (ROWS, LENGTH)), jnp.int32),
        "weights": jnp.asarray(weights),
    }


def dense(trainable, frozen, hidden, targets, weights):
    """Loss and its gradients in float64: softmax minus one-hot, times the weight."""
    a, b = (np.asarray(trainable[name], np.float64) for name in "ab")
    kernel = np.asarray(frozen["kernel"], np.float64) + a @ b.T
    x, w = np.asarray(hidden, np.float64), np.asarray(weights, np.float64)
    logits = x @ kernel
    shifted = logits - logits.max(-1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    one_hot = np.eye(VOCABULARY)[np.asarray(targets)]
    loss = -(w * np.log((p * one_hot).sum(-1))).sum()
    dlogits = w[..., None] * (p - one_hot)
    dkernel = np.einsum("btd,btv->dv", x, dlogits)
    return loss, {"a": dkernel @ b, "b": dkernel.T @ a}, dlogits @ kernel.T


def loss_at(given, head, trainable, hidden, chunk, key=None):
    """The loss as a function of what it is differentiated by."""
    changed = {**given, "trainable": trainable, "hidden": hidden}
    return summed_cross_entropy(head, *changed.values(), chunk, key)


@pytest.mark.parametrize("chunk", [1, 4, 7, 13, 64])
def test_value_and_gradients_are_those_of_the_dense_loss(chunk):
    given = problem()

    def loss(trainable, hidden):
        return 0.7 * loss_at(given, head, trainable, hidden, chunk)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(given["trainable"], given["hidden"])
    expected, of_factors, of_hidden = dense(**given)
    np.testing.assert_allclose(value, 0.7 * expected, rtol=1e-5)
    of_factors = {name: np.float32(0.7 * part) for name, part in of_factors.items()}
    chex.assert_trees_all_close(gradients[0], of_factors, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[1], 0.7 * of_hidden, rtol=2e-4, atol=1e-5)
    plain = summed_cross_entropy(head, *given.values(), chunk)
    np.testing.assert_allclose(plain, expected, rtol=1e-5)


def test_a_position_without_weight_has_neither_loss_nor_gradient():
    given = problem()
    masked = np.asarray(given["weights"]) == 0
    other = {**given, "targets": jnp.where(masked, 3, given["targets"])}
    values = [float(summed_cross_entropy(head, *g.values(), 4)) for g in (given, other)]
    assert values[0] == values[1]
    gradient = jax.grad(
        lambda hidden: summed_cross_entropy(head, *{**given, "hidden": hidden}.values(), 4)
    )(given["hidden"])
    assert not np.asarray(gradient)[masked].any()
    assert np.asarray(gradient)[~masked].all(axis=-1).all()


def test_bf16_hidden_states_keep_a_float32_loss_and_get_bf16_gradients():
    given = problem(jnp.bfloat16)
    value, gradient = jax.value_and_grad(
        lambda hidden: summed_cross_entropy(head, *{**given, "hidden": hidden}.values(), 7)
    )(given["hidden"])
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    expected, _, of_hidden = dense(**given)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(np.float32(gradient), of_hidden, rtol=2e-2, atol=1e-2)


def test_logits_exist_for_one_chunk_of_positions_at_a_time():
    given, seen = problem(), set()

    def watched(trainable, frozen, hidden, key):
        assert key is None
        seen.add(hidden.shape)
        return head(trainable, frozen, hidden)

    jax.value_and_grad(
        lambda hidden: summed_cross_entropy(watched, *{**given, "hidden": hidden}.values(), 4)
    )(given["hidden"])
    assert seen == {(ROWS, 4, WIDTH)}


def test_a_head_drops_out_with_a_key_of_its_own_for_every_chunk_in_both_directions():
    given, key, chunk = problem(), jax.random.key(5), 4

    def dropping(trainable, frozen, hidden, key):
        keep = jax.random.bernoulli(key, 0.5, hidden.shape)
        return head(trainable, frozen, jnp.where(keep, hidden, 0))

    def loss(trainable, hidden):
        return loss_at(given, dropping, trainable, hidden, chunk, key)

    starts = range(0, LENGTH, chunk)
    keep = [
        jax.random.bernoulli(jax.random.fold_in(key, number), 0.5, (ROWS, chunk, WIDTH))
        for number, _ in enumerate(starts)
    ]
    keep = np.concatenate(keep, axis=1)[:, :LENGTH]
    assert 0.4 < keep.mean() < 0.6
    dropped = {**given, "hidden": jnp.where(keep, given["hidden"], 0)}
    expected, of_factors, of_hidden = dense(**dropped)
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(given["trainable"], given["hidden"])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(loss(given["trainable"], given["hidden"]), expected, rtol=1e-5)
    of_factors = {name: np.float32(part) for name, part in of_factors.items()}
    chex.assert_trees_all_close(gradients[0], of_factors, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[1], np.where(keep, of_hidden, 0), rtol=2e-4, atol=1e-5)
