"""What attention holds between its operands and its gradients, as the TPU compiler counts it.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/attention_memory.py [--length 4096]

No TPU is needed, only its compiler: ``pip install 'jax[tpu]'``. Per chip, forward and backward of
one layer's attention over packed rows in bf16, heads over ``tensor`` and rows over ``fsdp``. What
is counted are temporaries in the chip's main memory; what fits beside the core costs none.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smoa_jax.models.attention import attend, segment_mask
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.fused_attention import AttentionSharding, SplashAttention
from smoa_jax.sharding.mesh import BATCH_AXES, MeshConfig, make_mesh

_LLAMA = DecoderConfig(
    vocab_size=128256,
    embed_dim=2048,
    num_layers=2,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    mlp_dim=8192,
    rope_base=500000.0,
    norm_epsilon=1e-5,
    tie_embeddings=True,
    max_positions=131072,
)
_GEMMA_HEADS = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "query_scale": 256**-0.5}
#: What attention is in each; the other sizes play no part.
MODELS = {
    "llama-3.2-1b": _LLAMA,
    "llama-3-8b": dataclasses.replace(_LLAMA, head_dim=128),
    "gemma-2-2b": dataclasses.replace(
        _LLAMA,
        **_GEMMA_HEADS,
        sliding_window=4096,
        local_layers=(True, False),
        attention_soft_cap=50.0,
    ),
    "gemma-3-4b": dataclasses.replace(
        _LLAMA, **_GEMMA_HEADS, sliding_window=1024, local_layers=(True, False)
    ),
}


def tpu_mesh(topology: str = "v5e:2x2") -> Mesh:
    """Two rows of two chips that are not there."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return make_mesh(MeshConfig(fsdp=-1, tensor=2), list(chips))


def compile_attention(config: DecoderConfig, mesh: Mesh, *, rows: int, length: int, fused: bool):
    """The compiled gradient of the summed attention, with respect to query, key and value."""
    place = AttentionSharding(mesh=mesh, batch=BATCH_AXES, heads=("tensor",))
    splash = SplashAttention(sharding=place)

    def abstract(shape, dtype, *axes):
        where = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def plain(query, key, value, segment_ids, local):
        mask = segment_mask(segment_ids)
        if local is not None:
            mask = jax.lax.select(local, segment_mask(segment_ids, config.sliding_window), mask)
        scale, cap = config.attention_scale, config.attention_soft_cap
        return attend(query, key, value, mask, scale=scale, cap=cap)

    def total(query, key, value, segment_ids, local):
        if fused:
            named = {"segment_ids": segment_ids, "local": local, "config": config}
            return splash(query, key, value, **named).astype(jnp.float32).sum()
        return plain(query, key, value, segment_ids, local).astype(jnp.float32).sum()

    operands = [
        abstract(
            (rows, length, heads, config.head_dim), jnp.bfloat16, BATCH_AXES, None, "tensor", None
        )
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    ]
    segment_ids = abstract((rows, length), jnp.int32, BATCH_AXES, None)
    local = abstract((), jnp.bool_) if config.local_layers else None
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    return gradient.lower(*operands, segment_ids, local).compile()


def held_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of temporaries per chip."""
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--topology", default="v5e:2x2")
    options = parser.parse_args()
    mesh = tpu_mesh(options.topology)
    print(f"{options.rows} rows of {options.length} tokens on {options.topology}, MiB per chip")
    print(f"{'model':14} {'plain':>8} {'splash':>8}")
    for name, config in MODELS.items():
        found = []
        for fused in (False, True):
            compiled = compile_attention(
                config, mesh, rows=options.rows, length=options.length, fused=fused
            )
            found.append(held_bytes(compiled) / 2**20)
        print(f"{name:14} {found[0]:8.0f} {found[1]:8.0f}")


if __name__ == "__main__":
    main()
