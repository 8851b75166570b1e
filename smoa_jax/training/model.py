"""The base of a run on its mesh, and the decoder that runs it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from smoa_jax.checkpoint.base import AbstractBase, BaseModel, abstract_base, load_base
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.fused_attention import AttentionSharding, choose_attention
from smoa_jax.sharding.mesh import BATCH_AXES, check_batch, make_mesh
from smoa_jax.sharding.rules import activation_constraint, check_heads, param_shardings
from smoa_jax.training.config import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A base on its mesh, and the decoder that runs it."""

    base: BaseModel
    model: Decoder
    mesh: Mesh


def resolve_dtype(name: str) -> Any:
    """``auto`` is float32 on CPU, where bf16 is slow, and bfloat16 on accelerators."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(name)


def load_model(config: RunConfig) -> LoadedModel:
    """Read the base of a run onto its mesh.

    Raises:
        ValueError: for a mesh or attention that does not fit the devices, the model or the batch.
    """
    mesh = make_mesh(config.mesh)
    part = config.train.batch_size // config.train.accumulate
    check_batch(mesh, part, "train.batch_size / train.accumulate")
    dtype = resolve_dtype(config.model.dtype)
    abstract = abstract_base(config.model.path, dtype)
    check_heads(abstract.config.num_heads, abstract.config.num_kv_heads, mesh)
    shardings = param_shardings(abstract.params, mesh, config.model.sharding_rules)
    model = make_decoder(config, abstract, mesh)
    base = load_base(config.model.path, dtype, shardings)
    return LoadedModel(base=base, model=model, mesh=mesh)


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
        fused=choose_attention(
            config.model.attention,
            base.config,
            dtype=dtype,
            lengths=(*config.data.buckets, config.data.max_length),
            packed=config.data.pack,
            sharding=AttentionSharding(mesh=mesh, batch=BATCH_AXES, heads=("tensor",)),
        ),
    )
