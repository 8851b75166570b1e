"""The device mesh: axes ``data``, ``fsdp`` and ``tensor``, from the configuration alone.

``data`` and ``fsdp`` both divide the batch; ``fsdp`` and ``tensor`` divide the frozen weights, and
with them every adapter tensor.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from smoa_jax.checks import require

#: Mesh axes, outermost first.
AXES = ("data", "fsdp", "tensor")
#: Mesh axes over which the batch is divided.
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, for all devices that are left.

    Args:
        data: Copies of the weights, each with its part of the batch.
        fsdp: Parts of the weights, gathered layer by layer, each with its part of the batch.
        tensor: Parts of heads, feed-forward and vocabulary.

    Raises:
        ValueError: for sizes that are neither positive nor a single -1.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = self.sizes
        require(
            sizes.count(-1) <= 1 and not any(size < 1 and size != -1 for size in sizes),
            f"mesh sizes data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}",
            "positive numbers, at most one of them -1 (all devices that are left)",
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """In the order of ``AXES``."""
        return (self.data, self.fsdp, self.tensor)

    def fits(self, num_devices: int) -> bool:
        """Whether so many devices can form this mesh."""
        known = math.prod(size for size in self.sizes if size != -1)
        return num_devices % known == 0 if -1 in self.sizes else num_devices == known


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh over all devices, or over those given.

    Raises:
        ValueError: if the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(config.sizes)
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"got a mesh of {shown} ({math.prod(sizes)} devices) and {len(devices)} devices; "
            "expected equal numbers; change the mesh sizes, one of them may be -1"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Rows of a batch over ``data`` and ``fsdp``; everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, *(None,) * (ndim - 1)))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a global batch, on its devices."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device, whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, rows: int, what: str = "batch_size") -> None:
    """Refuse a batch that the mesh does not divide.

    Raises:
        ValueError: naming both numbers.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    require(
        rows % parts == 0,
        f"{what}={rows} on a mesh of data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}",
        f"a multiple of {parts}",
        f"change {what} or the mesh",
    )


def rows_for_mesh(rows: int, mesh: Mesh) -> int:
    """The smallest number of at least ``rows`` that the mesh divides."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // parts) * parts
