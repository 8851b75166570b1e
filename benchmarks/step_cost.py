"""What a whole training step costs with each adapter, beside LoRA's, on the devices at hand.

    python benchmarks/step_cost.py --model llama-1b --rows 8 --length 1024

Weights are drawn at random: only shapes matter here. The step is the one that a run compiles:
forward, backward, clipping, AdamW, with the attention that ``auto`` takes. Times are medians over
steps, the spread half the distance of the quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.tree import apply_smoa, partition
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.decoder import Decoder, init_params
from smoa_jax.models.fused_attention import AttentionSharding, choose_attention
from smoa_jax.sharding.mesh import MeshConfig, make_mesh
from smoa_jax.training.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from smoa_jax.training.optimizer import make_optimizer
from smoa_jax.training.step import initial_state, make_train_step

_LLAMA: dict[str, Any] = {"norm_epsilon": 1e-5, "rope_base": 500000.0, "max_positions": 8192}
MODELS = {
    "smollm2-135m": DecoderConfig(
        vocab_size=49152,
        embed_dim=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_dim=1536,
        tie_embeddings=True,
        **_LLAMA,
    ),
    "llama-1b": DecoderConfig(
        vocab_size=128256,
        embed_dim=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        mlp_dim=8192,
        tie_embeddings=True,
        **_LLAMA,
    ),
    "llama-8b": DecoderConfig(
        vocab_size=128256,
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=14336,
        tie_embeddings=False,
        **_LLAMA,
    ),
}


def adapters(rank: int, dropout: float) -> dict[str, SmoaConfig]:
    """All that are compared, over the same kernels, LoRA first."""
    blocks = {
        f"SMoA blocks {'as slices' if sliced else 'in any order'}, M = {count}": SmoaConfig(
            rank=rank,
            num_subspaces=count,
            dropout=dropout,
            partition="contiguous_blocks" if sliced else "random_blocks",
        )
        for count, sliced in ((2, True), (4, True), (8, True), (4, False))
    }
    return {
        "LoRA": SmoaConfig.lora(rank, dropout=dropout),
        "HiRA": SmoaConfig.hira(rank, dropout=dropout),
        **blocks,
    }


def batch_of(config: DecoderConfig, rows: int, length: int) -> dict[str, jax.Array]:
    """Rows of random tokens without padding, all of them targets."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (rows, length + 1), dtype=np.int32)
    return {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "positions": jnp.asarray(np.tile(np.arange(length, dtype=np.int32), (rows, 1))),
        "segment_ids": jnp.ones((rows, length), jnp.int32),
        "loss_mask": jnp.ones((rows, length), jnp.float32),
    }


def step_parser(description: str) -> argparse.ArgumentParser:
    """The options of a step, whatever takes it."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", choices=sorted(MODELS))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=7)
    return parser


def median_and_spread(times: list[float]) -> tuple[float, float]:
    """The median, and half the distance of the quartiles."""
    first, median, third = statistics.quantiles(times, n=4)
    return median, (third - first) / 2


def main() -> None:
    """Print the table."""
    parser = step_parser(__doc__ or "")
    parser.add_argument("--remat", default="projections")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--only", default="", help="adapters whose names contain this, LoRA always")
    options = parser.parse_args()
    config, dtype = MODELS[options.model], jnp.dtype(options.dtype)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    attention = choose_attention(
        options.attention,
        config,
        dtype=dtype,
        lengths=(options.length,),
        packed=False,
        sharding=AttentionSharding(mesh=mesh),
    )
    model = Decoder(config, dtype=dtype, remat=options.remat, fused=attention)
    base = jax.jit(lambda key: init_params(config, key, dtype))(jax.random.key(0))
    batch = batch_of(config, options.rows, options.length)
    run = RunConfig(
        model=ModelConfig(path="none"),
        train=TrainConfig(output_dir="none"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )
    optimizer = make_optimizer(run, 100)
    tokens = options.rows * options.length
    print(
        f"{options.model}, {options.rows} x {options.length} tokens, rank {options.rank}, "
        f"{dtype.name}, remat {options.remat}, dropout {options.dropout}, attention "
        f"{type(attention).__name__ if attention else 'plain'}, "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n"
    )
    print("| | s a step | +- | of LoRA's | tokens/s | temporaries, GiB | to compile, s | loss |")
    print("|---|---|---|---|---|---|---|---|")
    first = 0.0
    for name, adapter in adapters(options.rank, options.dropout).items():
        if options.only not in name and name != "LoRA":
            continue
        trainable, frozen = partition(apply_smoa(base, adapter, jax.random.key(1)))
        state = initial_state(trainable, optimizer)
        step = make_train_step(model, optimizer, seed=0, chunk=128, dropout=options.dropout > 0)
        start = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
        compiling = time.perf_counter() - start
        times = []
        for number in range(options.rounds + 2):
            start = time.perf_counter()
            state, metrics = compiled(state, frozen, batch)
            jax.block_until_ready(state)
            if number > 1:
                times.append(time.perf_counter() - start)
        seconds, spread = median_and_spread(times)
        first = first or seconds
        memory: Any = compiled.memory_analysis()
        print(
            f"| {name} | {seconds:.4f} | {spread:.4f} | {seconds / first:.3f} | "
            f"{tokens / seconds:.0f} | {memory.temp_size_in_bytes / 2**30:.2f} | "
            f"{compiling:.1f} | {float(metrics['loss']):.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
