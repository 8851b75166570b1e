"""Several processes that train one model together, one on each host.

All of them run the same program on the same configuration; each reads its share of the weights and
of every batch, and the first one alone writes what people read. What one process trips over, all
of them raise, so that none waits forever for one that is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from smoa_jax.adapter.planning.exchange import raise_together
from smoa_jax.checks import require
from smoa_jax.sharding.mesh import BATCH_AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How the processes of a run find each other.

    On TPU pods and under Slurm or Open MPI ``initialize`` alone is enough; elsewhere every process
    is told the rest. ``train.output_dir`` must lie where all of them see it.

    Args:
        initialize: Whether the run has several processes.
        coordinator_address: ``host:port`` of the first process; empty: found by itself.
        num_processes: How many; 0: found by itself.
        process_id: Of this process, from 0; -1: found by itself.

    Raises:
        ValueError: for an address without its numbers, or the other way round.
    """

    initialize: bool = False
    coordinator_address: str = ""
    num_processes: int = 0
    process_id: int = -1

    def __post_init__(self) -> None:
        given = (self.coordinator_address != "", self.num_processes > 0, self.process_id >= 0)
        require(
            not any(given) or (all(given) and self.process_id < self.num_processes),
            f"distributed.coordinator_address={self.coordinator_address!r}, "
            f"num_processes={self.num_processes}, process_id={self.process_id}",
            "all three, with a process_id below num_processes, or none of them",
        )
        require(
            not any(given) or self.initialize,
            "a distributed.coordinator_address with distributed.initialize=false",
            "true to use it",
        )


def initialize(config: DistributedConfig) -> None:
    """Join the other processes, before JAX is used in any other way; once is enough."""
    if not config.initialize or jax.distributed.is_initialized():
        return
    if config.coordinator_address:
        jax.distributed.initialize(
            config.coordinator_address, config.num_processes, config.process_id
        )
    else:
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes come out of this block, or all of them raise what one of them raised."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    raise_together(error)


def anywhere(flag: bool) -> bool:
    """Whether any process says so; all of them ask together."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def fetch(tree: Any) -> Any:
    """Every array of a tree whole on this host, wherever its parts lie; all processes call it."""

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of every global batch this process reads, and of how many.

    Processes whose devices hold the same rows, as with a ``tensor`` axis across them, read the
    same share.

    Raises:
        ValueError: if shares overlap in part.
    """
    rows: dict[int, set[int]] = {}
    parts = [mesh.shape[axis] for axis in BATCH_AXES]
    for place, devices in enumerate(mesh.devices.reshape(parts[0] * parts[1], -1)):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(place)
    shares = sorted({tuple(sorted(places)) for places in rows.values()})
    require(
        sum(map(len, shares)) == parts[0] * parts[1] and len(set(map(len, shares))) == 1,
        f"a mesh of {dict(mesh.shape)} whose processes hold rows {shares} of a batch in "
        f"{parts[0] * parts[1]} parts",
        "equal shares that are apart or the same",
        "make mesh.tensor a divisor or a multiple of the devices of a process",
    )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)
