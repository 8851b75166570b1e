"""Attention that never holds the scores: splash attention on TPUs, cuDNN's on NVIDIA GPUs.

The plain path (``attention.py``) makes an array of [B, N, T, T] in every layer, which at a few
thousand tokens outweighs all else that a layer makes. A fused kernel goes over it block by block.
Both kernels here are JAX's own and compute what ``attend`` computes under the same masks. No row
is ever NaN: a token at least sees itself, and what fills a row up stands behind it, where causal
attention does not look.

Where local and global layers share a stack, which are local is scanned data, but a kernel's window
is fixed when it is compiled, so a layer chooses between two kernels by ``lax.cond``. Kernels are
opaque to the partitioner, so on a mesh each device runs its own on its own rows and heads
(``jax.shard_map``), without communication.

``choose_attention`` says which one a run takes; their docstrings say what is known of each.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from smoa_jax.adapter.placement import num_parts
from smoa_jax.checks import require
from smoa_jax.models.attention import FusedAttention, Locality, segment_mask
from smoa_jax.models.config import DecoderConfig
from smoa_jax.models.options import AttentionName

#: Width of a TPU's registers; splash attention's blocks are multiples of it.
LANES = 128
#: ``auto`` leaves rows that are all shorter to the plain path, whose scores are small there. A
#: guess, until it is measured on hardware.
SHORTEST_FUSED = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSharding:
    """How queries, keys and values lie on a mesh.

    Args:
        mesh: The device mesh.
        batch: Mesh axes over which rows are divided.
        heads: Mesh axes over which heads are, key/value heads too.
    """

    mesh: Mesh
    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplashAttention:
    """Splash attention, the TPU kernel in ``jax.experimental.pallas``.

    Numbers: scores are accumulated in float32 from operands of the compute dtype; the running
    softmax and the log-sum-exp kept for the backward pass are float32; probabilities, not yet
    normalised, are multiplied with the values in one bf16 pass accumulated in float32, where the
    plain path rounds normalised ones to bf16. The kernel takes no scale, so the query is scaled in
    float32 and rounded once more, which is exact where the scale is a power of two. With float32
    operands a TPU would still multiply in bf16 passes, so ``choose_attention`` refuses those.

    In Pallas' interpreter it equals the plain path, forward and backward, and the TPU compiler
    accepts it. It has not run on a TPU.

    Args:
        sharding: Where the operands lie; None on a single device.
        block: Most queries and keys taken at a time, a multiple of 128. What is taken must divide
            the rows, filled up to a multiple of 128: rows of whole blocks are the fastest.
        interpret: Run in Pallas' interpreter, slowly and anywhere: for tests.
    """

    sharding: AttentionSharding | None = None
    block: int = 512
    interpret: bool = False

    def __post_init__(self) -> None:
        require(
            self.block >= LANES and not self.block % LANES,
            f"block {self.block}",
            f"a multiple of {LANES}",
        )

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        *,
        segment_ids: Int[Array, "B T"] | None,
        local: Locality,
        config: DecoderConfig,
    ) -> Float[Array, "B T N H"]:
        query = (query.astype(jnp.float32) * config.attention_scale).astype(query.dtype)
        attend = functools.partial(self._attend, config)
        return _on_each_device(self.sharding, attend, query, key, value, segment_ids, local)

    def _attend(
        self,
        config: DecoderConfig,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array | None,
        local: Locality,
    ) -> jax.Array:
        time, heads = query.shape[1:3]
        # What fills the last block comes after every token, so that none of them sees it, and is
        # cut off again: it may be of any segment.
        fill = -time % LANES
        if segment_ids is not None:
            segment_ids = jnp.pad(segment_ids, ((0, 0), (0, fill)))
        by_head = (
            jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))).swapaxes(1, 2)
            for x in (query, key, value)
        )

        def run(window: int, *operands: Any) -> jax.Array:
            cap, length = config.attention_soft_cap, time + fill
            kernel = _splash_kernel(length, heads, window, cap, self.block, self.interpret)
            return jax.vmap(kernel)(*operands)

        attended = _by_window(run, config, time, local, *by_head, segment_ids)
        return attended.swapaxes(1, 2)[:, :time]


def _splash_kernel(
    length: int, heads: int, window: int, cap: float, block: int, interpret: bool
) -> Callable[..., Any]:
    """The kernel for one row: query (N, T, H), key and value (K, T, H), segment ids (T) or None."""
    # Imported here: whoever does not use it need not care where JAX keeps it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    size = max(size for size in range(LANES, block + 1, LANES) if length % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    square = (length, length)
    if window:
        mask = splash_attention_mask.LocalMask(square, (window - 1, 0), 0)
    else:
        mask = splash_attention_mask.CausalMask(square)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=cap or None,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def attend_row(query, key, value, segment_ids):
        if segment_ids is not None:
            segment_ids = splash_attention_kernel.SegmentIds(segment_ids, segment_ids)
        return kernel(query, key, value, segment_ids)

    return attend_row


@dataclasses.dataclass(frozen=True, kw_only=True)
class CudnnAttention:
    """cuDNN's flash attention, through ``jax.nn.dot_product_attention``.

    It knows no soft cap, so Gemma 2 keeps the plain path, and takes 16-bit operands alone. It has
    no segment ids either. Rows of one example need none, since its padding comes last. For packed
    rows the mask is given as an additive bias, for which every layer makes [B, 1, T, T] in 16 bits,
    and its gradient where JAX insists on one: less than the scores of all heads, but no longer
    linear in T.

    On an NVIDIA H200 in bf16 it equals the plain path to 2.9e-3 and its gradients to 3.5e-3 (norm
    of the difference over the norm), packed and not, with a window and without
    (``benchmarks/gpu_checks.py``).

    Args:
        sharding: Where the operands lie; None on a single device.
        packed: Whether a row may hold several segments; without, segment ids are not looked at,
            and padding at a row's end may average over the tokens before it.
    """

    sharding: AttentionSharding | None = None
    packed: bool = True

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        *,
        segment_ids: Int[Array, "B T"] | None,
        local: Locality,
        config: DecoderConfig,
    ) -> Float[Array, "B T N H"]:
        require(
            not config.attention_soft_cap,
            f"attention_soft_cap {config.attention_soft_cap}",
            "none, which is all that cuDNN's attention knows",
            "use the plain path",
        )
        attend = functools.partial(self._attend, config)
        segments = segment_ids if self.packed else None
        return _on_each_device(self.sharding, attend, query, key, value, segments, local)

    @staticmethod
    def _attend(
        config: DecoderConfig,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array | None,
        local: Locality,
    ) -> jax.Array:
        def run(window: int, *operands: jax.Array, mask: jax.Array | None = None) -> jax.Array:
            return jax.nn.dot_product_attention(
                *operands,
                mask=mask,
                scale=config.attention_scale,
                is_causal=True,
                local_window_size=(window - 1, 0) if window else None,
                implementation="cudnn",
            )

        if segment_ids is None:
            return _by_window(run, config, query.shape[1], local, query, key, value)
        mask = segment_mask(segment_ids)
        if local is not None and local is not False:
            # The mask holds the window too: cuDNN's own is not said to go with a bias.
            window = segment_mask(segment_ids, config.sliding_window)
            mask &= window if local is True else ~local | window
        return run(0, query, key, value, mask=mask)


def choose_attention(
    name: AttentionName,
    config: DecoderConfig,
    *,
    dtype: DTypeLike,
    lengths: tuple[int, ...],
    packed: bool,
    sharding: AttentionSharding,
) -> FusedAttention | None:
    """Return the attention of a run; None is the plain path.

    ``auto`` takes what the mesh's devices and the model allow, where rows are long enough to gain
    by it, and cuDNN's only for rows that are not packed. A kernel asked for by name is taken or
    refused.

    Args:
        name: ``auto``, ``xla`` for the plain path, or a kernel.
        config: The decoder's.
        dtype: Of activations.
        lengths: Of all rows that the run makes.
        packed: Whether a row may hold several segments.
        sharding: Where the operands lie; its mesh may be of devices that are not attached.

    Raises:
        ValueError: for a kernel that the devices or the model cannot run.
    """
    if name == "xla":
        return None
    device = sharding.mesh.devices.flat[0]
    splash, cudnn = (
        SplashAttention(sharding=sharding),
        CudnnAttention(sharding=sharding, packed=packed),
    )
    no_splash = _splash_refusal(device, dtype)
    no_cudnn = _cudnn_refusal(device, dtype, config, lengths if packed else ())
    if name == "auto":
        if max(lengths) < SHORTEST_FUSED:
            return None
        if not no_splash:
            return splash
        return None if no_cudnn or packed else cudnn
    made, refusal = (splash, no_splash) if name == "splash" else (cudnn, no_cudnn)
    if refusal:
        raise ValueError(f"got model.attention={name} {refusal}; choose auto or xla")
    return made


def _splash_refusal(device: Any, dtype: DTypeLike) -> str:
    """Why splash attention cannot run, as ``got; expected``; empty if it can."""
    if device.platform != "tpu":
        return f"on platform {device.platform!r}; expected a TPU"
    return _dtype_refusal(dtype)


def _cudnn_refusal(
    device: Any, dtype: DTypeLike, config: DecoderConfig, packed_lengths: tuple[int, ...]
) -> str:
    """Likewise cuDNN's, whose limits are those that JAX knows; empty if it can."""
    # ROCm's devices, of platform "gpu" too, name an architecture here.
    version = str(getattr(device, "compute_capability", ""))
    if not re.fullmatch(r"\d+\.\d+", version) or float(version) < 8:
        found = f"compute capability {version}" if version else f"platform {device.platform!r}"
        return f"on {found}; expected an NVIDIA GPU of compute capability 8.0 or later"
    if config.attention_soft_cap:
        return f"with attention_soft_cap={config.attention_soft_cap}; expected a model without one"
    largest = 256 if float(version) >= 9 else 128
    for head_dim in (config.head_dim, config.global_head_dim):
        if head_dim > largest or head_dim % 8:
            return f"with head_dim={head_dim}; expected a multiple of 8 up to {largest}"
    if any(length % 2 for length in packed_lengths):
        return f"with packed rows of lengths {packed_lengths}; expected even ones"
    return _dtype_refusal(dtype)


