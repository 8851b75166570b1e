"""An experiment: every run of a grid that its ledger lacks, a row for each as soon as it is done.

It reads top to bottom: load, make ready, score the base, train group by group, then run each
method's best rates again with other seeds. A killed experiment goes on where its ledger ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smoa_jax.adapter.targets import find_targets
from smoa_jax.adapter.tree import partition
from smoa_jax.adapter.types import Params
from smoa_jax.checkpoint.base import BaseModel, abstract_base, load_base
from smoa_jax.data.pipeline import ExamplesIndex
from smoa_jax.data.tokenizer import load_tokenizer
from smoa_jax.evaluation.scoring import answer_questions
from smoa_jax.experiments.config import ExperimentConfig
from smoa_jax.experiments.ledger import LEDGER_FILE, append_row, identity_of, read_ledger
from smoa_jax.experiments.programs import Maker, Prepared
from smoa_jax.experiments.tasks import Split, Task, build_task, plain_text
from smoa_jax.models.decoder import Decoder
from smoa_jax.sharding.mesh import MeshConfig, make_mesh
from smoa_jax.training.directory import plain
from smoa_jax.training.environment import record_environment
from smoa_jax.training.held_out import mean_loss
from smoa_jax.training.model import adapter_config, resolve_dtype
from smoa_jax.training.step import make_eval_step

#: The last steps of a run whose mean loss is its training loss.
LAST_STEPS = 16
#: Under which the untrained base stands in a ledger.
BASE = "base"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a grid."""

    method: str
    rate: float
    seed: int


def planned_runs(config: ExperimentConfig, method: str) -> list[PlannedRun]:
    """The runs that choose a method's rate, every rate of one seed before the next seed's."""
    return [
        PlannedRun(method=method, rate=rate, seed=seed)
        for seed in config.grid.seeds
        for rate in config.grid.rates_of(method)
    ]


def refined_runs(
    config: ExperimentConfig, method: str, rows: Sequence[dict[str, Any]]
) -> list[PlannedRun]:
    """The best rates of a method again, with the seeds that have not chosen them."""
    rates = ranked_rates([row for row in rows if row["method"] == method], config.grid.seeds)
    return [
        PlannedRun(method=method, rate=rate, seed=seed)
        for rate in rates[: config.grid.refine_rates]
        for seed in config.grid.refine_seeds
    ]


