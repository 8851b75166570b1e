"""What an adapted product costs, forward and backward, in units of the frozen product ``x W``.

    python benchmarks/product_cost.py                                   # on whatever JAX finds
    python benchmarks/product_cost.py --shape 576x1536 --tokens 1024 --dtype float32

Each row is timed in turn, round after round, so that all see the same machine; times are medians
over rounds, the spread is half the distance of the quartiles. FLOPs, bytes and temporaries are the
compiler's: of the device at hand (on a GPU products are library calls, whose FLOPs it doesn't
count) or, with ``--topology v5e:2x2``, of a TPU that isn't there, and nothing is timed. ``frozen``
is ``x W`` and ``dx``; a floor is given where method.md's cost model has one. ``gathered`` is no
part of the library: blocks in any order by gathers of x, W and y, to see what they cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.modulation import modulated_matmul
from smoa_jax.adapter.products import contract, contract_leading, dense_matmul
from smoa_jax.adapter.tree import apply_smoa
from smoa_jax.adapter.types import Modulation

SUBSPACES = (2, 4, 8)


def node_of(config: SmoaConfig, kernel: jax.Array) -> Modulation:
    """The modulation of the kernel, B drawn so small that the weights change by about 1 %."""
    config = dataclasses.replace(config, target_modules="all-linear")
    node = apply_smoa({"layer": {"kernel": kernel}}, config, jax.random.key(1))["layer"]["smoa"]
    b = 0.02 * jax.random.normal(jax.random.key(2), node.b.shape)
    return dataclasses.replace(node, b=b)


def adapted(node: Modulation) -> tuple[Callable[..., Any], Any]:
    """The step of a modulation, and its factors."""

    def step(factors: Any, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> Any:
        def product(factors: Any, x: jax.Array) -> jax.Array:
            own = dataclasses.replace(node, a=factors[0], b=factors[1])
            return modulated_matmul(x, kernel, own)

        y, back = jax.vjp(product, factors, x)
        return y, back(dy)

    return step, (node.a, node.b)


def frozen(factors: Any, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> Any:
    """``x W`` and dx."""
    y, back = jax.vjp(lambda x: dense_matmul(x, kernel), x)
    return y, back(dy)


def full(factors: Any, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> Any:
    """``x W``, dx and dW."""
    y, back = jax.vjp(dense_matmul, x, kernel)
    return y, back(dy)


def gathered(node: Any, num_blocks: int) -> tuple[Callable[..., Any], Any]:
    """Blocks of equal sizes in any order: x, W and dy gathered block by block."""
    in_order = jnp.argsort(node.in_block, stable=True).reshape(num_blocks, -1)
    out_order = jnp.argsort(node.out_block, stable=True).reshape(num_blocks, -1)
    back_in, back_out = jnp.argsort(in_order.reshape(-1)), jnp.argsort(out_order.reshape(-1))

    def changes(factors: Any, kernel: jax.Array) -> list[Any]:
        a, b = factors
        found = []
        for rows, columns in zip(in_order, out_order, strict=True):
            anchor = kernel[rows[:, None], columns[None, :]].astype(jnp.float32)
            low_rank = contract(a[rows], b[columns], 1, 1)
            found.append((rows, columns, anchor, (anchor * low_rank).astype(kernel.dtype)))
        return found

    def step(factors: Any, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> Any:
        a, b = factors
        parts = changes(factors, kernel)
        y = [contract(x[:, rows], change, 1, 0) for rows, _, _, change in parts]
        y = contract(x, kernel, 1, 0) + jnp.concatenate(y, axis=1)[:, back_out]
        dx = [contract(dy[:, columns], change, 1, 1) for _, columns, _, change in parts]
        dx = contract(dy, kernel, 1, 1) + jnp.concatenate(dx, axis=1)[:, back_in]
        das, dbs = [], []
        for rows, columns, anchor, _ in parts:
            product = anchor * contract_leading(x[:, rows], dy[:, columns])
            das.append(contract(product, b[columns], 1, 0))
            dbs.append(contract(product, a[rows], 0, 0))
        da, db = jnp.concatenate(das)[back_in], jnp.concatenate(dbs)[back_out]
        return y.astype(x.dtype), ((da, db), dx.astype(x.dtype))

    return step, (node.a, node.b)


def cases(kernel: jax.Array, rank: int, with_bands: bool) -> dict[str, tuple[Any, Any, float]]:
    """Name -> (step, factors, floor in units; 0 where there is none)."""
    wide = kernel.dtype == jnp.float32
    found: dict[str, tuple[Any, Any, float]] = {
        "frozen": (frozen, None, 2.0),
        "full fine-tuning": (full, None, 3.0),
        f"LoRA, R = {rank}": (*adapted(node_of(SmoaConfig.lora(rank), kernel)), 2.0),
        f"HiRA, R = {rank}": (*adapted(node_of(SmoaConfig.hira(rank), kernel)), 0.0),
    }
    for blocks in SUBSPACES:
        for partition in ("random_blocks", "contiguous_blocks"):
            config = SmoaConfig(rank=rank, num_subspaces=blocks, partition=partition)
            node = node_of(config, kernel)
            if partition == "random_blocks":
                found[f"blocks in any order, M = {blocks}"] = (*adapted(node), 0.0)
                if not wide and not kernel.shape[0] % blocks + kernel.shape[1] % blocks:
                    found[f"  gathered, M = {blocks}"] = (*gathered(node, blocks), 0.0)
            else:
                floor = 2 + (1 if wide else 2) / blocks
                found[f"blocks as slices, M = {blocks}"] = (*adapted(node), floor)
    if with_bands:
        bands = SmoaConfig(rank=rank, num_subspaces=2, partition="spectral_bands")
        found["bands, M = 2"] = (*adapted(node_of(bands, kernel)), 0.0)
    return found


def measure(
    compiled: dict[str, Any], arguments: dict[str, Any], rounds: int, repeats: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of each, and half the distance of the quartiles."""
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for step_round in range(rounds + 1):
        for name, step in compiled.items():
            start = time.perf_counter()
            for _ in range(repeats):
                result = step(*arguments[name])
            jax.block_until_ready(result)
            if step_round:  # the first one warms up
                times[name].append((time.perf_counter() - start) / repeats)
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {name: (q[1], (q[2] - q[0]) / 2) for name, q in quartiles.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="4096x14336")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--bands", action="store_true", help="bands too: their plan takes long")
    parser.add_argument("--topology", default="", help="compile for a TPU, such as v5e:2x2")
    options = parser.parse_args()
    inputs, outputs = map(int, options.shape.split("x"))
    keys = jax.random.split(jax.random.key(0), 3)
    dtype = jnp.dtype(options.dtype)
    kernel = (inputs**-0.5 * jax.random.normal(keys[0], (inputs, outputs))).astype(dtype)
    x = jax.random.normal(keys[1], (options.tokens, inputs)).astype(dtype)
    dy = jax.random.normal(keys[2], (options.tokens, outputs)).astype(dtype)
    rows = cases(kernel, options.rank, options.bands)
    runs = {"x W": (lambda _, x, kernel, dy: dense_matmul(x, kernel), None)}
    runs |= {name: (step, factors) for name, (step, factors, _) in rows.items()}
    arguments = {name: (factors, x, kernel, dy) for name, (_, factors) in runs.items()}
    where = None
    if options.topology:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
        where = SingleDeviceSharding(topology.devices[0])
    compiled = {
        name: jax.jit(step).lower(*_placed(arguments[name], where)).compile()
        for name, (step, _) in runs.items()
    }
    device = options.topology or jax.devices()[0].device_kind
    flops = 2 * options.tokens * inputs * outputs
    print(
        f"{options.shape}, {options.tokens} tokens, {dtype.name}, {device}, jax {jax.__version__}"
    )
    times = {}
    if not options.topology:
        times = measure(compiled, arguments, options.rounds, options.repeats)
        unit = times["x W"][0]
        print(f"x W: {1e3 * unit:.3f} ms, {flops / unit / 1e12:.1f} TFLOP/s")
    print("\n| | floor | units by FLOPs | GiB moved | temporaries, MiB | units by the clock | ms |")
    print("|---|---|---|---|---|---|---|")
    for name, (_, _, floor) in rows.items():
        cost: Any = compiled[name].cost_analysis() or {}
        memory: Any = compiled[name].memory_analysis()
        cells = [
            name,
            f"{floor:.2f}" if floor else "",
            f"{cost.get('flops', math.nan) / flops:.2f}",
        ]
        cells.append(f"{cost.get('bytes accessed', math.nan) / 2**30:.2f}")
        cells.append(f"{memory.temp_size_in_bytes / 2**20:.0f}")
        if name in times:
            seconds, spread = times[name]
            cells.append(f"{seconds / times['x W'][0]:.2f}")
            cells.append(f"{1e3 * seconds:.3f} ± {1e3 * spread:.3f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def _placed(tree: Any, where: Any) -> Any:
    """Arrays as they are, or their shapes on a device that isn't there."""
    if where is None:
        return tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


if __name__ == "__main__":
    main()
