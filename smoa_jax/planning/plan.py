"""A run on a slice before it is rented: does it fit, what does it compute and move, how fast.

For a TPU the step is compiled by the TPU's own compiler, which needs no TPU; memory and collectives
are its word. For a GPU they are an estimate, and say so. Products are counted where JAX has written
them down. The times are bounds from published peaks: nothing runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from smoa_jax.adapter.planning.memory import decomposition_bytes
from smoa_jax.adapter.planning.stack import SPECTRAL_PARTITIONS
from smoa_jax.adapter.targets import find_targets
from smoa_jax.adapter.types import is_modulation
from smoa_jax.checkpoint.base import AbstractBase
from smoa_jax.checkpoint.native.leaves import adapter_leaves
from smoa_jax.checks import require
from smoa_jax.models.fused_attention import SHORTEST_FUSED
from smoa_jax.planning.chips import Slice
from smoa_jax.planning.estimate import estimated_collectives, estimated_temporaries
from smoa_jax.planning.program_text import collective_bytes
from smoa_jax.planning.step import AbstractStep, build_step
from smoa_jax.sharding.memory import bytes_per_device, total_bytes
from smoa_jax.training.config import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training step takes of a slice; bytes and seconds are a chip's.

    Attributes:
        where: The slice.
        mesh: Its axes.
        batch_size: Rows of a global batch.
        length: Tokens of a row.
        remat: What layers keep.
        base: Bytes of frozen weights.
        adapter: Of factors, and of what the adapter holds frozen beside them.
        optimizer: Of moments and counters.
        temporaries: Of all else: activations, gathered weights, logits; NaN where unknown.
        estimated: Whether temporaries and collectives are an estimate.
        flops: Of a step, all chips together, in products.
        needed_flops: What the frozen model takes of them, forward and back to its activations.
        tokens: Positions of a batch.
        collectives: Bytes that come out of each kind in a step.
        weights_read: Bytes of weights that a chip reads at least.
        compile_seconds: 0 where nothing was compiled.
    """

    where: Slice
    mesh: dict[str, int]
    batch_size: int
    length: int
    remat: str
    base: int
    adapter: int
    optimizer: int
    temporaries: float
    estimated: bool
    flops: float
    needed_flops: float
    tokens: int
    collectives: dict[str, int]
    weights_read: int
    compile_seconds: float

    @property
    def bytes(self) -> float:
        """All that a chip holds at once."""
        return self.base + self.adapter + self.optimizer + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether that is no more than a chip has."""
        return self.bytes <= self.where.chip.memory

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds that a step takes at least, by what would hold it up."""
        chip = self.where.chip
        return {
            "products": self.flops / self.where.count / chip.flops,
            "weights": self.weights_read / chip.bandwidth,
            "links": sum(self.collectives.values()) / chip.link,
        }

    @property
    def seconds(self) -> float:
        """The greatest of the bounds: all of them overlapped."""
        return max(self.bounds.values())

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation at that time, what it can reach at most."""
        return self.needed_flops / self.where.count / self.where.chip.flops / self.seconds


def plan(
    config: RunConfig,
    where: Slice,
    devices: list[Any],
    base: AbstractBase,
    *,
    compiled: bool = True,
) -> Plan:
    """Plan a run on a slice.

    Args:
        config: The run, its dtypes resolved for accelerators.
        where: The slice.
        devices: ``described_devices(where)``.
        base: The base model without its weights.
        compiled: Whether to compile for a TPU; False estimates, as for a GPU.

    Raises:
        ValueError: for a mesh, attention or adapter that does not fit devices, model or batch.
    """
    fused = where.chip.kind == "gpu" and _gpu_attention(config, base)
    if where.chip.kind == "gpu":  # it is traced for host devices, which have no kernel of a GPU
        model = dataclasses.replace(config.model, attention="xla")
        config = dataclasses.replace(config, model=model)
    step = build_step(config, devices, base)
    trained, optimizer = (
        bytes_per_device(step.state["trainable"]),
        bytes_per_device({name: step.state[name] for name in ("opt_state", "step", "skipped")}),
    )
    kinds = jax.tree.leaves(step.frozen, is_leaf=is_modulation)
    of_adapter = bytes_per_device([node for node in kinds if is_modulation(node)])
    of_base = bytes_per_device([node for node in kinds if not is_modulation(node)])
    arguments = of_base + of_adapter + trained + optimizer
    seconds = 0.0
    if compiled and where.chip.kind == "tpu":
        begun = time.monotonic()
        peak, moved = _compiled(step)
        seconds, temporaries = time.monotonic() - begun, peak - arguments
    else:
        fused = fused or step.model.fused is not None
        temporaries = estimated_temporaries(step, fused=fused)
        moved = estimated_collectives(step)
    whole = total_bytes(base.params)
    return Plan(
        where=where,
        mesh=dict(step.mesh.shape),
        batch_size=config.train.batch_size,
        length=config.data.max_length,
        remat=config.model.remat,
        base=of_base,
        adapter=of_adapter + trained,
        optimizer=optimizer,
        temporaries=temporaries,
        estimated=not (compiled and where.chip.kind == "tpu"),
        flops=step.flops,
        needed_flops=step.needed_flops,
        tokens=step.tokens,
        collectives=moved,
        weights_read=2 * config.train.accumulate * whole // step.mesh.shape["tensor"],
        compile_seconds=seconds,
    )


def _compiled(step: AbstractStep) -> tuple[float, dict[str, int]]:
    """Peak bytes of a chip and what its collectives give; without these if it does not fit."""
    try:
        program = step.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", str(error))
        if not used:
            raise
        return float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[used[2]], {}
    memory = program.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return peak, collective_bytes(program.as_text())


def _gpu_attention(config: RunConfig, base: AbstractBase) -> bool:
    """Whether a run on GPUs takes cuDNN's attention, which never holds scores."""
    asked, data = config.model.attention, config.data
    require(
        asked != "splash",
        "model.attention=splash for a GPU",
        "a kernel that it has",
        "choose auto, cudnn or xla",
    )
    if asked != "auto":
        return asked == "cudnn"
    capped = base.config.attention_soft_cap
    return not data.pack and not capped and data.max_length >= SHORTEST_FUSED


