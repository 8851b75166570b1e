"""The figures of a report: loss curves, rate sensitivity, score against trained parameters."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from smoa_jax.evaluation.plots import load_pyplot
from smoa_jax.experiments.compare import Experiment, rate_scores

#: A colour and a marker for each method; ten and more share colours and differ in the marker.
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
_MARKERS = "osD^vPX*"
_WINDOW = 8


def figures_of(experiment: Experiment, form: str) -> dict[str, bytes]:
    """Name -> figure in a form that matplotlib writes, ``svg`` or ``png``.

    Raises:
        ImportError: without the extra ``plot``.
    """
    draws: dict[str, Callable[[Any, Experiment], None]] = {
        "losses": _draw_losses,
        "rates": _draw_rates,
        "scores": _draw_scores,
    }
    plt = load_pyplot()
    found = {}
    with plt.rc_context({"svg.hashsalt": "smoa", "svg.fonttype": "path", "font.size": 9}):
        for name, draw in draws.items():
            figure, axes = plt.subplots(figsize=(7.4, 3.9), layout="constrained")
            draw(axes, experiment)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            stream = io.BytesIO()
            plain = {"metadata": {"Date": None}} if form == "svg" else {"dpi": 130}
            figure.savefig(stream, format=form, **plain)
            plt.close(figure)
            found[name] = stream.getvalue()
    return found


def _look(index: int) -> dict[str, Any]:
    return {
        "color": _COLORS[index % len(_COLORS)],
        "marker": _MARKERS[(index + index // len(_COLORS)) % len(_MARKERS)],
    }


def _draw_losses(axes: Any, experiment: Experiment) -> None:
    from matplotlib.ticker import LogLocator

    lowest = np.inf
    for index, method in enumerate(experiment.methods):
        curves = [np.asarray(row["losses"], float) for row in method.judged]
        mean = np.mean(curves, axis=0)
        window = min(_WINDOW, len(mean))
        smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
        steps = np.arange(window, len(mean) + 1)
        label = f"{method.name}, rate {method.rate:g}"
        axes.plot(steps, smooth, label=label, color=_look(index)["color"], lw=1.6)
        lowest = min(lowest, np.nanmin(smooth))
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, mean of {_WINDOW} steps")
    if lowest > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    _legend(axes)


def _draw_rates(axes: Any, experiment: Experiment) -> None:
    for index, method in enumerate(experiment.methods):
        scores = rate_scores(method)
        rates, values = list(scores), [100 * value for value in scores.values()]
        axes.plot(rates, values, label=method.name, ms=5, lw=1.4, **_look(index))
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("score that chose the rate, %")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _draw_scores(axes: Any, experiment: Experiment) -> None:
    """Against trained parameters; methods that train as many stand side by side."""
    amounts = [method.trained for method in experiment.methods]
    side_by_side = len(set(amounts)) == 1
    for index, method in enumerate(experiment.methods):
        place = index if side_by_side else method.trained
        scores = 100 * method.values("score")
        color = _look(index)["color"]
        axes.plot([place] * len(scores), scores, "o", ms=5, alpha=0.5, mec="none", color=color)
        mean = {"marker": "_", "ms": 18, "mew": 2, "ls": "", "color": color}
        axes.plot([place], [scores.mean()], label=method.name, **mean)
    if side_by_side:
        names = [method.name for method in experiment.methods]
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_xlabel(f"{amounts[0]:,} trained parameters each")
    else:
        axes.set_xscale("log")
        axes.set_xlabel("trained parameters")
        _legend(axes)
    axes.set_ylabel("score, %: each seed, and the mean")
    axes.set_ylim(bottom=0)


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
