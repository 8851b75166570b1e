"""What a run computes on, said before it begins: versions, devices, mesh, dtypes, attention."""

from __future__ import annotations

import importlib.metadata
import os
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from smoa_jax.models.decoder import Decoder
from smoa_jax.models.fused_attention import SplashAttention
from smoa_jax.training.model import LoadedModel

#: Of libraries whose version decides about a run's numbers.
_LIBRARIES = ("smoa-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


def versions() -> dict[str, str]:
    """Installed versions by distribution; those that are not installed are left out."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_kinds(mesh: Mesh) -> dict[str, int]:
    """How many devices of each kind a mesh has."""
    devices = mesh.devices.flat
    return dict(Counter(f"{device.device_kind} ({device.platform})" for device in devices))


def describe_environment(loaded: LoadedModel) -> str:
    """One line on devices, mesh, dtypes, attention and JAX."""
    kinds = ", ".join(f"{count} x {kind}" for kind, count in device_kinds(loaded.mesh).items())
    mesh = " x ".join(f"{name} {size}" for name, size in loaded.mesh.shape.items())
    weights = jax.tree.leaves(loaded.base.params)[0].dtype
    activations = jnp.dtype(loaded.model.dtype)
    return (
        f"device: {kinds}; mesh {mesh}; weights {weights}, activations {activations}; attention "
        f"{attention_name(loaded.model)}; jax {jax.__version__}"
    )


def attention_name(model: Decoder) -> str:
    """The attention of whole sequences, by the name that a configuration gives it."""
    fused: Any = model.fused
    if fused is None:
        return "xla"
    return "splash" if isinstance(fused, SplashAttention) else "cudnn"


def unused_accelerator(devices: Path = Path("/dev")) -> str:
    """What to do about an accelerator of this machine that JAX doesn't use; empty if all is well.

    A CPU that was asked for, by ``JAX_PLATFORMS``, is no mistake.
    """
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return ""
    if (devices / "nvidiactl").exists():
        kind, extra, note = "an NVIDIA GPU", "cuda13", " (or cuda12, by its driver)"
    elif any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*")):
        kind, extra, note = "a TPU", "tpu", ""
    else:
        return ""
    return (
        f"warning: this machine has {kind} and JAX uses its CPU alone; expected to train on the "
        f"accelerator: pip install 'smoa-jax[train,{extra}]'{note}, or say JAX_PLATFORMS=cpu"
    )