def _dtype_refusal(dtype: DTypeLike) -> str:
    name = jnp.dtype(dtype).name
    return "" if name == "bfloat16" else f"with compute dtype {name}; expected bfloat16"


def _on_each_device(
    sharding: AttentionSharding | None,
    attend: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    local: Locality,
) -> jax.Array:
    """``attend`` with the rows and heads that each device has."""
    if sharding is None:
        return attend(query, key, value, segment_ids, local)
    parts = [num_parts(sharding.mesh, axes) for axes in (sharding.batch, sharding.heads)]
    require(
        query.shape[0] % parts[0] == 0 and key.shape[2] % parts[1] == 0,
        f"{query.shape[0]} rows and {key.shape[2]} key/value heads over {parts[0]} and {parts[1]} "
        "parts of the mesh",
        "multiples",
        "change the batch or the mesh",
    )
    rows = PartitionSpec(sharding.batch)
    heads = PartitionSpec(sharding.batch, None, sharding.heads)
    known = isinstance(local, bool)  # then it must stay one, so it is no operand
    return jax.shard_map(
        lambda q, k, v, segments, scanned: attend(q, k, v, segments, local if known else scanned),
        mesh=sharding.mesh,
        in_specs=(heads, heads, heads, rows, PartitionSpec()),
        out_specs=heads,
        # A kernel says nothing of how its results vary over the mesh.
        check_vma=False,
    )(query, key, value, segment_ids, None if known else local)


def _by_window(
    run: Callable[..., jax.Array],
    config: DecoderConfig,
    time: int,
    local: Locality,
    *operands: Any,
) -> jax.Array:
    """``run(window, *operands)``, the window that of the layer's kind: 0 for none."""
    if local is None or config.sliding_window >= time:
        return run(0, *operands)
    if isinstance(local, bool):
        return run(config.sliding_window if local else 0, *operands)
    windows = (config.sliding_window, 0)
    return jax.lax.cond(local, *(functools.partial(run, window) for window in windows), *operands)
