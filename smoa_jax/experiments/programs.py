"""The compiled step of a method, shared by all its runs, however many of them train at once.

What differs between runs of one method is data: the peak of the learning rate, the seed of dropout,
the batch, the factors, and where a partition is drawn at random its block ids. So the project's own
step is mapped over a leading axis of runs and compiled once for each structure of adapter; methods
that differ in block ids alone (spectral and random blocks, say) share one program too. The
base, and the bands of its spectrum, lie on the device once.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from smoa_jax.adapter.config import SmoaConfig
from smoa_jax.adapter.planning.spectra import Spectra, plan_spectra
from smoa_jax.adapter.targets import replaced
from smoa_jax.adapter.tree import apply_smoa, combine, count_trainable, find_modulations, partition
from smoa_jax.adapter.types import SMOA_KEY, Blocks, Params, is_modulation
from smoa_jax.checkpoint.base import BaseModel
from smoa_jax.evaluation.scoring import generation_params
from smoa_jax.experiments.config import ExperimentConfig, MethodConfig
from smoa_jax.models.decoder import Decoder
from smoa_jax.models.symmetry import shared_axes
from smoa_jax.training.model import adapter_config, spectra_cache
from smoa_jax.training.optimizer import make_optimizer
from smoa_jax.training.step import State, initial_state, make_train_step

#: Arrays (steps, runs, rows, positions) of the batches of several runs.
Batches: TypeAlias = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What was compiled for one structure of adapter.

    Attributes:
        begin: (trainable trees, own leaves, a list of each) -> (state, own), of several runs.
        step: (state, rates, seeds, own, shared, batch) -> (state, metrics), of several runs.
        merge: (trainable, own, shared, index) -> params of one of several runs, to be scored.
        memory_bytes: Arguments, results and temporaries of the step, as the compiler counts them.
        seconds: That compiling took.
    """

    begin: Any
    step: Any
    merge: Any
    memory_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A method that is ready to run."""

    config: ExperimentConfig
    method: MethodConfig
    maker: Maker
    program: Program
    trained: int

    def start(self, seeds: list[int]) -> tuple[State, Params, Params]:
        """State, own and shared frozen leaves of runs with these seeds, side by side."""
        made = {seed: self.maker.trees(self.method, seed) for seed in {*seeds}}
        trees = [made[seed] for seed in seeds]
        owns = [own_leaves(frozen)[0] for _, frozen in trees]
        state, own = self.program.begin([trainable for trainable, _ in trees], owns)
        return state, own, own_leaves(trees[0][1])[1]

    def params_of(self, state: State, own: Params, shared: Params, run: int) -> Params:
        """What one of several runs has come to, to be scored."""
        return self.program.merge(state["trainable"], own, shared, np.int32(run))


class Maker:
    """Makes methods ready, each in a thread of its own if the caller likes.

    Args:
        config: Of the experiment.
        base: On the device.
        model: That runs it.
        batch: One run's, of any step.
    """

    def __init__(
        self, config: ExperimentConfig, base: BaseModel, model: Decoder, batch: dict[str, Any]
    ):
        self._config, self._base, self._model = config, base, model
        self._batch = {name: np.asarray(value) for name, value in batch.items()}
        self._spectra: dict[Any, Spectra] = {}
        self._programs: dict[Any, Program] = {}
        self._inits: dict[str, Any] = {}
        self._locks: dict[Any, threading.Lock] = {}
        self._lock = threading.Lock()
        some = next(iter(config.grid.methods))
        self._run = config.run_of(some, config.grid.rates_of(some)[0], config.grid.seeds[0])
        # Its state doesn't depend on the rate.
        self.optimizer = make_optimizer(self._run, config.train.steps, 1.0)

    def prepare(self, method: MethodConfig) -> Prepared:
        """Plan, draw and compile whatever is not there yet."""
        trainable, frozen = self.trees(method, self._config.grid.seeds[0])
        trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
        if not method.full:
            trained = count_trainable(self._base.params, self.adapter_of(method))
        key = _structure((trainable, frozen))
        with self._locked(key):
            if key not in self._programs:
                self._programs[key] = self._compile(method, trainable, frozen)
        return Prepared(
            config=self._config,
            method=method,
            maker=self,
            program=self._programs[key],
            trained=trained,
        )

    def adapter_of(self, method: MethodConfig) -> SmoaConfig:
        """The method's adapter, knowing the base's layers."""
        return adapter_config(method.adapter, self._base)

    def trees(self, method: MethodConfig, seed: int) -> tuple[Params, Params]:
        """Trainable and frozen tree of a run before its first step, as ``smoa train`` has them."""
        base = self._base.params
        if method.full:
            return base, jax.tree.map(lambda _: None, base)
        adapter = self.adapter_of(method)
        spectra = self._planned(adapter)
        key = jax.random.key(seed)
        nodes = self._init_of(adapter)(base, key, spectra)
        params = base
        for name, (path, _, _) in find_modulations(_adapted(base, adapter)).items():
            params = replaced(params, (*path, SMOA_KEY), nodes[name])
        return partition(params)

    def _init_of(self, adapter: SmoaConfig) -> Any:
        """A jitted draw of an adapter's nodes; done op by op, each op would compile."""
        with self._lock:
            return self._inits.setdefault(
                repr(adapter),
                jax.jit(lambda base, key, spectra: _nodes(base, adapter, key, spectra)),
            )

    def _planned(self, adapter: SmoaConfig) -> Spectra:
        targets = (adapter.target_modules, adapter.exclude_modules, adapter.layers)
        key = repr((adapter.partition, adapter.num_subspaces, *targets))
        with self._locked(key):
            if key not in self._spectra:
                cache = spectra_cache(self._config.model.spectra_cache)
                found = plan_spectra(
                    self._base.params,
                    adapter,
                    cache_dir=cache,
                    shared_axes=shared_axes(self._base.config),
                )
                self._spectra[key] = jax.tree.map(jnp.asarray, found)
        return self._spectra[key]

    def _locked(self, key: Any) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(key, threading.Lock())

    def _compile(self, method: MethodConfig, trainable: Params, frozen: Params) -> Program:
        began = time.monotonic()
        runs = self._config.grid.runs_at_once
        own, shared = own_leaves(frozen)
        # One program each, not one for every shape that is stacked or taken apart.
        begin = jax.jit(self._begin).lower([trainable] * runs, [own] * runs)
        state, own = begin.out_info
        batch = {
            name: jax.ShapeDtypeStruct((runs, *value.shape), value.dtype)
            for name, value in self._batch.items()
        }
        rates = jax.ShapeDtypeStruct((runs,), jnp.float32)
        seeds = jax.ShapeDtypeStruct((runs,), jnp.uint32)
        dropout = method.adapter.dropout > 0 and not method.full
        step = jax.vmap(self._one_step(dropout), in_axes=(0, 0, 0, 0, None, 0))
        jitted = jax.jit(step, donate_argnums=0)
        compiled = jitted.lower(state, rates, seeds, own, shared, batch).compile()
        index = jax.ShapeDtypeStruct((), jnp.int32)
        merge = jax.jit(self._merge).lower(state["trainable"], own, shared, index)
        return Program(
            begin=begin.compile(),
            step=compiled,
            merge=merge.compile(),
            memory_bytes=_memory(compiled),
            seconds=time.monotonic() - began,
        )

    def _begin(self, trees: list[Params], owns: list[Params]) -> tuple[State, Params]:
        trainable, own = _stacked(trees), _stacked(owns)
        return jax.vmap(lambda tree: initial_state(tree, self.optimizer))(trainable), own

    def _merge(self, trainable: Params, own: Params, shared: Params, run: jax.Array) -> Params:
        one, its = jax.tree.map(lambda leaf: leaf[run], (trainable, own))
        return generation_params(self._model, combine(one, _joined(its, shared)))

    def _one_step(self, dropout: bool) -> Any:
        """The project's step, with the rate and the seed as arguments."""

        def step(state, rate, seed, own, shared, batch):
            take = make_train_step(
                self._model,
                make_optimizer(self._run, self._config.train.steps, rate),
                seed=seed,
                accumulate=self._config.train.accumulate,
                chunk=self._config.train.loss_chunk,
                dropout=dropout,
            )
            return take(state, _joined(own, shared), batch)

        return step


