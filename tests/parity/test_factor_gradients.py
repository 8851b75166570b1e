"""Gradients of a and b through a whole decoder of each family, against torch's autograd.

PyTorch gets the same weights and the same factors: each adapted linear layer is replaced by one
that forms ``W' = W * (1 + s * mask * A B^T)`` in plain sight, and autograd does the rest.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoa_jax import SmoaConfig, apply_smoa, combine, partition
from smoa_jax.checkpoint.base import load_base
from smoa_jax.models.decoder import Decoder
from tests.parity import test_checkpoint_gemma as gemma
from tests.parity import test_checkpoint_gemma4 as gemma4
from tests.parity import test_checkpoint_llama as llama
from tests.parity import test_checkpoint_neighbours as neighbours

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

# All linear layers in the model's layers, and none beside them.
CONFIG = SmoaConfig(rank=4, num_subspaces=2, target_modules=r"layers\..*", alpha=3.0)
TOKENS = gemma.TOKENS


def made(family: str):
    if family == "llama":
        return llama.torch_model()
    if family.startswith("gemma4"):
        return gemma4.torch_model(family.removeprefix("gemma4-"))
    if family in neighbours.NEIGHBOURS:
        bias = {"attention_bias": True, "mlp_bias": True} if family == "smollm3" else {}
        return neighbours.torch_model(family, **bias)
    return gemma.torch_model(family)


def adapted_modules(stack, path=()):
    """The paths of the adapted modules of a stack, and their modulations."""
    for key, value in stack.items():
        if isinstance(value, dict) and "smoa" in value:
            yield (*path, key), value["smoa"]
        elif isinstance(value, dict):
            yield from adapted_modules(value, (*path, key))


def with_random_b(params):
    """A trained adapter, so that both gradients are there."""
    trainable, frozen = partition(params)
    leaves, structure = jax.tree.flatten(trainable)
    rng = np.random.default_rng(3)
    moved = [leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return combine(jax.tree.unflatten(structure, moved), frozen)


class Adapted(torch.nn.Module):
    """A linear layer with the factors of one layer of our tree."""

    def __init__(self, linear, node, layer: int):
        super().__init__()
        self.weight = linear.weight.detach()
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.a = torch.nn.Parameter(torch.tensor(np.asarray(node.a[layer])))
        self.b = torch.nn.Parameter(torch.tensor(np.asarray(node.b[layer])))
        inputs, outputs = (np.asarray(x[layer]) for x in (node.in_block, node.out_block))
        self.same = torch.tensor(outputs[:, None] == inputs[None, :])
        self.scale = float(node.scale[layer])

    def forward(self, x):
        change = self.scale * self.same * (self.b @ self.a.T)
        return torch.nn.functional.linear(x, self.weight * (1 + change), self.bias)


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma", "gemma2", "gemma3", "gemma4-e2b", "gemma4-31b", *neighbours.NEIGHBOURS],
)
def test_gradients_of_a_and_b_agree_with_torch(tmp_path, family):
    model = made(family)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    params = with_random_b(apply_smoa(base.params, CONFIG, jax.random.key(0)))
    decoder = Decoder(base.config, dtype=jnp.float32, remat="projections")

    @jax.jit
    def loss(trainable, frozen):
        logits = decoder.apply({"params": combine(trainable, frozen)}, TOKENS[:, :-1])
        chosen = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(chosen, TOKENS[:, 1:, None], axis=-1).mean()

    value, gradient = jax.value_and_grad(loss)(*partition(params))

    model.requires_grad_(False)
    adapted = {}
    for layer, (stack, index) in enumerate(gemma4.places(params, base.config)):
        for path, node in adapted_modules(stack):
            owner = model.model.layers[layer].get_submodule(".".join(path[:-1]))
            new = Adapted(getattr(owner, path[-1]), node, index)
            setattr(owner, path[-1], new)
            adapted[path, layer] = new
    logits = model(torch.tensor(TOKENS[:, :-1])).logits
    theirs = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), torch.tensor(TOKENS[:, 1:]).reshape(-1)
    )
    theirs.backward()

    assert float(value) == pytest.approx(float(theirs.detach()), abs=1e-4)
    linear = sum(isinstance(module, torch.nn.Linear) for module in made(family).model.modules())
    assert len(adapted) == linear - hasattr(model.model, "per_layer_model_projection")
    gradients = gemma4.places(gradient, base.config)
    for (path, layer), module in adapted.items():
        stack, index = gradients[layer]
        node = dict(adapted_modules(stack))[path]
        for ours, parameter in ((node.a, module.a), (node.b, module.b)):
            wanted = parameter.grad.numpy()
            largest = np.abs(wanted).max()
            assert largest > 1e-5
            np.testing.assert_allclose(ours[index], wanted, atol=2e-4 * largest)
