"""What has to hold on an accelerator, in one line each.

    python -m benchmarks.gpu_checks

Products and their gradients of every kind of adapter in float32 against NumPy's float64; hazard 1's
bound in bf16; cuDNN's attention against the plain path; loss and gradients of a whole decoder in
bf16 against float32; two runs of one step, bit for bit. Ends with the number that failed.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.step_cost import batch_of
from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.merge import merge_smoa
from smoa_jax.adapter.modulation import modulated_matmul
from smoa_jax.adapter.tree import apply_smoa, partition
from smoa_jax.models.attention import attend, segment_mask
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.decoder import Decoder, init_params
from smoa_jax.models.fused_attention import CudnnAttention
from smoa_jax.training.step import batch_loss

SMALL = DecoderConfig(
    vocab_size=1009,
    embed_dim=256,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    mlp_dim=640,
    rope_base=10000.0,
    norm_epsilon=1e-5,
    tie_embeddings=True,
    max_positions=1024,
    sliding_window=96,
    local_layers=(True, False, True, False),
)
ADAPTERS = {
    "LoRA": SmoaConfig.lora(12),
    "HiRA": SmoaConfig.hira(12),
    "blocks": SmoaConfig(rank=12, num_subspaces=3),
    "slices": SmoaConfig(rank=12, num_subspaces=3, partition="contiguous_blocks"),
    "bands": SmoaConfig(rank=12, num_subspaces=2, partition="spectral_bands"),
    "MELoRA": SmoaConfig.melora(12, 3),
}
failures = 0


def check(name: str, found: float, bound: float) -> None:
    """One line."""
    global failures
    failures += not found <= bound
    print(
        f"{'ok  ' if found <= bound else 'FAIL'} {name}: {found:.2e} (at most {bound:.0e})",
        flush=True,
    )


def error(got: Any, expected: Any) -> float:
    """Norm of the difference over the norm, of all leaves together."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    both = [(np.asarray(g, np.float64), np.asarray(e, np.float64)) for g, e in pairs]
    return float(
        np.sqrt(sum(np.sum((g - e) ** 2) for g, e in both) / sum(np.sum(e**2) for _, e in both))
    )


def with_b(params: Any, std: float) -> Any:
    """B drawn, so that the adapters do something."""

    def draw(path: Any, leaf: Any) -> Any:
        if getattr(path[-1], "name", "") != "b":
            return leaf
        return std * jax.random.normal(jax.random.key(len(path)), leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, params)


def check_products(name: str, config: SmoaConfig) -> None:
    """The product, dx, dA and dB in float32 against float64, and hazard 1 in bf16."""
    config = dataclasses.replace(config, target_modules="all-linear")
    kernel = jax.random.normal(jax.random.key(0), (384, 640)) / 20
    kernel = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    params = with_b(apply_smoa({"layer": {"kernel": kernel}}, config, jax.random.key(1)), 0.05)
    node = params["layer"]["smoa"]
    x = jax.random.normal(jax.random.key(2), (96, 384)).astype(jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(3), (96, 640))

    @jax.jit
    def step(a: Any, b: Any, x: Any, kernel: Any, dy: Any) -> Any:
        def product(a: Any, b: Any, x: Any) -> Any:
            return modulated_matmul(x, kernel, dataclasses.replace(node, a=a, b=b))

        y, back = jax.vjp(product, a, b, x)
        return y, back(dy)

    y, (da, _, dx) = step(node.a, node.b, x.astype(jnp.float32), kernel, dy)
    change = np.asarray(merge_smoa(params)["layer"]["kernel"], np.float64) - np.asarray(kernel)
    weight = np.asarray(kernel, np.float64) + change
    x64, dy64 = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    check(f"{name}, float32: y", error(y, x64 @ weight), 2e-6)
    check(f"{name}, float32: dx", error(dx, dy64 @ weight.T), 2e-6)
    eps, toward = 1e-3, jax.random.normal(jax.random.key(4), node.a.shape)
    shifted = [
        merge_smoa(
            {
                "layer": {
                    "kernel": kernel,
                    "smoa": dataclasses.replace(node, a=node.a + sign * eps * toward),
                }
            }
        )
        for sign in (1, -1)
    ]
    slope = sum(
        sign * np.sum(x64 @ np.asarray(tree["layer"]["kernel"], np.float64) * dy64)
        for sign, tree in zip((1, -1), shifted, strict=True)
    ) / (2 * eps)
    check(
        f"{name}, float32: dA along a direction",
        abs(np.sum(np.asarray(da, np.float64) * np.asarray(toward)) / slope - 1),
        5e-3,
    )
    if config.modulation == "none":
        return
    low = kernel.astype(jnp.bfloat16)
    small = dataclasses.replace(
        node, b=node.b * (1e-3 / np.std(change[change != 0] / np.asarray(kernel)[change != 0]))
    )
    wide = merge_smoa({"layer": {"kernel": kernel, "smoa": small}})["layer"]["kernel"]
    residual = np.asarray(wide, np.float64) - np.asarray(kernel)
    none = dataclasses.replace(small, b=0 * small.b)
    product = jax.jit(lambda x, low, node: modulated_matmul(x, low, node).astype(jnp.float32))
    true = x64 @ residual
    got, start = (np.asarray(product(x, low, n), np.float64) for n in (small, none))
    got = got - start
    slope = float(np.sum(got * true) / np.sum(true * true))
    check(f"{name}, bf16: projection on the true difference, from 1", abs(slope - 1), 3e-2)