# --------------------------------------------------------------------------------- trees of leaves


def own_leaves(frozen: Params) -> tuple[Params, Params]:
    """Frozen leaves that each run has of its own, its block ids, and those that all share.

    Two trees of the same dicts, None where the other has a leaf.
    """

    def split(node: Any, keep_own: bool) -> Any:
        if isinstance(node, Blocks):
            ids = {"in_block", "out_block"}
            names = {f.name for f in dataclasses.fields(node) if not f.metadata.get("static")}
            gone = names - ids if keep_own else ids
            return dataclasses.replace(node, **dict.fromkeys(gone))
        return jax.tree.map(lambda _: None, node) if keep_own else node

    trees = [
        jax.tree.map(lambda node, own=own: split(node, own), frozen, is_leaf=is_modulation)
        for own in (True, False)
    ]
    return trees[0], trees[1]


def _joined(own: Params, shared: Params) -> Params:
    """The inverse of ``own_leaves``."""
    return jax.tree.map(
        lambda one, other: other if one is None else one, own, shared, is_leaf=lambda x: x is None
    )


def _nodes(base: Params, adapter: SmoaConfig, key: jax.Array, spectra: Spectra) -> Any:
    adapted = apply_smoa(base, adapter, key, spectra)
    return {name: node for name, (_, node, _) in find_modulations(adapted).items()}


def _adapted(base: Params, adapter: SmoaConfig) -> Params:
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base)
    return apply_smoa(abstract, adapter, jax.random.key(0))


def _stacked(trees: list[Params]) -> Params:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _structure(trees: Any) -> Any:
    """Equal for trees that one program serves: shapes, dtypes, and the settings of nodes."""
    leaves, treedef = jax.tree.flatten(trees)
    return treedef, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def _memory(compiled: Any) -> int:
    found = compiled.memory_analysis()
    if found is None:
        return 0
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(kept + found.temp_size_in_bytes)
