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
from smoa_jax.sharding.watchdog import Watchdog, end_now

_watchdog: Watchdog | None = None


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
        heartbeat_timeout: Seconds after which a process that is not heard of counts as dead, and
            the others end; also how long they wait for each other when they start and end.
        step_timeout: Seconds without any progress after which a process ends, since another hangs;
            0: never. Loading the base and compiling the first step must fit in.

    Raises:
        ValueError: for an address without its numbers, or the other way round.
    """

    initialize: bool = False
    coordinator_address: str = ""
    num_processes: int = 0
    process_id: int = -1
    heartbeat_timeout: int = 100
    step_timeout: float = 1800.0

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
        require(
            self.heartbeat_timeout >= 1 and self.step_timeout >= 0,
            f"distributed.heartbeat_timeout={self.heartbeat_timeout}, "
            f"step_timeout={self.step_timeout}",
            "at least 1, and at least 0",
        )


def initialize(config: DistributedConfig) -> None:
    """Join the other processes, before JAX is used in any other way; once is enough."""
    global _watchdog
    if not config.initialize:
        return
    if not jax.distributed.is_initialized():
        named = config.coordinator_address != ""
        jax.distributed.initialize(
            config.coordinator_address if named else None,
            config.num_processes if named else None,
            config.process_id if named else None,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            shutdown_timeout_seconds=config.heartbeat_timeout,
        )
    if _watchdog is not None:
        _watchdog.stop()
    name = f"process {jax.process_index()} of {jax.process_count()}"
    _watchdog = Watchdog(config.step_timeout, name) if config.step_timeout else None


def progressed() -> None:
    """Tell the watchdog, if there is one, that this process gets on."""
    if _watchdog is not None:
        _watchdog.progress()


def end_if_another_is_lost(_: Any, error: BaseException | None, __: Any) -> None:
    """End this process at once if a collective failed; to be pushed onto an ``ExitStack``.

    Whatever is closed on the way out would wait for the process that is gone.
    """
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        reason = " ".join(str(error).split())[:200]
        end_now(
            f"got no answer from another process ({reason}); expected all of them to be alive; "
            "look at what it says itself, and start all of them again; --resume goes on from the "
            "last checkpoint"
        )


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes come out of this block, or all of them raise what one of them raised."""
    progressed()
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
