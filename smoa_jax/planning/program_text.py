"""What a compiled program says of itself in its text: its collectives, with loops applied.

A loop's body stands there once. How often it runs is in the loop's ``known_trip_count`` where the
compiler writes one (CPU), else in the constant that its condition compares the counter with (TPU).
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_BEGIN = re.compile(r"^(ENTRY )?(%?[\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=(%?[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An array that a collective gives on a device.

    Attributes:
        kind: Such as ``all-gather``.
        dtype: As the program writes it.
        values: In one result.
        times: How often it runs in a call of the program.
    """

    kind: str
    dtype: str
    values: int
    times: int

    @property
    def bytes(self) -> int:
        """Of all runs."""
        return self.values * _BYTES.get(self.dtype, 1) * self.times


def collective_bytes(program: str) -> dict[str, int]:
    """Bytes that come out of each kind of collective on a device, in a call of the program."""
    found: dict[str, int] = collections.defaultdict(int)
    for collective in collectives(program):
        found[collective.kind] += collective.bytes
    return dict(found)


def collectives(program: str) -> list[Collective]:
    """All of them.

    One that the compiler fuses with products is written in several fusions, each with the channel
    of all, and counts once.
    """
    computations, entry = _computations(program)
    times = _times(computations, entry)
    found, fused = [], set()
    for name, lines in computations.items():
        for line in lines:
            for kind, dtype, values in _arrays(line):
                channel = re.search(r"channel_id=(\d+)", line)
                if "fus" in name and channel:
                    key = channel[1], kind, dtype, values
                    if key in fused:
                        continue
                    fused.add(key)
                found.append(Collective(kind, dtype, values, times.get(name, 1)))
    return found


def _arrays(line: str) -> Iterator[tuple[str, str, int]]:
    match = _COLLECTIVE.search(line)
    if not match:
        return
    arrays = [array for array in re.findall(r"(\w+)\[([\d,]*)\]", match[1]) if array != ("u32", "")]
    if match[3]:  # its operands come first, its results after them
        arrays = arrays[len(arrays) // 2 :]
    for dtype, dims in arrays:
        yield match[2], dtype, math.prod(map(int, dims.split(","))) if dims else 1


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Lines by computation, and the one that is called."""
    found: dict[str, list[str]] = {}
    name = entry = ""
    for line in program.splitlines():
        if begin := _BEGIN.match(line):
            name = begin[2]
            found[name] = []
            entry = name if begin[1] else entry
        elif name:
            found[name].append(line)
    return found, entry


def _times(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs; one that is called from several places, as the most."""
    times = {entry: 1}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        for line in computations.get(name, ()):
            for called, count in _calls(line, computations):
                runs = times[name] * count
                if runs > times.get(called, 0):
                    times[called] = runs
                    waiting.append(called)
    return times


def _calls(line: str, computations: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    loop = re.search(r" while\(.*condition=(%?[\w.\-]+), body=(%?[\w.\-]+)", line)
    if loop:
        yield loop[2], _trips(line, computations.get(loop[1], []))
        return
    for called in _CALLED.findall(line):
        yield called, 1
    branches = re.search(r"branch_computations=\{(.*?)\}", line)
    for called in branches[1].split(", ") if branches else ():
        yield called, 1


def _trips(line: str, condition: list[str]) -> int:
    known = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', line)
    if known:
        return int(known[1])
    limits = [re.search(r"= [su]32\[\]\S* constant\((\d+)\)", each) for each in condition]
    return max((int(limit[1]) for limit in limits if limit), default=1)
