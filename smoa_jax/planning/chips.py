"""Chips and slices by the names under which they are rented, with their makers' figures.

Peaks are dense bf16 products; ``link`` is what a chip can receive in a second over all of its
links, half of a bidirectional figure. Memory is the published size: a compiler for TPUs leaves a
little of it free and has the last word.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal

from smoa_jax.checks import refuse, require

_TPU_DOCS = "https://docs.cloud.google.com/tpu/docs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device.

    Attributes:
        name: As a topology begins.
        kind: ``tpu`` has a compiler to hand, ``gpu`` an estimate.
        memory: Bytes.
        flops: bf16 products, in floating-point operations a second.
        bandwidth: Of its memory, bytes a second.
        link: Bytes a second that it can receive from other devices.
        source: Where the figures stand.
        cores: Of those in which slices of it are counted.
        dimensions: Of its torus; 0 for none.
    """

    name: str
    kind: Literal["tpu", "gpu"]
    memory: int
    flops: float
    bandwidth: float
    link: float
    source: str
    cores: int = 1
    dimensions: int = 0


def _tpu(name: str, gib: float, tflops: float, bandwidth: float, link: float, **more: int) -> Chip:
    return Chip(
        name=name,
        kind="tpu",
        memory=int(gib * 2**30),
        flops=tflops * 1e12,
        bandwidth=bandwidth * 1e9,
        link=link * 1e9 / 2,
        source=f"{_TPU_DOCS}/{name}",
        **more,
    )


def _gpu(name: str, gb: float, tflops: float, bandwidth: float, link: float, page: str) -> Chip:
    return Chip(
        name=name,
        kind="gpu",
        memory=int(gb * 1e9),
        flops=tflops * 1e12,
        bandwidth=bandwidth * 1e9,
        link=link * 1e9 / 2,
        source=f"https://www.nvidia.com/en-us/data-center/{page}/",
    )


#: Name, memory, TFLOP/s, GB/s of memory, GB/s of links in both directions together.
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v5e", 16, 197, 819, 400, dimensions=2),
        _tpu("v5p", 95, 459, 2765, 1200, cores=2, dimensions=3),
        _tpu("v6e", 32, 918, 1638, 800, dimensions=2),
        _gpu("a100", 80, 312, 2039, 600, "a100"),
        _gpu("a100-40gb", 40, 312, 1555, 600, "a100"),
        _gpu("h100", 80, 989, 3350, 900, "h100"),
        _gpu("h200", 141, 989, 4800, 900, "h200"),
        _gpu("l4", 24, 121, 300, 64, "l4"),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """Chips of one kind, linked.

    Attributes:
        chip: What they are.
        count: How many.
        shape: Of a TPU's torus; empty for GPUs.
    """

    chip: Chip
    count: int
    shape: tuple[int, ...] = ()

    @property
    def topology(self) -> str:
        """As libtpu calls it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Slice:
    """``v5e-16``, ``v5p-128`` (cores, so 64 chips), ``v5e:4x4`` or ``h100x8``.

    Raises:
        ValueError: for a chip that isn't known or a slice that isn't offered.
    """
    known = "|".join(sorted(CHIPS, key=len, reverse=True))
    words = text.strip().lower()
    found = re.fullmatch(rf"({known})(?:([x-])(\d+)|:(\d+(?:x\d+)*))?", words)
    if not found:
        refuse(
            f"--topology {text}",
            f"a chip ({', '.join(CHIPS)}) and how many, such as v5e-16, v5p-128, v6e:4x4 or h100x8",
        )
    chip = CHIPS[found[1]]
    if chip.kind == "gpu":
        require(
            found[4] is None and found[2] != "-",
            f"--topology {text}",
            f"a number of cards, such as {chip.name}x8",
        )
        count = int(found[3] or 1)
        require(count >= 1, f"--topology {text}", "at least one card")
        return Slice(chip=chip, count=count)
    if found[4]:
        shape = tuple(map(int, found[4].split("x")))
        require(
            len(shape) == chip.dimensions and min(shape) >= 1,
            f"--topology {text}",
            f"{chip.dimensions} sizes of a torus",
        )
        return Slice(chip=chip, count=math.prod(shape), shape=shape)
    units = int(found[3] or chip.cores)
    shape = _torus(units // chip.cores, chip.dimensions)
    require(
        bool(shape) and units % chip.cores == 0,
        f"--topology {text}",
        f"a slice of 1, 2, 4, 8, ... {'cores' if chip.cores > 1 else 'chips'}"
        f"{f', {chip.cores} of them a chip' if chip.cores > 1 else ''}",
        f"choose another, or give its shape as {chip.name}:{'x'.join('4' * chip.dimensions)}",
    )
    return Slice(chip=chip, count=math.prod(shape), shape=shape)


def _torus(count: int, dimensions: int) -> tuple[int, ...]:
    """The most even shape of powers of two, smallest first; empty if there is none."""
    if count < 1 or count & (count - 1):
        return ()
    shape = [1] * dimensions
    for step in range(count.bit_length() - 1):
        shape[-1 - step % dimensions] *= 2
    return tuple(sorted(shape)) if dimensions == 2 else tuple(sorted(shape, reverse=count <= 4))
