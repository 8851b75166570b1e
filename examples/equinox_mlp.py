"""An Equinox model, adapted in a plain optax loop that differentiates the adapter alone.

Two things are Equinox's own. Weights are ``(out, in)``, which ``kernel_views`` says once, so that
nothing is transposed by hand. And ``eqx.nn.Linear`` takes one row, to be mapped over a batch, where
``modulated_matmul`` wants the batch itself: the backward of a mapped one would form a gradient as
large as the weight for every row. So the linear layer here is the model's own.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import smoa_jax


class Linear(eqx.Module):
    """The arrays of an ``eqx.nn.Linear``, for batches, and room for a modulation."""

    weight: jax.Array  # (out, in)
    bias: jax.Array
    smoa: Any = None

    def __call__(self, x):
        if self.smoa is None:
            return x @ self.weight.T + self.bias[None, :]
        return smoa_jax.modulated_matmul(x, self.weight, self.smoa) + self.bias[None, :]


class Classifier(eqx.Module):
    """A module is a dataclass: it is made of its layers, and a layer of its arrays."""

    hidden_1: Linear
    hidden_2: Linear
    head: Linear

    def __call__(self, x):
        return self.head(jax.nn.relu(self.hidden_2(jax.nn.relu(self.hidden_1(x)))))


def model_with(params):
    """The model of a nested dict of arrays, whether or not modulations lie in it."""
    return Classifier(**{name: Linear(**leaves) for name, leaves in params.items()})


def train(loss_function, params, frozen, steps):
    """A plain optax loop over ``params``; what is frozen is an argument, not a constant, of it."""
    optimizer = optax.adamw(2e-2)

    @jax.jit
    def step(params, state, frozen):
        gradients = jax.grad(loss_function)(params, frozen)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state, frozen)
    return params


def main(steps: int = 200) -> dict[str, float]:
    """Train on one rule, freeze, adapt to another; returns what came of it."""
    data_key, model_key, adapter_key = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(data_key, (256, 16))
    old_labels = jnp.argmax(inputs[:, 0:3] + inputs[:, 3:6], axis=-1)
    new_labels = jnp.argmax(inputs[:, 0:3] - inputs[:, 3:6], axis=-1)
    sizes = {"hidden_1": (16, 64), "hidden_2": (64, 64), "head": (64, 3)}
    layers = {
        name: eqx.nn.Linear(*size, key=key)
        for (name, size), key in zip(sizes.items(), jax.random.split(model_key, 3), strict=True)
    }
    fresh = {name: {"weight": layer.weight, "bias": layer.bias} for name, layer in layers.items()}

    def loss_of(params, labels):
        logits = model_with(params)(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    base = train(loss_of, fresh, old_labels, steps)

    config = smoa_jax.SmoaConfig(
        rank=16,
        target_modules=["hidden_1", "hidden_2"],
        kernel_views={r".*\.weight": "O I -> | I | O"},
    )
    spectra = smoa_jax.plan_spectra(base, config)
    start = smoa_jax.apply_smoa(base, config, adapter_key, spectra)
    # Differentiating the trainable part alone, no gradient and no moment of the frozen one exists.
    trainable, frozen = smoa_jax.partition(start)
    trained = train(
        lambda trainable, frozen: loss_of(smoa_jax.combine(trainable, frozen), new_labels),
        trainable,
        frozen,
        steps,
    )
    params = smoa_jax.combine(trained, frozen)

    merged = smoa_jax.merge_smoa(params)  # plain arrays, for a program that knows no adapters
    change = model_with(merged)(inputs) - model_with(params)(inputs)
    outcome = {
        "loss_before": float(loss_of(start, new_labels)),
        "loss_after": float(loss_of(params, new_labels)),
        "base_moved": float(optax.tree.norm(optax.tree.sub(smoa_jax.strip_smoa(params), base))),
        "merge_error": float(jnp.abs(change).max()),
    }
    print(*(f"{name} {value:.3g}" for name, value in outcome.items()), sep="\n")
    return outcome


if __name__ == "__main__":
    main()
