"""Eigendecomposition of the Gram matrix against SVD, for speed and for the same partition.

    python benchmarks/spectral_planning.py MODEL [--num-subspaces 2 3 4]
    python benchmarks/spectral_planning.py --shapes 4096x4096 4096x14336 [--svd]

MODEL is a Hugging Face directory or a GGUF file. For every adapted kernel both ways compute the
spectral scores in float32; float64 SVD is the reference. "The same partition" means the same block
ids but for coordinates whose score lies within 1e-3 * q of a cut (docs/method.md).

With --shapes instead, random weights: what planning one layer of each shape costs, as
``plan_spectra`` does it (one BLAS thread, compilation left out), once, with --svd beside an SVD.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from smoa_jax.adapter.config import SmoaConfig, split_evenly
from smoa_jax.adapter.planning.decompose import layer_scores
from smoa_jax.adapter.planning.spectra import kernel_layer
from smoa_jax.adapter.targets import find_targets
from smoa_jax.checkpoint.base import load_base


@jax.jit
def svd_scores(matrix: jax.Array) -> dict[str, jax.Array]:
    """Scores by an economy SVD in float32, as the published code computes them."""
    left, values, right = jnp.linalg.svd(matrix.astype(jnp.float32), full_matrices=False)
    index = jnp.arange(values.shape[0], dtype=jnp.float32)
    result = {}
    for name, vectors in (("inputs", left), ("outputs", right.T)):
        energy = vectors**2 * values[None, :] ** 2
        total = jnp.maximum(energy.sum(axis=1), jnp.finfo(jnp.float32).tiny)
        result[name] = (energy * index[None, :]).sum(axis=1) / total
    return result


def reference_scores(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """The same in float64."""
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    index = np.arange(len(values))
    energies = {"inputs": left**2 * values**2, "outputs": right.T**2 * values**2}
    return {name: e @ index / np.maximum(e.sum(1), 1e-38) for name, e in energies.items()}


def block_ids(scores: np.ndarray, num_subspaces: int) -> np.ndarray:
    """Block of every coordinate."""
    order = np.argsort(scores, kind="stable")
    ids = np.empty(len(scores), int)
    sizes = split_evenly(len(scores), num_subspaces)
    ids[order] = np.repeat(np.arange(num_subspaces), sizes)
    return ids


def disagreements(scores, reference, num_subspaces: int, rank: int) -> tuple[int, int]:
    """Coordinates in another block than the reference's: all, and those not near a cut."""
    scores, reference = np.asarray(scores), np.asarray(reference)
    differ = block_ids(scores, num_subspaces) != block_ids(reference, num_subspaces)
    edges = np.cumsum(split_evenly(len(scores), num_subspaces))[:-1]
    ordered = np.sort(reference)
    near = np.zeros(len(scores), bool)
    for edge in edges:
        cut = (ordered[edge - 1] + ordered[edge]) / 2
        near |= np.abs(reference - cut) <= 1e-3 * rank
    return int(differ.sum()), int((differ & ~near).sum())


def measure_shapes(shapes: list[str], with_svd: bool) -> None:
    """Print seconds per layer of random float32 weights,."""
    ways = {"eigh(Gram)": layer_scores} | ({"SVD": svd_scores} if with_svd else {})
    generator = np.random.default_rng(0)
    for text in shapes:
        inputs, outputs = (int(size) for size in text.split("x"))
        matrix = jnp.asarray(generator.standard_normal((inputs, outputs), np.float32))
        seconds = {}
        for way, function in ways.items():
            compiled = function.lower(matrix).compile()
            with threadpool_limits(1):
                start = time.perf_counter()
                jax.block_until_ready(compiled(matrix))
                seconds[way] = time.perf_counter() - start
        shown = ", ".join(f"{way} {value:.1f} s/layer" for way, value in seconds.items())
        print(f"{inputs} x {outputs}: {shown}", flush=True)


def main() -> None:
    """Print a table: seconds, largest score error, and disagreeing coordinates by M."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--shapes", nargs="+", default=[], metavar="INPUTSxOUTPUTS")
    parser.add_argument("--svd", action="store_true", help="with --shapes: time an SVD too")
    parser.add_argument("--num-subspaces", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--target-modules", nargs="+", default=["q_proj", "v_proj", "up_proj"])
    parser.add_argument("--layers", type=int, nargs="+", default=[])
    arguments = parser.parse_args()
    if (arguments.model is None) == (not arguments.shapes):
        parser.error("got both or neither of MODEL and --shapes; expected one of them")
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}", flush=True)
    if arguments.shapes:
        measure_shapes(arguments.shapes, arguments.svd)
    else:
        measure_model(arguments)


def measure_model(arguments: argparse.Namespace) -> None:
    """Print both ways side by side for the kernels of a real model."""
    base = load_base(arguments.model, dtype=jnp.float32)
    config = SmoaConfig(
        target_modules=arguments.target_modules, layers=tuple(arguments.layers), num_subspaces=2
    )
    ways = {"eigh(Gram)": layer_scores, "SVD": svd_scores}
    for target in find_targets(base.params, config):
        kernel = base.params
        for key in (*target.path, target.key):
            kernel = kernel[key]
        seconds = dict.fromkeys(ways, 0.0)
        worst = dict.fromkeys(ways, 0.0)
        wrong = {way: {m: np.zeros(2, int) for m in arguments.num_subspaces} for way in ways}
        chosen = [layer for layer, selected in enumerate(target.selected) if selected]
        for layer in chosen:
            matrix = jax.block_until_ready(kernel_layer(kernel, target, layer))
            reference = reference_scores(np.asarray(matrix))
            for way, function in ways.items():
                jax.block_until_ready(function(matrix))
                start = time.perf_counter()
                scores = jax.block_until_ready(function(matrix))
                seconds[way] += time.perf_counter() - start
                for side, values in scores.items():
                    error = float(np.max(np.abs(np.asarray(values) - reference[side])))
                    worst[way] = max(worst[way], error)
                    for m in arguments.num_subspaces:
                        wrong[way][m] += disagreements(
                            values, reference[side], m, min(matrix.shape)
                        )
        print(f"{target.name} {target.matrix_shape[-2:]}, {len(chosen)} layers")
        for way in ways:
            counts = ", ".join(
                f"M={m}: {wrong[way][m][0]} ({wrong[way][m][1]})" for m in wrong[way]
            )
            print(
                f"  {way:11s} {seconds[way] / len(chosen) * 1e3:8.1f} ms/layer   largest score "
                f"error {worst[way]:.4f}   other block than float64 SVD (not near a cut): {counts}"
            )


if __name__ == "__main__":
    main()
