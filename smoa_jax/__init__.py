"""SMoA adapters for JAX: high-rank modulation of frozen weights, as pure functions on a tree."""

from typing import Any

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.merge import merge_report, merge_smoa
from smoa_jax.adapter.modulation import modulated_matmul
from smoa_jax.adapter.planning.spectra import plan_spectra
from smoa_jax.adapter.tree import apply_smoa, combine, partition, trainable_mask

__all__ = [
    "SmoaConfig",
    "apply_smoa",
    "combine",
    "merge_report",
    "merge_smoa",
    "modulated_matmul",
    "partition",
    "plan_spectra",
    "trainable_mask",
]


def __getattr__(name: str) -> Any:
    """``__version__``, which ``pyproject.toml`` alone says."""
    if name == "__version__":
        from importlib.metadata import version

        return version("smoa-jax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
