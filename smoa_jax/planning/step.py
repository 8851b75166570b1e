"""A run's training step on devices that aren't there: built as a run builds it, of abstract arrays.

Nothing here computes or allocates: shapes and shardings go in, a traced or compiled step comes out.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from smoa_jax.adapter.diagonal import marked_contiguous
from smoa_jax.adapter.types import Params
from smoa_jax.checkpoint.base import AbstractBase, abstract_base
from smoa_jax.checks import how_to_install, refuse, require
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.stacks import layer_stacks
from smoa_jax.planning.chips import Slice
from smoa_jax.planning.flops import count_flops
from smoa_jax.sharding.mesh import batch_sharding, check_batch, make_mesh
from smoa_jax.sharding.rules import check_heads
from smoa_jax.training.config import RunConfig
from smoa_jax.training.model import adapter_config, make_decoder
from smoa_jax.training.optimizer import make_optimizer
from smoa_jax.training.state import abstract_state, jitted_train_step
from smoa_jax.training.step import State


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractStep:
    """A training step and what goes into it, without values.

    Attributes:
        config: Of the run, its adapter and dtypes resolved.
        base: The base model.
        model: The decoder.
        mesh: On which all of it lies.
        state: Factors, moments and counters.
        frozen: The rest of the params.
        batch: A global batch of the longest rows.
        jitted: The step.
    """

    config: RunConfig
    base: AbstractBase
    model: Decoder
    mesh: Mesh
    state: State
    frozen: Params
    batch: dict[str, jax.ShapeDtypeStruct]
    jitted: Any

    @functools.cached_property
    def traced(self) -> Any:
        """The step, traced once."""
        return self.jitted.trace(self.state, self.frozen, self.batch)

    @functools.cached_property
    def flops(self) -> float:
        """Of all devices, in products; of one step."""
        return count_flops(self.traced.jaxpr)

    @functools.cached_property
    def needed_flops(self) -> float:
        """Of the frozen model alone, forward and back to its activations: what no method saves."""
        batch = self.batch

        def forward(params: Params, tokens: Any, positions: Any, segment_ids: Any) -> Any:
            return self.model.apply({"params": params}, tokens, positions, segment_ids)

        names = ("tokens", "positions", "segment_ids")
        traced = jax.make_jaxpr(forward)(self.base.params, *(batch[name] for name in names))
        return 2 * count_flops(traced)

    @property
    def tokens(self) -> int:
        """Positions of a batch."""
        return math.prod(self.batch["tokens"].shape)


def for_accelerator(config: RunConfig) -> RunConfig:
    """The run as an accelerator resolves its ``auto`` dtypes."""
    resolved = {
        name: "bfloat16" if getattr(config.model, name) == "auto" else getattr(config.model, name)
        for name in ("dtype", "compute_dtype")
    }
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **resolved))


def build_step(config: RunConfig, devices: list[Any], base: AbstractBase) -> AbstractStep:
    """The step of a run on devices, attached or only described.

    Raises:
        ValueError: for a mesh, attention or adapter that does not fit devices, model or batch.
    """
    mesh = make_mesh(config.mesh, devices)
    check_batch(
        mesh, config.train.batch_size // config.train.accumulate, "train.batch_size / accumulate"
    )
    for stack in layer_stacks(base.config):
        check_heads(base.config.num_heads, stack.shape.num_kv_heads, mesh)
    require(
        config.data.max_length <= base.config.max_positions,
        f"data.max_length={config.data.max_length} for a model of "
        f"{base.config.max_positions} positions",
        "at most as many",
        "lower it",
    )
    config = dataclasses.replace(config, adapter=adapter_config(config.adapter, base))
    model = make_decoder(config, base, mesh)
    optimizer = make_optimizer(config, max(config.train.steps, 1))
    state, frozen = abstract_state(config, base.params, mesh, optimizer)
    if config.adapter.partition == "aligned_blocks":
        # As a run relabels them.
        state, frozen = (marked_contiguous(tree, True) for tree in (state, frozen))
    shape = config.train.batch_size, config.data.max_length
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, dtype in {**dtypes, "loss_mask": jnp.float32}.items()
    }
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return AbstractStep(
        config=config,
        base=base,
        model=model,
        mesh=mesh,
        state=state,
        frozen=frozen,
        batch=batch,
        jitted=jitted_train_step(config, model, mesh, optimizer, shardings),
    )


def described_devices(where: Slice) -> list[Any]:
    """Devices to lower a step for: a TPU slice's as its compiler describes them, or host devices.

    Raises:
        ValueError: where libtpu is missing, or JAX was told of fewer host devices.
    """
    if where.chip.kind == "gpu":
        devices = jax.devices("cpu")
        require(
            len(devices) >= where.count,
            f"{len(devices)} host devices for {where.chip.name}x{where.count}",
            f"{where.count}",
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={where.count}",
        )
        return devices[: where.count]
    require(
        importlib.util.find_spec("libtpu") is not None,
        f"--topology {where.topology} without libtpu, the TPU's compiler",
        "it installed; no TPU is needed",
        how_to_install("tpu"),
    )
    # It would ask a cloud's metadata for the machine it runs on, and let no second process in.
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=where.topology)
    except Exception as error:
        refuse(
            f"--topology {where.topology}, of which libtpu says: {' '.join(str(error).split())}",
            "a slice that it knows",
            "choose another",
        )
    return list(described.devices)


def read_base(config: RunConfig) -> AbstractBase:
    """The base without its weights; a directory with nothing but a ``config.json`` will do."""
    return abstract_base(config.model.path, jnp.dtype(config.model.dtype))
