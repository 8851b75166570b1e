"""What a training step holds and moves on a pod slice, as the TPU compiler counts it.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/step_on_a_pod.py [--topology v5e:4x4]

No TPU is needed, only its compiler: ``pip install 'jax[tpu]'``. The step is the one that a run
compiles, forward, backward and optimizer, of Llama-3-8B's shapes over fsdp in bf16 with splash
attention. Bytes are per chip; collectives are counted as the program names them, the body of the
scan over layers once. ``--without-products`` leaves the adapted products to the compiler.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.placement import ProductShardings
from smoa_jax.adapter.tree import apply_smoa, partition
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.decoder import Decoder, abstract_params
from smoa_jax.models.fused_attention import AttentionSharding, SplashAttention
from smoa_jax.sharding.mesh import BATCH_AXES, MeshConfig, batch_sharding, make_mesh
from smoa_jax.sharding.rules import (
    activation_constraint,
    head_sharding,
    param_shardings,
    product_shardings,
)
from smoa_jax.training.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from smoa_jax.training.optimizer import make_optimizer
from smoa_jax.training.state import state_shardings
from smoa_jax.training.step import initial_state, make_train_step

LLAMA_3_8B = DecoderConfig(
    vocab_size=128256,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14336,
    rope_base=500000.0,
    norm_epsilon=1e-5,
    tie_embeddings=False,
    max_positions=8192,
)
ADAPTERS = {
    "lora": SmoaConfig.lora(32),
    "blocks": SmoaConfig(rank=32, num_subspaces=2),
    "bands": SmoaConfig(rank=32, num_subspaces=2, partition="spectral_bands"),
}
_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "s8": 1}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


def compile_step(mesh: Mesh, adapter: SmoaConfig, rows: int, length: int, products: bool) -> Any:
    """The compiled step of a run on chips that are not there."""
    base = abstract_params(LLAMA_3_8B, jnp.bfloat16)
    params = apply_smoa(base, adapter, jax.random.key(0))
    placed = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        params,
        param_shardings(params, mesh),
    )
    model = Decoder(
        LLAMA_3_8B,
        dtype=jnp.bfloat16,
        remat="projections",
        constrain=activation_constraint(mesh),
        fused=SplashAttention(
            sharding=AttentionSharding(mesh=mesh, batch=BATCH_AXES, heads=("tensor",))
        ),
        products=product_shardings(base, mesh) if products else ProductShardings(),
        head=head_sharding(base, mesh),
    )
    config = RunConfig(
        model=ModelConfig(path="none"),
        train=TrainConfig(output_dir="none"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )
    trainable, frozen = partition(placed)
    optimizer = make_optimizer(config, 100)
    shardings = state_shardings(trainable, optimizer, mesh)
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(lambda tree: initial_state(tree, optimizer), trainable),
        shardings,
    )
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh))
        for name, dtype in {**dtypes, "loss_mask": jnp.float32}.items()
    }
    step = make_train_step(model, optimizer, seed=0, accumulate=1, chunk=512, dropout=False)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted.lower(state, frozen, batch).compile()


def collective_arrays(program: str) -> Iterator[tuple[str, str, int]]:
    """Kind, dtype and number of values of every array that a collective gives on a device.

    As the program's text has them, a loop's body once. A collective that the compiler fuses with
    products is written several times, each with the channel of all.
    """
    channels: set[str] = set()
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(", line)
        channel = re.search(r"channel_id=(\d+)", line)
        if not match or (channel and channel[1] in channels):
            continue
        channels.update(channel.groups() if channel else ())
        arrays = [
            array for array in re.findall(r"(\w+)\[([\d,]*)\]", match[1]) if array != ("u32", "")
        ]
        if match[3]:  # its operands come first, its results after them
            arrays = arrays[len(arrays) // 2 :]
        for dtype, dims in arrays:
            yield match[2], dtype, math.prod(map(int, dims.split(","))) if dims else 1


def collectives(program: str) -> dict[str, float]:
    """MiB that come out of each kind of collective on a chip."""
    found: dict[str, float] = collections.defaultdict(float)
    for kind, dtype, values in collective_arrays(program):
        found[kind] += values * _BYTES.get(dtype, 0) / 2**20
    return dict(found)


def main() -> None:
    """Print a row for each adapter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    parser.add_argument("--without-products", action="store_true")
    parser.add_argument("--save", help="directory for the programs' text")
    arguments = parser.parse_args()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    described = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology)
    mesh = make_mesh(MeshConfig(fsdp=-1), list(described.devices))
    print(
        f"{arguments.topology}, {arguments.rows} x {arguments.length} tokens, jax {jax.__version__}"
    )
    for name in arguments.adapters:
        begun = time.monotonic()
        compiled = compile_step(
            mesh,
            ADAPTERS[name],
            arguments.rows,
            arguments.length,
            products=not arguments.without_products,
        )
        memory, text = compiled.memory_analysis(), compiled.as_text()
        moved = ", ".join(f"{kind} {size:.0f} MiB" for kind, size in collectives(text).items())
        print(
            f"{name}: arguments {memory.argument_size_in_bytes / 2**30:.2f} GiB, temporaries "
            f"{memory.temp_size_in_bytes / 2**30:.2f} GiB, compiled in "
            f"{time.monotonic() - begun:.0f} s; {moved}",
            flush=True,
        )
        if arguments.save:
            Path(arguments.save).mkdir(parents=True, exist_ok=True)
            (Path(arguments.save) / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    main()
