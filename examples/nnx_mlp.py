"""A Flax NNX model, adapted in a plain optax loop that differentiates the adapter alone.

``nnx.split`` parts a model into its graph and its params, which as a pure dict are all that SMoA
wants. Its linear layer makes room for a modulation, and then goes through ``modulated_matmul``.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import smoa_jax


class Linear(nnx.Linear):
    """An ``nnx.Linear`` that multiplies by the modulated weight once it has a modulation."""

    smoa = None

    def __call__(self, x):
        if self.smoa is None:
            return super().__call__(x)
        y = smoa_jax.modulated_matmul(x, self.kernel[...], self.smoa)
        return y if self.bias is None else y + self.bias[None]


class Classifier(nnx.Module):
    """Layers that have names: an ``nnx.List`` numbers them, and SMoA's paths are of strings."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden_1 = Linear(16, 64, rngs=rngs)
        self.hidden_2 = Linear(64, 64, rngs=rngs)
        self.head = Linear(64, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden_2(nnx.relu(self.hidden_1(x)))))


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
    data_key, adapter_key = jax.random.split(jax.random.key(0))
    inputs = jax.random.normal(data_key, (256, 16))
    old_labels = jnp.argmax(inputs[:, 0:3] + inputs[:, 3:6], axis=-1)
    new_labels = jnp.argmax(inputs[:, 0:3] - inputs[:, 3:6], axis=-1)
    graph, state = nnx.split(Classifier(nnx.Rngs(0)), nnx.Param)
    fresh = nnx.to_pure_dict(state)

    def model_with(params):
        """Params back into the graph, and each modulation into the layer it was beside."""
        model = nnx.merge(graph, smoa_jax.strip_smoa(params))
        for name, leaves in params.items():
            getattr(model, name).smoa = nnx.data(leaves.get("smoa"))
        return model

    def loss_of(params, labels):
        logits = model_with(params)(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    base = train(loss_of, fresh, old_labels, steps)

    config = smoa_jax.SmoaConfig(rank=16, target_modules=["hidden_1", "hidden_2"])
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
