"""Somebody else's Flax Linen model, adapted in a plain optax loop without a change to its code.

``nn.intercept_methods`` sees every call of a layer, so the ones that were given a modulation go
through ``modulated_matmul``, which loses nothing on a bf16 base either.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import smoa_jax


class Classifier(nn.Module):
    """Any Linen model: SMoA looks at its params alone, a nested dict as it comes."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64, name="hidden_1")(x))
        x = nn.relu(nn.Dense(64, name="hidden_2")(x))
        return nn.Dense(3, name="head")(x)


def modulate(next_call, args, kwargs, context):
    """Multiply by the modulated weight where a modulation lies beside the kernel."""
    layer = context.module
    if not (isinstance(layer, nn.Dense) and layer.has_variable("params", "smoa")):
        return next_call(*args, **kwargs)
    kernel, bias, smoa = (layer.get_variable("params", name) for name in ("kernel", "bias", "smoa"))
    return smoa_jax.modulated_matmul(args[0], kernel, smoa) + bias[None, :]


def main(steps: int = 200) -> dict[str, float]:
    """Train on one rule, freeze, adapt to another; returns what came of it."""
    data_key, model_key, adapter_key = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(data_key, (256, 16))
    old_labels = jnp.argmax(inputs[:, 0:3] + inputs[:, 3:6], axis=-1)
    new_labels = jnp.argmax(inputs[:, 0:3] - inputs[:, 3:6], axis=-1)
    model = Classifier()

    def logits_of(params) -> Any:
        with nn.intercept_methods(modulate):
            return model.apply({"params": params}, inputs)

    def loss_function(params, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits_of(params), labels).mean()

    def train(params, labels, optimizer):
        @jax.jit
        def step(params, state):
            gradients = jax.grad(loss_function)(params, labels)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        for _ in range(steps):
            params, state = step(params, state)
        return params

    base = train(dict(model.init(model_key, inputs)["params"]), old_labels, optax.adamw(1e-2))

    config = smoa_jax.SmoaConfig(rank=16, target_modules=["hidden_1", "hidden_2"])
    spectra = smoa_jax.plan_spectra(base, config)
    start = smoa_jax.apply_smoa(base, config, adapter_key, spectra)
    # The whole tree is differentiated, and all but a and b stands still. optax.masked alone would
    # let the gradients of the frozen leaves through.
    mask = smoa_jax.trainable_mask(start)
    optimizer = optax.partition({True: optax.adamw(3e-2), False: optax.set_to_zero()}, mask)
    params = train(start, new_labels, optimizer)

    merged = smoa_jax.merge_smoa(params)  # plain params, for a program that knows no adapters
    outcome = {
        "loss_before": float(loss_function(start, new_labels)),
        "loss_after": float(loss_function(params, new_labels)),
        "base_moved": float(optax.tree.norm(optax.tree.sub(smoa_jax.strip_smoa(params), base))),
        "merge_error": float(jnp.abs(logits_of(merged) - logits_of(params)).max()),
    }
    print(*(f"{name} {value:.3g}" for name, value in outcome.items()), sep="\n")
    return outcome


if __name__ == "__main__":
    main()