def ranked_rates(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[float]:
    """Rates from the best to the worst by their mean over ``seeds``: score, then lower loss."""
    found: dict[float, list[tuple[float, float]]] = {}
    for row in rows:
        if row["seed"] in seeds:
            found.setdefault(row["learning_rate"], []).append(choosing_score(row["metrics"]))
    means = {rate: tuple(np.mean(scores, axis=0).tolist()) for rate, scores in found.items()}
    return sorted(means, key=lambda rate: means[rate], reverse=True)


def choosing_score(metrics: dict[str, Any]) -> tuple[float, float]:
    """What a rate is chosen by: validation rows where there are any, else the probe's pairs."""
    prefix = "validation_" if "validation_score" in metrics else ""
    loss = metrics[f"{prefix}loss"]
    return metrics[f"{prefix}score"], -(1e9 if loss is None or not np.isfinite(loss) else loss)


def run_experiment(config: ExperimentConfig, say: Callable[[str], None] = print) -> Path:
    """Run what the ledger lacks; returns the ledger.

    Raises:
        ValueError: for methods, rows or files that don't fit, before anything is trained.
    """
    return _Experiment(config, say).run()


class _Experiment:
    def __init__(self, config: ExperimentConfig, say: Callable[[str], None]):
        self._config, self._say = config, say
        self._began = time.monotonic()
        self._failed: list[Exception] = []
        self._compiling: Iterable[Future[Prepared]] = ()
        self._ledger = Path(config.train.output_dir).expanduser() / LEDGER_FILE
        self._device = jax.devices()[0]
        self._mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), [self._device])
        self._tokenizer = load_tokenizer(abstract_base(config.model.path).source)
        self._task = functools.cache(self._build_task)
        self._text: tuple[ExamplesIndex, str] | None = None
        if config.scoring.text_rows:
            self._text = plain_text(config, self._tokenizer)
        self._task(config.grid.seeds[0])
        self._base = self._load()
        self._model = Decoder(
            config=self._base.config,
            dtype=resolve_dtype(config.model.compute_dtype),
            remat=config.model.remat,
        )
        chunk = config.train.loss_chunk
        self._eval_step = jax.jit(make_eval_step(self._model, chunk=chunk))

    def run(self) -> Path:
        grid = self._config.grid
        rows = {row["run"]: row for row in read_ledger(self._ledger)}
        runs = {name: planned_runs(self._config, name) for name in grid.methods}
        wanted = {name: self._missing(runs[name], rows) for name in runs}
        total, left = (sum(map(len, found.values())) for found in (runs, wanted))
        self._tell(f"{total} runs, {total - left} of them in {self._ledger}")
        names = [name for name in runs if wanted[name] or grid.refine_rates]
        # Before others compile: every run is scored by the same programs.
        self._score_base(rows)
        with self._prepared(names) as prepared:
            self._compiling = prepared.values()
            ready: dict[str, Prepared] = {}
            for name, future in prepared.items():
                with self._kept_going(name):
                    ready[name] = future.result()
                    self._run_all(name, ready[name], wanted[name], rows)
            self._tell("programs compiled: " + self._compile_times(ready))
            for name, method in ready.items() if grid.refine_rates else ():
                again = self._missing(refined_runs(self._config, name, self._own(rows)), rows)
                with self._kept_going(name):
                    self._run_all(name, method, again, rows)
        self._say_best(rows)
        if self._failed:
            raise self._failed[-1]
        return self._ledger

    @contextlib.contextmanager
    def _kept_going(self, name: str) -> Iterator[None]:
        """A method that the device cannot run keeps no other from it; it is told at the end."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            self._tell(f"{name} failed: {str(error).splitlines()[0][:200]}")
            self._failed.append(error)

    # ---------------------------------------------------------------------------------- before

    def _load(self) -> BaseModel:
        config = self._config
        dtype = resolve_dtype(config.model.dtype)
        abstract = abstract_base(config.model.path, dtype)
        for method in config.grid.methods.values():
            if not method.full:  # refused before minutes of reading weights
                find_targets(abstract.params, adapter_config(method.adapter, abstract))
        base = load_base(config.model.path, dtype)
        self._tell(f"loaded {config.model.path}")
        return base

    def _build_task(self, seed: int) -> Task:
        task = build_task(self._config, seed, self._tokenizer)
        counts = ", ".join(f"{name} {count}" for name, count in task.counts.items())
        self._tell(f"task of seed {seed}: {counts}")
        return task

    @contextlib.contextmanager
    def _prepared(self, names: Sequence[str]) -> Iterator[dict[str, Future[Prepared]]]:
        """Methods being made ready side by side."""
        grid = self._config.grid
        task = self._task(grid.seeds[0])
        batch = {name: value[0] for name, value in task.batches.items()}
        maker = Maker(self._config, self._base, self._model, batch)
        with ThreadPoolExecutor(grid.compile_at_once) as pool:
            try:
                yield {name: pool.submit(maker.prepare, grid.methods[name]) for name in names}
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _compile_times(self, ready: dict[str, Prepared]) -> str:
        programs = {id(one.program): one.program for one in ready.values()}
        seconds = ", ".join(f"{program.seconds:.0f}" for program in programs.values())
        return f"{len(programs)} for {len(ready)} methods in {seconds or 'no'} s"

    # --------------------------------------------------------------------------------- the runs

    def _missing(self, runs: list[PlannedRun], rows: dict[str, Any]) -> list[PlannedRun]:
        return [run for run in runs if self._identity(run) not in rows]

    def _own(self, rows: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of this experiment, in a ledger that may hold others."""
        runs = [r for name in self._config.grid.methods for r in planned_runs(self._config, name)]
        return [rows[key] for key in map(self._identity, runs) if key in rows]

    def _run_all(
        self, name: str, prepared: Prepared, runs: list[PlannedRun], rows: dict[str, Any]
    ) -> None:
        size = self._config.grid.runs_at_once
        for start in range(0, len(runs), size):
            for row in self._run_group(name, prepared, runs[start : start + size]):
                append_row(self._ledger, row)
                rows[row["run"]] = row

    def _run_group(
        self, name: str, prepared: Prepared, runs: list[PlannedRun]
    ) -> Iterator[dict[str, Any]]:
        """Train runs side by side, then score one after the other."""
        size = self._config.grid.runs_at_once
        filled = runs + runs[-1:] * (size - len(runs))
        seeds = [run.seed for run in filled]
        batches = self._batches(seeds)
        state, own, shared = prepared.start(seeds)
        rates = np.asarray([run.rate for run in filled], np.float32)
        losses = []
        jax.block_until_ready((state, own, shared))
        alone = all(future.done() for future in self._compiling)
        began = time.monotonic()
        for batch in batches:
            state, metrics = prepared.program.step(
                state, rates, np.asarray(seeds, np.uint32), own, shared, batch
            )
            losses.append(metrics["loss"])
        curves = np.asarray(jax.device_get(losses)).T
        seconds = time.monotonic() - began
        skipped = np.asarray(state["skipped"])
        for place, run in enumerate(runs):
            before = time.monotonic()
            params = prepared.params_of(state, own, shared, place)
            metrics = {
                "train_loss": float(np.mean(curves[place][-LAST_STEPS:])),
                "skipped": int(skipped[place]),
                **self._scores(params, self._task(run.seed), self._config),
            }
            self._tell(
                f"{name} rate {run.rate:g} seed {run.seed}: score {metrics['score']:.1%}, loss "
                f"{metrics['loss']:.4f}; {seconds / len(curves[0]) * 1e3:.0f} ms a step of {size} "
                f"at once, scored in {time.monotonic() - before:.1f} s"
            )
            yield self._row(name, prepared, run, metrics) | {
                "seconds": round(seconds, 3),
                "seconds_per_step": seconds / len(curves[0]),
                "runs_at_once": size,
                "while_compiling": not alone,
                "scoring_seconds": round(time.monotonic() - before, 3),
                "losses": [round(float(loss), 4) for loss in curves[place]],
            }

    def _batches(self, seeds: list[int]) -> Iterator[dict[str, np.ndarray]]:
        """Those of each step, of all runs, on a leading axis."""
        tasks = [self._task(seed).batches for seed in seeds]
        for step in range(self._config.train.steps):
            yield {name: np.stack([task[name][step] for task in tasks]) for name in tasks[0]}

    # -------------------------------------------------------------------------------- its scores

    def _scores(self, params: Params, task: Task, config: ExperimentConfig) -> dict[str, Any]:
        """Loss and score of each split, and the loss of plain text."""
        found: dict[str, Any] = {}
        for name, split in task.splits.items():
            prefix = "" if name == "test" else f"{name}_"
            right = self._right(params, split)
            found[f"{prefix}loss"] = self._loss(params, split.rows)
            found[f"{prefix}score"] = float(np.mean(right))
            if name == "test":  # for paired comparisons, question by question
                found["right"] = "".join(str(int(one)) for one in right)
        if self._text is not None:
            found["text_loss"] = self._loss(params, self._text[0])
        return found

    def _loss(self, params: Params, rows: ExamplesIndex) -> float:
        trainable, frozen = partition(params)
        config = self._config
        run = config.run_of(next(iter(config.grid.methods)), 1.0, 0)
        return mean_loss(
            run, self._mesh, rows, lambda batch: self._eval_step(trainable, frozen, batch)
        )

    def _right(self, params: Params, split: Split) -> tuple[bool, ...]:
        settings = self._config.evaluation
        rows = min(settings.rows or len(split.questions), len(split.questions))
        answers = answer_questions(
            self._model,
            params,
            split.questions,
            self._tokenizer,
            rows=rows,
            max_new_tokens=settings.max_new_tokens,
            batch_size=min(settings.batch_size, rows),
            protocol=settings.answer,
            task=settings.task,
        )
        return answers.score.right

    def _score_base(self, rows: dict[str, Any]) -> None:
        """What the base says without any training, once for a ledger."""
        run = PlannedRun(method=BASE, rate=0.0, seed=self._config.grid.seeds[0])
        if self._identity(run) in rows:
            return
        metrics = self._scores(self._base.params, self._task(run.seed), self._config)
        self._tell(f"base: score {metrics['score']:.1%}, loss {metrics['loss']:.4f}")
        row = self._row(BASE, None, run, metrics)
        append_row(self._ledger, row)
        rows[row["run"]] = row

    # ---------------------------------------------------------------------------------- its rows

    @functools.cached_property
    def _environment(self) -> dict[str, Any]:
        found = record_environment(self._mesh)
        del found["peak_memory_bytes"]  # of all runs so far, and so of none
        found["commit"] = found["commit"] or self._config.grid.commit
        return {**found, "python": platform.python_version()}

    def _settings(self, run: PlannedRun) -> dict[str, Any]:
        """All that decides a run's numbers, as plain JSON."""
        config = self._config
        first = next(iter(config.grid.methods))
        settings = plain(config.run_of(first if run.method == BASE else run.method, 1.0, run.seed))
        settings["optimizer"]["learning_rate"] = run.rate
        for section in ("mesh", "distributed"):
            del settings[section]
        for name in ("probe", "scoring"):
            settings[name] = json.loads(json.dumps(dataclasses.asdict(getattr(config, name))))
        if run.method == BASE:
            del settings["adapter"]
        elif config.grid.methods[run.method].full:
            settings["adapter"] = "full"
        return settings

    def _identity(self, run: PlannedRun) -> str:
        """Where files lie, and how many runs share a program, make no other run of it."""
        settings = self._settings(run)
        for section, names in {
            "model": ("path", "spectra_cache"),
            "train": ("output_dir",),
            "data": ("train_files", "eval_files", "prefetch"),
            "scoring": ("test_files",),
        }.items():
            for name in names:
                del settings[section][name]
        task = self._task(run.seed)
        return identity_of(
            {**settings, "base": self._base.fingerprint, "rows": task.digest, "name": run.method}
        )

    def _row(
        self, name: str, prepared: Prepared | None, run: PlannedRun, metrics: dict[str, Any]
    ) -> dict[str, Any]:
        total = sum(leaf.size for leaf in jax.tree.leaves(self._base.params))
        trained = 0 if prepared is None else prepared.trained
        return {
            "run": self._identity(run),
            "method": name,
            "learning_rate": run.rate,
            "seed": run.seed,
            "chose_rate": run.seed in self._config.grid.seeds,
            "trained_parameters": trained,
            "trained_share": trained / total,
            "steps": self._config.train.steps if prepared else 0,
            "step_memory_bytes": 0 if prepared is None else prepared.program.memory_bytes,
            "compile_seconds": 0.0 if prepared is None else round(prepared.program.seconds, 2),
            "metrics": metrics,
            "task": self._task(run.seed).counts,
            "text": "" if self._text is None else self._text[1],
            "config": self._settings(run),
            "environment": self._environment,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _say_best(self, rows: dict[str, Any]) -> None:
        """Each method's best rate, and whether it lies inside the range that was tried."""
        for name in self._config.grid.methods:
            own = [row for row in self._own(rows) if row["method"] == name]
            ranked = ranked_rates(own, self._config.grid.seeds)
            if ranked:
                ends = (min(ranked), max(ranked))
                where = "at an end" if ranked[0] in ends else "inside"
                self._tell(
                    f"{name}: best rate {ranked[0]:g}, {where} of {ends[0]:g} to {ends[1]:g}"
                )

    def _tell(self, text: str) -> None:
        self._say(f"{time.monotonic() - self._began:7.1f} s  {text}")
