"""The table of names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from smoa_jax.adapter.targets import walk
from smoa_jax.checkpoint.huggingface.config import config_from_hf
from smoa_jax.checkpoint.names import (
    name_of_gguf,
    tensor_slots,
    unflatten_tree,
)
from smoa_jax.models.params import abstract_params
from tests.checkpoint.hf_files import CONFIG, gguf_name, llama_tensors

# Name on disk, shape on disk, place in the tree, index into the stack, whether transposed.
GOLDEN = """
model.embed_tokens.weight (64, 32) embed_tokens/embedding None False
model.layers.0.input_layernorm.weight (32,) layers/input_layernorm/scale 0 False
model.layers.0.self_attn.q_proj.weight (64, 32) layers/self_attn/q_proj/kernel 0 True
model.layers.0.self_attn.k_proj.weight (32, 32) layers/self_attn/k_proj/kernel 0 True
model.layers.0.self_attn.v_proj.weight (32, 32) layers/self_attn/v_proj/kernel 0 True
model.layers.0.self_attn.o_proj.weight (32, 64) layers/self_attn/o_proj/kernel 0 True
model.layers.0.post_attention_layernorm.weight (32,) layers/post_attention_layernorm/scale 0 False
model.layers.0.mlp.gate_proj.weight (96, 32) layers/mlp/gate_proj/kernel 0 True
model.layers.0.mlp.up_proj.weight (96, 32) layers/mlp/up_proj/kernel 0 True
model.layers.0.mlp.down_proj.weight (32, 96) layers/mlp/down_proj/kernel 0 True
model.norm.weight (32,) norm/scale None False
lm_head.weight (64, 32) lm_head/kernel None True
"""


def slots_of(**changes: object) -> dict:
    config = config_from_hf({**CONFIG, **changes})
    return tensor_slots(abstract_params(config, jnp.float32), config)


def test_every_tensor_of_a_llama_has_the_place_written_here():
    slots = slots_of(num_hidden_layers=1)
    lines = [
        f"{slot.name} {slot.shape} {'/'.join(slot.path)} {slot.layer} {slot.transpose}"
        for slot in slots.values()
    ]
    assert lines == GOLDEN.strip().splitlines()


@pytest.mark.parametrize("tied", [True, False])
def test_slots_are_exactly_the_tensors_of_a_checkpoint(tied):
    config = {**CONFIG, "tie_word_embeddings": tied}
    tensors = llama_tensors(config)
    slots = slots_of(tie_word_embeddings=tied)
    assert list(slots) == list(tensors)
    assert {name: slot.shape for name, slot in slots.items()} == {
        name: weight.shape for name, weight in tensors.items()
    }


def test_layer_ten_comes_after_layer_nine_and_keeps_its_number():
    slots = slots_of(num_hidden_layers=12)
    layers = [slot.layer for slot in slots.values() if slot.path[-2] == "up_proj"]
    assert layers == list(range(12))
    assert slots["model.layers.10.mlp.up_proj.weight"].layer == 10


def test_gguf_names_lead_to_the_same_tensors():
    for name in llama_tensors({**CONFIG, "num_hidden_layers": 11}):
        assert name_of_gguf(gguf_name(name), post_norms=False) == name
    assert name_of_gguf("blk.7.attn_q.bias", post_norms=False) == (
        "model.layers.7.self_attn.q_proj.bias"
    )
    assert name_of_gguf("blk.0.attn_q.scale", post_norms=False) is None


def test_a_tree_with_an_adapter_in_it_is_refused():
    tree = abstract_params(config_from_hf(CONFIG), jnp.float32)
    tree["layers"]["mlp"]["up_proj"]["smoa"] = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    with pytest.raises(ValueError, match=r"layers/mlp/up_proj/smoa.*merge the adapter first"):
        tensor_slots(tree, config_from_hf(CONFIG))


def test_stacks_of_different_depth_are_refused():
    tree = abstract_params(config_from_hf(CONFIG), jnp.float32)
    tree["layers"]["input_layernorm"]["scale"] = jax.ShapeDtypeStruct((5, 32), jnp.float32)
    with pytest.raises(ValueError, match=r"input_layernorm/scale of 5 layers; expected 3"):
        tensor_slots(tree, config_from_hf(CONFIG))


def test_unflatten_is_the_inverse_of_flatten():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert dict(walk(tree)) == {("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert unflatten_tree(dict(walk(tree))) == tree
