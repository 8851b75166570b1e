"""The base of a run on its mesh, and the decoder that runs it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.planning.cache import default_cache_dir
from smoa_jax.adapter.targets import find_targets
from smoa_jax.adapter.types import Params
from smoa_jax.checkpoint.base import AbstractBase, BaseModel, abstract_base, load_base
from smoa_jax.checkpoint.names import layer_numbers
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.fused_attention import AttentionSharding, choose_attention
from smoa_jax.models.stacks import layer_stacks
from smoa_jax.sharding.mesh import BATCH_AXES, MeshConfig, check_batch, make_mesh
from smoa_jax.sharding.rules import (
    Rules,
    activation_constraint,
    check_heads,
    head_sharding,
    param_shardings,
    product_shardings,
)
from smoa_jax.storage import located
from smoa_jax.training.config import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A base on its mesh, and the decoder that runs it."""

    base: BaseModel
    model: Decoder
    mesh: Mesh


def adapter_config(config: SmoaConfig, base: AbstractBase) -> SmoaConfig:
    """A configuration that knows which of the base's layers lie in which stack."""
    return dataclasses.replace(config, layer_numbers=layer_numbers(base.config))


def resolve_dtype(name: str) -> Any:
    """``auto`` is float32 on CPU, where bf16 is slow, and bfloat16 on accelerators."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(name)


def spectra_cache(name: str) -> Path | None:
    """The directory in which spectra are kept: ``auto`` is the user's own, ``off`` none."""
    if name == "auto":
        return default_cache_dir()
    return located(name) if name not in ("", "off") else None


def load_model(config: RunConfig) -> LoadedModel:
    """Read the base of a run onto its mesh.

    Raises:
        ValueError: for a mesh, attention or adapter that does not fit the devices, the model or the
            batch.
    """
    mesh = make_mesh(config.mesh)
    part = config.train.batch_size // config.train.accumulate
    check_batch(mesh, part, "train.batch_size / train.accumulate")
    dtype = resolve_dtype(config.model.dtype)
    abstract = abstract_base(config.model.path, dtype)
    shardings = _base_shardings(abstract, mesh, config.model.sharding_rules)
    model = make_decoder(config, abstract, mesh)
    # Refused before minutes of reading weights.
    find_targets(abstract.params, adapter_config(config.adapter, abstract))
    base = load_base(config.model.path, dtype, shardings)
    return LoadedModel(base=base, model=model, mesh=mesh)


def load_generator(path: str, dtype: Any, mesh_config: MeshConfig, rules: Rules) -> LoadedModel:
    """Read a base onto a mesh, with a decoder that continues prompts.

    Raises:
        ValueError: for a mesh that does not fit the devices or the model.
    """
    mesh = make_mesh(mesh_config)
    abstract = abstract_base(path, dtype)
    shardings = _base_shardings(abstract, mesh, rules)
    model = Decoder(config=abstract.config, dtype=dtype, constrain=activation_constraint(mesh))
    return LoadedModel(base=load_base(path, dtype, shardings), model=model, mesh=mesh)


def _base_shardings(base: AbstractBase, mesh: Mesh, rules: Rules) -> Params:
    for stack in layer_stacks(base.config):
        check_heads(base.config.num_heads, stack.shape.num_kv_heads, mesh)
    return param_shardings(base.params, mesh, rules)


def make_decoder(config: RunConfig, base: AbstractBase, mesh: Mesh) -> Decoder:
    """The decoder of a run, with its remat policy, attention and activation shardings.

    Raises:
        ValueError: for an attention asked for by name that mesh or model cannot have.
    """
    dtype = resolve_dtype(config.model.compute_dtype)
    return Decoder(
        config=base.config,
        dtype=dtype,
        remat=config.model.remat,
        constrain=activation_constraint(mesh),
        products=product_shardings(base.params, mesh, config.model.sharding_rules),
        head=head_sharding(base.params, mesh, config.model.sharding_rules),
        fused=choose_attention(
            config.model.attention,
            base.config,
            dtype=dtype,
            lengths=(*config.data.buckets, config.data.max_length),
            packed=config.data.pack,
            sharding=AttentionSharding(mesh=mesh, batch=BATCH_AXES, heads=("tensor",)),
        ),
    )
