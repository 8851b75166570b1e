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
        weight = (self.weight.float() * (1 + change)).to(x.dtype)
        return torch.nn.functional.linear(x, weight, self.bias)


def our_gradients(base, params, dtype):
    """The loss, and the gradients by layer and path: a and b of each."""
    decoder = Decoder(base.config, dtype=dtype, remat="projections")

    @jax.jit
    def loss(trainable, frozen):
        logits = decoder.apply({"params": combine(trainable, frozen)}, TOKENS[:, :-1])
        chosen = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(chosen, TOKENS[:, 1:, None], axis=-1).mean()

    value, gradient = jax.value_and_grad(loss)(*partition(params))
    found = {
        (path, layer): (np.asarray(node.a[index]), np.asarray(node.b[index]))
        for layer, (stack, index) in enumerate(gemma4.places(gradient, base.config))
        for path, node in adapted_modules(stack)
    }
    return float(value), found


def their_gradients(model, base, params):
    """The same of the torch model, whose linear layers are replaced."""
    model.requires_grad_(False)
    adapted = {}
    for layer, (stack, index) in enumerate(gemma4.places(params, base.config)):
        for path, node in adapted_modules(stack):
            owner = model.model.layers[layer].get_submodule(".".join(path[:-1]))
            new = Adapted(getattr(owner, path[-1]), node, index)
            setattr(owner, path[-1], new)
            adapted[path, layer] = new
    logits = model(torch.tensor(TOKENS[:, :-1])).logits.float()
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), torch.tensor(TOKENS[:, 1:]).reshape(-1)
    )
    loss.backward()
    found = {key: (module.a.grad.numpy(), module.b.grad.numpy()) for key, module in adapted.items()}
    return float(loss.detach()), found


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma", "gemma2", "gemma3", "gemma4-e2b", "gemma4-31b", *neighbours.NEIGHBOURS],
)
def test_gradients_of_a_and_b_agree_with_torch(tmp_path, family):
    model = made(family)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    params = with_random_b(apply_smoa(base.params, CONFIG, jax.random.key(0)))
    value, ours = our_gradients(base, params, jnp.float32)
    loss, theirs = their_gradients(model, base, params)
    assert value == pytest.approx(loss, abs=1e-4)
    linear = sum(isinstance(module, torch.nn.Linear) for module in made(family).model.modules())
    assert len(theirs) == linear - hasattr(model.model, "per_layer_model_projection")
    assert ours.keys() == theirs.keys()
    for key, pair in theirs.items():
        for one, wanted in zip(ours[key], pair, strict=True):
            largest = np.abs(wanted).max()
            assert largest > 1e-5
            np.testing.assert_allclose(one, wanted, atol=2e-4 * largest)


def test_gradient_norms_of_a_gemma4_in_bf16_are_those_in_float32_and_torchs(tmp_path):
    """Elsewhere LoRA's gradients on the 31B were reported with norms of 1e3 to 1e6."""
    gemma4.torch_model("31b").save_pretrained(tmp_path)
    norms = []
    for dtype in (jnp.float32, jnp.bfloat16):
        base = load_base(tmp_path, dtype)
        params = with_random_b(apply_smoa(base.params, CONFIG, jax.random.key(0)))
        model = gemma4.torch_model("31b").to(getattr(torch, jnp.dtype(dtype).name))
        for found in (
            our_gradients(base, params, dtype)[1],
            their_gradients(model, base, params)[1],
        ):
            norms.append({key: [np.linalg.norm(one) for one in found[key]] for key in found})
    exact, *others = (np.asarray([found[key] for key in sorted(norms[0])]) for found in norms)
    assert exact.max() < 10
    for found in others:
        np.testing.assert_allclose(found, exact, rtol=0.25)
        assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(exact), rel=0.05)
