"""SMoA adapters for JAX: high-rank modulation of frozen weights, as pure functions on a tree.

The method itself (``SmoaConfig`` to ``modulated_matmul``) needs JAX and NumPy alone. Models, files
and training need the extra ``train``; their names are imported when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smoa_jax.adapter.config import SmoaConfig
    from smoa_jax.adapter.fingerprint import tree_fingerprint
    from smoa_jax.adapter.merge import merge_report, merge_smoa
    from smoa_jax.adapter.modulation import modulated_matmul
    from smoa_jax.adapter.planning.spectra import plan_spectra
    from smoa_jax.adapter.tree import (
        apply_smoa,
        combine,
        count_trainable,
        partition,
        strip_smoa,
        trainable_mask,
    )
    from smoa_jax.checkpoint.base import abstract_base, load_base
    from smoa_jax.checkpoint.export.huggingface import export_huggingface
    from smoa_jax.checkpoint.export.orbax import export_orbax
    from smoa_jax.checkpoint.native.directory import load_adapter, read_adapter, save_adapter
    from smoa_jax.checkpoint.peft.export import export_peft
    from smoa_jax.checkpoint.peft.load import import_peft
    from smoa_jax.data.config import DataConfig, HubConfig, TaskConfig
    from smoa_jax.data.tokenizer import load_tokenizer
    from smoa_jax.models.decoder import Decoder
    from smoa_jax.models.generation import GenerationConfig, generate
    from smoa_jax.sharding.mesh import MeshConfig
    from smoa_jax.sharding.processes import DistributedConfig
    from smoa_jax.training.config import (
        GenerationEvalConfig,
        ModelConfig,
        OptimizerConfig,
        RunConfig,
        TrainConfig,
    )
    from smoa_jax.training.run import run

#: Where each public name lives.
_HOMES = {
    "SmoaConfig": "adapter.config",
    "apply_smoa": "adapter.tree",
    "combine": "adapter.tree",
    "count_trainable": "adapter.tree",
    "merge_report": "adapter.merge",
    "merge_smoa": "adapter.merge",
    "modulated_matmul": "adapter.modulation",
    "partition": "adapter.tree",
    "plan_spectra": "adapter.planning.spectra",
    "strip_smoa": "adapter.tree",
    "trainable_mask": "adapter.tree",
    "tree_fingerprint": "adapter.fingerprint",
    "DataConfig": "data.config",
    "Decoder": "models.decoder",
    "DistributedConfig": "sharding.processes",
    "GenerationConfig": "models.generation",
    "GenerationEvalConfig": "training.config",
    "HubConfig": "data.config",
    "MeshConfig": "sharding.mesh",
    "ModelConfig": "training.config",
    "OptimizerConfig": "training.config",
    "RunConfig": "training.config",
    "TaskConfig": "data.config",
    "TrainConfig": "training.config",
    "abstract_base": "checkpoint.base",
    "export_huggingface": "checkpoint.export.huggingface",
    "export_orbax": "checkpoint.export.orbax",
    "export_peft": "checkpoint.peft.export",
    "generate": "models.generation",
    "import_peft": "checkpoint.peft.load",
    "load_adapter": "checkpoint.native.directory",
    "load_base": "checkpoint.base",
    "load_tokenizer": "data.tokenizer",
    "read_adapter": "checkpoint.native.directory",
    "run": "training.run",
    "save_adapter": "checkpoint.native.directory",
}

__all__ = [
    "DataConfig",
    "Decoder",
    "DistributedConfig",
    "GenerationConfig",
    "GenerationEvalConfig",
    "HubConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "SmoaConfig",
    "TaskConfig",
    "TrainConfig",
    "abstract_base",
    "apply_smoa",
    "combine",
    "count_trainable",
    "export_huggingface",
    "export_orbax",
    "export_peft",
    "generate",
    "import_peft",
    "load_adapter",
    "load_base",
    "load_tokenizer",
    "merge_report",
    "merge_smoa",
    "modulated_matmul",
    "partition",
    "plan_spectra",
    "read_adapter",
    "run",
    "save_adapter",
    "strip_smoa",
    "trainable_mask",
    "tree_fingerprint",
]


def __getattr__(name: str) -> Any:
    """A public name, from its home; or ``__version__``, which ``pyproject.toml`` alone says."""
    if name == "__version__":
        from importlib.metadata import version

        return version("smoa-jax")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"smoa_jax.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("smoa_jax"):
            raise
        from smoa_jax import checks

        raise ModuleNotFoundError(
            f"got no module {error.name}, which smoa_jax.{name} needs; expected the extra 'train'; "
            f"{checks.how_to_install('train')}",
            name=error.name,
        ) from error


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