def check_attention() -> None:
    """cuDNN's attention, forward and backward, packed and not, with a window and without."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (3, 256, 8, 64)
    q = jax.random.normal(keys[0], shape, jnp.bfloat16)
    k, v = (jax.random.normal(key, (3, 256, 4, 64), jnp.bfloat16) for key in keys[1:3])
    dy = jax.random.normal(keys[3], shape, jnp.bfloat16)
    places = np.arange(256)
    ids = jnp.asarray(np.stack([1 + (places >= cut) for cut in (90, 200, 256)]), jnp.int32)
    for packed in (False, True):
        for local in (False, True):
            segments = ids if packed else jnp.ones_like(ids)
            fused = CudnnAttention(packed=packed)
            window = SMALL.sliding_window if local else 0
            mask = segment_mask(segments, window)

            def plain(q, k, v, mask=mask):
                return attend(q, k, v, mask, scale=SMALL.attention_scale)

            def kernel(q, k, v, fused=fused, segments=segments, local=local):
                return fused(q, k, v, segment_ids=segments, local=local, config=SMALL)

            y, back = jax.vjp(jax.jit(plain), q, k, v)
            other, other_back = jax.vjp(jax.jit(kernel), q, k, v)
            rows, seen = "packed" if packed else "one segment", "window" if local else "causal"
            name = f"cuDNN's attention, {rows}, {seen}"
            check(f"{name}: y", error(other, y), 1e-2)
            check(f"{name}: gradients", error(other_back(dy), back(dy)), 2e-2)


def check_decoder(name: str, config: SmoaConfig) -> None:
    """Loss and gradients in bf16 with cuDNN's attention against float32's, and once more."""
    base = init_params(SMALL, jax.random.key(0), jnp.float32)
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base)
    batch = batch_of(SMALL, 4, 256)

    def gradients(base: Any, dtype: Any, fused: Any) -> Any:
        trainable, frozen = partition(with_b(apply_smoa(base, config, jax.random.key(1)), 0.02))
        model = Decoder(SMALL, dtype=dtype, remat="projections", fused=fused)
        run = jax.jit(jax.value_and_grad(lambda t: batch_loss(model, t, frozen, batch, 128)))
        return run(trainable), run(trainable)

    (exact, _), (low, again) = (
        gradients(wide, jnp.float32, None),
        gradients(base, jnp.bfloat16, CudnnAttention(packed=False)),
    )
    check(f"{name}, decoder in bf16: loss", abs(float(low[0] / exact[0]) - 1), 2e-3)
    check(f"{name}, decoder in bf16: gradients", error(low[1], exact[1]), 8e-2)
    same = all(
        jnp.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(again), strict=True)
    )
    check(f"{name}, decoder in bf16: differs from one run to the next", float(not same), 0.0)


def main() -> None:
    """All checks."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name, config in ADAPTERS.items():
        check_products(name, config)
    if jax.devices()[0].platform == "gpu":
        check_attention()
        for name in ("LoRA", "blocks", "slices", "bands"):
            check_decoder(name, ADAPTERS[name])
    print(f"{failures} failed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
