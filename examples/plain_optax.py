"""Someone else's Flax model, adapted and trained in a plain optax loop."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import smoa_jax


class Classifier(nn.Module):
    """Any Flax model: SMoA looks at its params tree alone."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64, name="hidden_1")(x))
        x = nn.relu(nn.Dense(64, name="hidden_2")(x))
        return nn.Dense(3, name="head")(x)


def main(steps: int = 200) -> tuple[float, float]:
    """Adapt a "pretrained" model to shifted data; returns the loss before and after."""
    data_key, model_key, adapter_key = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(data_key, (256, 16))
    labels = jnp.argmax(inputs[:, :3] + inputs[:, 3:6], axis=-1)
    model = Classifier()
    base = dict(model.init(model_key, inputs)["params"])

    config = smoa_jax.SmoaConfig(rank=8, num_subspaces=2, target_modules=["hidden_1", "hidden_2"])
    params = smoa_jax.apply_smoa(base, config, adapter_key)
    mask = smoa_jax.trainable_mask(params)
    optimizer = optax.partition({True: optax.adamw(2e-2), False: optax.set_to_zero()}, mask)
    state = optimizer.init(params)

    def loss_function(params):
        logits: Any = model.apply({"params": smoa_jax.merge_smoa(params)}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(loss_function)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    before = float(loss_function(params))
    for _ in range(steps):
        params, state, _ = step(params, state)
    after = float(loss_function(params))
    print(f"loss {before:.3f} -> {after:.3f}, only a and b of two kernels trained")
    return before, after


if __name__ == "__main__":
    main()
