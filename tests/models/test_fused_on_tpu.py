"""The real TPU compiler takes splash attention, without a TPU: skipped where libtpu is missing."""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.attention_memory import MODELS, compile_attention, held_bytes, tpu_mesh
from smoa_jax.models.decoder import Decoder, abstract_params
from smoa_jax.models.fused_attention import AttentionSharding, SplashAttention
from smoa_jax.sharding.mesh import BATCH_AXES
from smoa_jax.sharding.rules import activation_constraint, param_shardings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: pip install 'jax[tpu]'",
    ),
]


@pytest.fixture(scope="module")
def mesh():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        return tpu_mesh("v5e:2x2")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_attention_of_4096_tokens_holds_a_fraction_of_what_the_plain_path_does(mesh, name):
    held = []
    for fused in (False, True):
        compiled = compile_attention(MODELS[name], mesh, rows=4, length=4096, fused=fused)
        assert ("tpu_custom_call" in compiled.as_text()) == fused
        held.append(held_bytes(compiled))
    plain, splash = held
    assert splash < plain / 10


def test_rows_that_fill_no_whole_block_compile(mesh):
    config = dataclasses.replace(MODELS["llama-3.2-1b"], head_dim=96)
    compiled = compile_attention(config, mesh, rows=2, length=1000, fused=True)
    assert compiled.as_text().count("tpu_custom_call") >= 3


@pytest.mark.parametrize("remat", ["none", "projections", "full"])
def test_a_sharded_decoder_compiles_forward_and_backward(mesh, remat):
    config = dataclasses.replace(
        MODELS["gemma-3-4b"], vocab_size=1024, embed_dim=512, mlp_dim=1024, sliding_window=256
    )
    place = AttentionSharding(mesh=mesh, batch=BATCH_AXES, heads=("tensor",))
    decoder = Decoder(
        config,
        remat=remat,
        constrain=activation_constraint(mesh),
        fused=SplashAttention(sharding=place),
    )
    shapes = abstract_params(config, jnp.bfloat16)
    params = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        param_shardings(shapes, mesh),
    )
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None))
    tokens = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=rows)

    def loss(params, tokens, segment_ids):
        return decoder.apply({"params": params}, tokens, segment_ids=segment_ids).sum()

    compiled = jax.jit(jax.grad(loss)).lower(params, tokens, tokens).compile()
    assert "tpu_custom_call" in compiled.as_text()