# ---------------------------------------------------------------------------------------- search


def largest_batch(plan_of: Callable[[int], Plan], unit: int) -> list[Plan]:
    """Plans of batches of 1, 2, ... units, the last that fits being the largest that does.

    Memory grows about as a line in the rows, so the third try is where two others point; each try
    is a compilation.

    Args:
        plan_of: The plan of a batch of so many rows.
        unit: The smallest batch, of which others are multiples.

    Returns:
        Those that fit, smallest first; none if the smallest doesn't.
    """
    tried: dict[int, Plan] = {}
    low, limit, count = 0, math.inf, 1
    while True:
        tried[count] = plan_of(count * unit)
        low, limit = (count, limit) if tried[count].fits else (low, count)
        if low + 1 >= limit:
            return [tried[count] for count in sorted(tried) if tried[count].fits]
        count = int(min(max(_pointed(tried), low + 1), limit - 1))


def _pointed(tried: dict[int, Plan]) -> int:
    """Where memory would be full, by the last two tries."""
    *others, last = sorted(tried)
    if not others:
        return 2 * last
    slope = (tried[last].bytes - tried[others[-1]].bytes) / (last - others[-1])
    room = tried[last].where.chip.memory - tried[last].bytes
    return last + math.floor(room / slope) if slope > 0 else 2 * last


# ------------------------------------------------------------------------ before and after steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Around:
    """What a run takes beside its steps.

    Attributes:
        decompositions: Of weights, one a layer and adapted kernel; done once for a base and kept.
        decomposition_flops: Of all, about.
        decomposition_bytes: Of the largest, on a host.
        checkpoint: Bytes of a checkpoint: factors, moments, and what tells the partition.
        adapter: Bytes of the finished adapter.
    """

    decompositions: int
    decomposition_flops: float
    decomposition_bytes: int
    checkpoint: int
    adapter: int


def around(step: AbstractStep) -> Around:
    """What planning the spectra takes, and what is written."""
    adapter = step.config.adapter
    spectral = adapter.partition in SPECTRAL_PARTITIONS
    targets = find_targets(step.base.params, adapter) if spectral else []
    bands = adapter.num_subspaces if adapter.partition == "spectral_bands" else 1
    count, flops, largest = 0, 0.0, 0
    for target in targets:
        inputs, outputs = target.matrix_shape[-2:]
        small, large, layers = min(inputs, outputs), max(inputs, outputs), sum(target.selected)
        count += layers
        # The Gram matrix of the smaller side, and the decomposition of a symmetric matrix.
        flops += layers * (2.0 * large * small**2 + 9.0 * small**3)
        largest = max(largest, decomposition_bytes(inputs, outputs, bands))
    size = {
        name: total_bytes(tree)
        for name, tree in {
            "state": step.state,
            "factors": step.state["trainable"],
            "partition": adapter_leaves(step.frozen),
        }.items()
    }
    return Around(
        decompositions=count,
        decomposition_flops=flops,
        decomposition_bytes=largest,
        checkpoint=size["state"] + size["partition"],
        adapter=size["factors"] + size["partition"],
    )
