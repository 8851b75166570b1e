"""The state of a run, fresh or restored, each array born where it belongs.

base params on their shards -> spectra -> ``apply_smoa`` (aligned blocks: relabelled) ->
``partition`` -> optimizer state by ``jit(init, out_shardings)``. Nothing is ever whole on one
device that the rules divide.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from smoa_jax.adapter.planning.spectra import Progress, Spectra, plan_spectra
from smoa_jax.adapter.tree import apply_smoa, combine, partition
from smoa_jax.adapter.types import Params, is_modulation, tensor_fields
from smoa_jax.checkpoint.native.leaves import abstract_adapter, adapter_leaves, restore_adapter
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.symmetry import shared_axes
from smoa_jax.sharding.mesh import put_batch, replicated
from smoa_jax.sharding.processes import fetch
from smoa_jax.sharding.rules import param_shardings
from smoa_jax.training.checkpoints import Restored, TrainingCheckpoints
from smoa_jax.training.config import RunConfig
from smoa_jax.training.labels import Labels, relabelled
from smoa_jax.training.model import LoadedModel, spectra_cache
from smoa_jax.training.optimizer import make_optimizer
from smoa_jax.training.step import (
    Batch,
    Metrics,
    State,
    initial_state,
    make_eval_step,
    make_train_step,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The two jitted steps of a run and the frozen params that both take; it holds no state.

    Attributes:
        mesh: On which batches are laid out.
        frozen: The frozen half of ``partition``.
        labels: Under which the state is, and is stored.
        train_step: (state, frozen, batch) -> (state, metrics); the state is donated.
        eval_step: (trainable, frozen, batch) -> (summed loss, target tokens).
    """

    mesh: Mesh
    frozen: Params
    labels: Labels
    train_step: Any
    eval_step: Any

    def take_step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        """One training step on this host's rows of a batch."""
        return self.train_step(state, self.frozen, put_batch(batch, self.mesh))

    def evaluate(self, state: State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Summed loss and target tokens of a batch on devices."""
        return self.eval_step(state["trainable"], self.frozen, batch)

    def params(self, state: State) -> Params:
        """The adapted tree of a state."""
        return combine(state["trainable"], self.frozen)

    def stored_params(self, state: State) -> Params:
        """The adapted tree of a state, its adapter in the order of files."""
        return self.labels.stored_adapter(self.params(state))

    def saved(self, state: State) -> dict[str, Any]:
        """What a checkpoint holds: the state, and the frozen leaves of the adapter."""
        return {"run": self.labels.stored(state), "adapter": self.labels.adapter_leaves}


def adapt(config: RunConfig, loaded: LoadedModel, progress: Progress | None = None) -> Params:
    """Plan the spectra and put the modulations beside their kernels, sharded like them."""
    cache = spectra_cache(config.model.spectra_cache)
    spectra: Spectra = plan_spectra(
        loaded.base.params,
        config.adapter,
        cache_dir=cache,
        progress=progress,
        shared_axes=shared_axes(loaded.base.config),
    )
    key = jax.random.key(config.train.seed)
    return apply_smoa(loaded.base.params, config.adapter, key, spectra)


def start_state(
    config: RunConfig, loaded: LoadedModel, steps: int, progress: Progress | None = None
) -> tuple[State, Programs]:
    """A fresh run: plan, adapt, and make the optimizer's state where it belongs.

    With aligned blocks the base's arrays are given up, since relabelled ones take their place.
    """
    optimizer = make_optimizer(config, steps)
    params = adapt(config, loaded, progress)
    params, labels = relabelled(params, config.adapter, loaded.base.config, optimizer)
    trainable, frozen = partition(params)
    shardings = state_shardings(trainable, optimizer, loaded.mesh)
    init = jax.jit(lambda tree: initial_state(tree, optimizer), out_shardings=shardings)
    return init(trainable), _programs(config, loaded, optimizer, shardings, frozen, labels)


def resume_state(
    config: RunConfig,
    loaded: LoadedModel,
    steps: int,
    checkpoints: TrainingCheckpoints,
    progress: Progress | None = None,
) -> tuple[State, Programs, Restored]:
    """The last checkpoint of a run, on this mesh; block ids come from it, not from a new plan.

    Raises:
        CheckpointError: if there is none, or it belongs to another adapter or base.
    """
    optimizer = make_optimizer(config, steps)
    abstract, frozen = abstract_state(config, loaded.base.params, loaded.mesh, optimizer)
    restored = checkpoints.restore(None, {"run": abstract, "adapter": adapter_leaves(frozen)})
    state = restored.state["run"]
    params = restore_adapter(
        loaded.base.params,
        config.adapter,
        adapter_leaves(state["trainable"]) | restored.state["adapter"],
        cache_dir=spectra_cache(config.model.spectra_cache),
        progress=progress,
    )
    params, labels = relabelled(params, config.adapter, loaded.base.config, optimizer)
    trainable, frozen = partition(params)
    placed = state_shardings(trainable, optimizer, loaded.mesh)
    state = labels.restored(state, trainable, placed)
    return state, _programs(config, loaded, optimizer, placed, frozen, labels), restored


def abstract_state(
    config: RunConfig, base_params: Params, mesh: Mesh, optimizer: optax.GradientTransformation
) -> tuple[State, Params]:
    """A run's state and frozen params without their values, each leaf with its place on a mesh."""
    params = abstract_adapter(base_params, config.adapter)
    trainable, frozen = partition(
        _placed(params, param_shardings(params, mesh, config.model.sharding_rules))
    )
    state = jax.eval_shape(lambda tree: initial_state(tree, optimizer), trainable)
    return _placed(state, state_shardings(trainable, optimizer, mesh)), frozen


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )


