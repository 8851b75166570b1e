"""What a ledger says: each method at the rate that was chosen for it, and their differences.

A rate is chosen by the seeds that tried them all, on validation rows. Where nothing can be held
out, as with the capacity probe, those seeds don't judge the method too if there are others.
Methods are compared at equal trained parameters or at equal rank, never across both.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from smoa_jax.experiments.runner import BASE, choosing_score, ranked_rates

Row = dict[str, Any]
#: Resamples behind an interval, and what it leaves out on each side.
RESAMPLES, TAIL = 20000, 2.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One method of an experiment.

    Attributes:
        name: As the grid calls it.
        rows: All its runs.
        rate: That was chosen.
        judged: Runs at that rate which the method is judged by.
        inside: Whether lower and higher rates were tried too.
    """

    name: str
    rows: Sequence[Row]
    rate: float
    judged: Sequence[Row]
    inside: bool

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return self.rows[0]["trained_parameters"]

    @property
    def rank(self) -> int | None:
        """R; None without an adapter."""
        adapter = self.rows[0]["config"]["adapter"]
        return None if adapter == "full" else adapter["rank"]

    @property
    def judged_by_choosers(self) -> bool:
        """Whether the runs that chose the rate judge the method, on the same rows."""
        return any(
            row["chose_rate"] and "validation_score" not in row["metrics"] for row in self.judged
        )

    def values(self, name: str) -> np.ndarray:
        """A metric of the runs that judge the method; NaN where it was not finite."""
        found = [row["metrics"].get(name) for row in self.judged]
        return np.asarray([np.nan if value is None else value for value in found], float)

    def step_seconds(self) -> tuple[float, int]:
        """Median seconds a step, undisturbed if there are such, and of how many runs at once."""
        calm = [row for row in self.rows if not row.get("while_compiling")] or list(self.rows)
        return float(np.median([row["seconds_per_step"] for row in calm])), calm[0]["runs_at_once"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Runs that differ in method, rate and seed alone."""

    base: Row | None
    methods: Sequence[MethodResult]

    @property
    def any_row(self) -> Row:
        """For what all runs share."""
        return self.methods[0].rows[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Methods that may be compared: ``equal`` says in what."""

    equal: Literal["parameters", "rank"]
    amount: int
    methods: Sequence[MethodResult]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean score of one method less another's on the same questions, with its interval."""

    mean: float
    low: float
    high: float
    seeds: int


def experiments_of(rows: Sequence[Row]) -> list[Experiment]:
    """The experiments of a ledger, in the order in which they began."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_shared(row), []).append(row)
    experiments = []
    for members in found.values():
        names = list(dict.fromkeys(row["method"] for row in members if row["method"] != BASE))
        methods = [_result(name, [r for r in members if r["method"] == name]) for name in names]
        base = next((row for row in members if row["method"] == BASE), None)
        if methods:
            experiments.append(Experiment(base=base, methods=methods))
    return experiments


def _shared(row: Row) -> str:
    """All settings but those that a grid varies."""
    config = json.loads(json.dumps(row["config"]))
    config.pop("adapter", None)
    config["model"].pop("spectra_cache", None)
    for section, name in (("train", "seed"), ("train", "output_dir"), ("data", "seed")):
        config[section].pop(name, None)
    config["optimizer"].pop("learning_rate", None)
    return json.dumps(config, sort_keys=True)


def _result(name: str, rows: list[Row]) -> MethodResult:
    choosers = {row["seed"] for row in rows if row["chose_rate"]} or {rows[0]["seed"]}
    ranked = ranked_rates(rows, sorted(choosers)) or [rows[0]["learning_rate"]]
    rate = ranked[0]
    judged = [row for row in rows if row["learning_rate"] == rate]
    others = [row for row in judged if not row["chose_rate"]]
    if others and not any("validation_score" in row["metrics"] for row in judged):
        judged = others
    inside = min(ranked) < rate < max(ranked)
    return MethodResult(name=name, rows=rows, rate=rate, judged=judged, inside=inside)


def groups_of(methods: Sequence[MethodResult]) -> list[Group]:
    """Methods by equal parameters, then by equal rank where that is not the same; two at least."""
    groups: list[Group] = []
    measures: dict[Literal["parameters", "rank"], list[int | None]] = {
        "parameters": [method.trained for method in methods],
        "rank": [method.rank for method in methods],
    }
    for equal, amounts in measures.items():
        for amount in dict.fromkeys(amounts):
            members = [m for m, one in zip(methods, amounts, strict=True) if one == amount]
            same = len({method.trained for method in members}) == 1
            if amount is None or len(members) < 2 or (equal == "rank" and same):
                continue
            groups.append(Group(equal=equal, amount=amount, methods=members))
    return groups


def rate_scores(method: MethodResult) -> dict[float, float]:
    """Mean score that chose the rate, by rate, ascending."""
    return _by_rate(method, lambda metrics: choosing_score(metrics)[0])


def rate_texts(method: MethodResult) -> dict[float, float]:
    """Mean loss of unrelated text after those runs, by rate; {} if it wasn't measured."""
    if any("text_loss" not in row["metrics"] for row in method.rows):
        return {}
    return _by_rate(method, lambda metrics: metrics["text_loss"])


def _by_rate(
    method: MethodResult, value: Callable[[dict[str, Any]], float | None]
) -> dict[float, float]:
    found: dict[float, list[float]] = {}
    for row in method.rows:
        if row["chose_rate"]:
            one = value(row["metrics"])
            found.setdefault(row["learning_rate"], []).append(np.nan if one is None else one)
    return {rate: float(np.mean(found[rate])) for rate in sorted(found)}


def difference(one: MethodResult, other: MethodResult, seed: int = 0) -> Difference | None:
    """Paired by seed and question; None where no seed judged both.

    The interval is a bootstrap's: seeds are drawn again, and of each drawn seed its questions, so
    it speaks of other seeds and other questions as far as there are several of each.
    """
    pairs = []
    by_seed = {row["seed"]: row["metrics"]["right"] for row in other.judged}
    for row in one.judged:
        if row["seed"] in by_seed:
            mine, theirs = (
                np.frombuffer(text.encode(), np.uint8).astype(float) - ord("0")
                for text in (row["metrics"]["right"], by_seed[row["seed"]])
            )
            pairs.append(mine - theirs)
    if not pairs:
        return None
    gaps = np.stack(pairs)
    rng = np.random.default_rng(seed)
    count, questions = gaps.shape
    # A gap is -1, 0 or 1, so questions drawn again are no more than how often each is drawn.
    shares = np.stack([(gaps == value).mean(axis=1) for value in (-1, 0, 1)], axis=1)
    drawn = rng.multinomial(questions, shares[rng.integers(count, size=(RESAMPLES, count))])
    means = ((drawn[..., 2] - drawn[..., 0]) / questions).mean(axis=1)
    low, high = np.percentile(means, [TAIL, 100 - TAIL])
    return Difference(mean=float(gaps.mean()), low=float(low), high=float(high), seeds=count)
