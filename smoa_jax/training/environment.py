"""What a run computes on: said before it begins, and kept with what came of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from smoa_jax.checks import how_to_install
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.fused_attention import SplashAttention
from smoa_jax.sharding.memory import bytes_per_device
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


def record_environment(mesh: Mesh) -> dict[str, Any]:
    """What a run was made with, as plain JSON: devices, mesh, versions, commit, peak memory."""
    return {
        "devices": device_kinds(mesh),
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "versions": versions(),
        "commit": commit(),
        "peak_memory_bytes": peak_memory(mesh),
    }


def peak_memory(mesh: Mesh) -> dict[str, int]:
    """The most bytes in use so far: on the fullest device of a mesh, and of this process.

    CPUs keep no count of their own, and Windows none of the process: what is unknown is left out.
    """
    used = [device.memory_stats() or {} for device in mesh.local_devices]
    peaks = [stats["peak_bytes_in_use"] for stats in used if "peak_bytes_in_use" in stats]
    found = {"device": max(peaks)} if peaks else {}
    with contextlib.suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
        found["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found


def commit(directory: Path = Path(__file__).parent) -> str:
    """The git commit of a checkout, with ``+`` behind it where files differ; empty outside one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(directory), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Installed into an environment inside somebody else's checkout, it is not of that one.
        if not git("ls-files", "--", "."):
            return ""
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def describe_environment(loaded: LoadedModel) -> str:
    """One line on devices, mesh, dtypes, attention and JAX."""
    kinds = ", ".join(f"{count} x {kind}" for kind, count in device_kinds(loaded.mesh).items())
    mesh = " x ".join(f"{name} {size}" for name, size in loaded.mesh.shape.items())
    weights = jax.tree.leaves(loaded.base.params)[0].dtype
    size = bytes_per_device(loaded.base.params) / 1e9
    activations = jnp.dtype(loaded.model.dtype)
    return (
        f"device: {kinds}; mesh {mesh}; weights {weights}, {size:.2f} GB a device; activations "
        f"{activations}; attention {attention_name(loaded.model)}; jax {jax.__version__}"
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
        f"accelerator: {how_to_install('train', extra)}{note}, or say JAX_PLATFORMS=cpu"
    )