def whole_adapter(params: Params) -> Params:
    """An adapted tree whose adapter lies whole on this process's devices, as far as it is stored.

    All processes call it; with one process it is the tree itself.
    """
    if jax.process_count() == 1:
        return params

    def visit(node: Any) -> Any:
        if not is_modulation(node):
            return node
        kept = {
            name: jnp.asarray(fetch(leaf))
            for name, leaf in tensor_fields(node).items()
            if name != "bands"  # never stored
        }
        return dataclasses.replace(node, **kept)

    return jax.tree.map(visit, params, is_leaf=is_modulation)


def _programs(
    config: RunConfig,
    loaded: LoadedModel,
    optimizer: optax.GradientTransformation,
    shardings: dict[str, Any],
    frozen: Params,
    labels: Labels,
) -> Programs:
    """The two steps, jitted; the state goes in and comes out in the same shardings."""
    eval_step = make_eval_step(loaded.model, chunk=config.train.loss_chunk)
    return Programs(
        mesh=loaded.mesh,
        frozen=frozen,
        labels=labels,
        train_step=jitted_train_step(config, loaded.model, loaded.mesh, optimizer, shardings),
        eval_step=jax.jit(eval_step, out_shardings=replicated(loaded.mesh)),
    )


def jitted_train_step(
    config: RunConfig,
    model: Decoder,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    shardings: dict[str, Any],
) -> Any:
    """The step that a run compiles, and that planning compiles in its stead."""
    train_step = make_train_step(
        model,
        optimizer,
        seed=config.train.seed,
        accumulate=config.train.accumulate,
        chunk=config.train.loss_chunk,
        dropout=config.adapter.dropout > 0,
    )
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def state_shardings(
    trainable: Params, optimizer: optax.GradientTransformation, mesh: Mesh
) -> dict[str, Any]:
    """Moments lie where their factors lie; every scalar is replicated, by name."""
    factors = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    whole = replicated(mesh)
    abstract = jax.eval_shape(lambda tree: initial_state(tree, optimizer), trainable)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract["opt_state"],
        factors,
        transform_non_params=lambda _: whole,
    )
    return {"trainable": factors, "opt_state": opt_state, "step": whole, "skipped": whole}
