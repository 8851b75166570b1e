"""A ledger as a report: tables and figures, once as Markdown and once as one page of HTML.

Both are made of the same blocks, so that they can't differ. The page needs nothing beside itself.
"""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smoa_jax.checks import require
from smoa_jax.experiments.compare import (
    RESAMPLES,
    Experiment,
    Group,
    MethodResult,
    difference,
    experiments_of,
    groups_of,
    rate_scores,
    rate_texts,
)
from smoa_jax.experiments.figures import figures_of
from smoa_jax.experiments.ledger import read_ledger


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """The first row has the titles."""

    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """As SVG for the page and PNG for a file beside the Markdown."""

    name: str
    caption: str
    svg: bytes
    png: bytes


Block = Heading | Paragraph | Table | Figure

_CAPTIONS = {
    "rates": "What each method comes to by its peak learning rate, by the seeds that chose it.",
    "scores": "Scores at the chosen rate, every seed that judges and their mean.",
    "losses": "Training loss at the chosen rate, mean over the seeds that judge.",
}
_MODULATED = {
    "spectral_blocks": "SMoA, spectral blocks",
    "aligned_blocks": "SMoA, aligned blocks",
    "spectral_bands": "SMoA, spectral bands",
    "contiguous_blocks": "contiguous blocks",
    "random_blocks": "random blocks",
    "none": "HiRA",
}
_PLAIN = {"none": "LoRA", "contiguous_blocks": "MELoRA"}


def write_report(ledgers: Sequence[str | Path], output: str | Path) -> list[Path]:
    """Write ``report.md``, its figures and ``report.html``; returns the two pages.

    Raises:
        ValueError: for a ledger that is not there, or has no run yet.
    """
    blocks: list[Block] = [Heading("Experiments", 1)]
    for number, path in enumerate(ledgers):
        rows = read_ledger(path)
        experiments = experiments_of(rows)
        require(
            bool(experiments),
            "no run",
            "a ledger of smoa experiment with runs in it",
            "give the path of ledger.jsonl, or wait for its first run",
            where=path,
        )
        for place, experiment in enumerate(experiments):
            blocks += blocks_of(experiment, f"{number + 1}-{place + 1}")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        if isinstance(block, Figure):
            (output / f"{block.name}.png").write_bytes(block.png)
    pages = [output / "report.md", output / "report.html"]
    pages[0].write_text(as_markdown(blocks), encoding="utf-8")
    pages[1].write_text(as_html(blocks), encoding="utf-8")
    return pages


# -------------------------------------------------------------------------------------- contents


def blocks_of(experiment: Experiment, name: str) -> Iterator[Block]:
    """What there is to say of one experiment."""
    yield Heading(title_of(experiment))
    yield Paragraph(circumstances(experiment))
    if experiment.base is not None:
        metrics = experiment.base["metrics"]
        yield Paragraph(
            f"The base itself scores {_percent(metrics['score'])} at a loss of "
            f"{metrics['loss']:.3f}"
            + (f"; unrelated text {metrics['text_loss']:.3f}." if "text_loss" in metrics else ".")
        )
    groups = groups_of(experiment.methods)
    for group in groups:
        yield Heading(_equal(group), 3)
        yield Table([_TITLES, *(_method_row(method, experiment) for method in group.methods)])
        yield from _notes(group.methods)
        yield Heading(f"Differences, {_equal(group, short=True)}", 3)
        yield Paragraph(
            "Row less column, in points of the score, on the same questions: mean and 95 % "
            f"interval by a paired bootstrap over seeds and questions ({RESAMPLES} resamples). "
            "Of a single seed it is over questions alone, and says nothing of other seeds."
        )
        yield Table(_differences(group.methods))
    grouped = {method.name for group in groups for method in group.methods}
    alone = [method for method in experiment.methods if method.name not in grouped]
    if alone:
        yield Heading("With no other of as many parameters or that rank", 3)
        yield Table([_TITLES, *(_method_row(method, experiment) for method in alone)])
        yield from _notes(alone)
    yield Heading("Learning rates", 3)
    yield Table(_rates(experiment.methods))
    if experiment.base is not None and "text_loss" in experiment.base["metrics"]:
        before = experiment.base["metrics"]["text_loss"]
        yield Paragraph("What unrelated text loses by each rate: the change of its loss.")
        yield Table(_texts(experiment.methods, before))
    svg, png = figures_of(experiment, "svg"), figures_of(experiment, "png")
    for kind, caption in _CAPTIONS.items():
        yield Figure(f"{name}-{kind}", caption, svg[kind], png[kind])


def title_of(experiment: Experiment) -> str:
    """The task of an experiment in words."""
    config = experiment.any_row["config"]
    probe, data = config["probe"], config["data"]
    if probe["pairs"]:
        return f"{probe['pairs']} random pairs of {probe['characters']} characters"
    if data["source"] == "arithmetic":
        return f"Generated task {data['task']['name']}, {data['task']['digits']} digits"
    files = [*data["train_files"], data["hub"]["name"]]
    return f"Rows of {Path(files[0]).parent.name or files[0]}"


def circumstances(experiment: Experiment) -> str:
    """What all runs share: base, task, steps, dtype, device, versions, commit."""
    row = experiment.any_row
    config, environment = row["config"], row["environment"]
    devices = ", ".join(f"{count} x {kind}" for kind, count in environment["devices"].items())
    train, optimizer = config["train"], config["optimizer"]
    counts = ", ".join(f"{key} {count}" for key, count in row["task"].items() if count)
    runs = sum(len(method.rows) for method in experiment.methods)
    versions = environment["versions"]
    text = f" Unrelated text: {row['text']}." if row["text"] else ""
    return (
        f"{runs} runs on {Path(config['model']['path']).name}, weights {config['model']['dtype']}: "
        f"{train['steps']} steps of {train['batch_size']} rows, AdamW, {optimizer['schedule']} "
        f"decay, {optimizer['warmup_steps']} steps of warm-up. Rows: {counts}.{text} "
        f"Device: {devices}; jax {versions.get('jax', '?')}, Python {environment['python']}; "
        f"commit {environment['commit'][:12] or 'unknown'}."
    )


_TITLES = (
    *("method", "kind", "R", "M", "rate", "seeds", "score", "loss", "last steps' loss"),
    "text loss, change",
    *("trained", "share", "ms a step", "step memory"),
)


def kind_of(row: dict[str, Any]) -> str:
    """A method by its papers' names."""
    adapter = row["config"]["adapter"]
    if adapter == "full":
        return "full fine-tuning"
    plain = adapter["modulation"] == "none"
    name = (_PLAIN if plain else _MODULATED).get(adapter["partition"])
    return name or f"{adapter['partition']}, modulation none"


def _method_row(method: MethodResult, experiment: Experiment) -> list[str]:
    row = method.judged[0]
    adapter = row["config"]["adapter"]
    full = adapter == "full"
    before = None if experiment.base is None else experiment.base["metrics"].get("text_loss")
    change = "-" if before is None else _spread(method.values("text_loss") - before, "{:+.3f}")
    seconds, at_once = method.step_seconds()
    mark = ("*" if method.judged_by_choosers else "") + ("" if method.inside else "!")
    return [
        method.name,
        kind_of(row),
        "-" if full else str(adapter["rank"]),
        "-" if full else str(adapter["num_subspaces"]),
        f"{method.rate:g}{mark}",
        str(len(method.judged)),
        _spread(100 * method.values("score"), "{:.1f}") + " %",
        _spread(method.values("loss"), "{:.3f}"),
        _spread(method.values("train_loss"), "{:.3f}"),
        change,
        f"{method.trained:,}",
        f"{row['trained_share']:.2%}",
        f"{1e3 * seconds:.1f}" + (f" ({at_once} runs)" if at_once > 1 else ""),
        f"{row['step_memory_bytes'] / 1e9:.2f} GB",
    ]


def _notes(methods: Sequence[MethodResult]) -> Iterator[Block]:
    notes = ["Plus-minus is the standard deviation over seeds."]
    if any(method.judged_by_choosers for method in methods):
        notes.append("*: the seed that chose the rate judges it too.")
    if not all(method.inside for method in methods):
        notes.append(
            "!: the best rate lies at an end of those tried, so a better one may lie beyond."
        )
    if any(method.step_seconds()[1] > 1 for method in methods):
        notes.append("Step time and memory are of so many runs side by side in one program.")
    yield Paragraph(" ".join(notes))


def _differences(methods: Sequence[MethodResult]) -> list[list[str]]:
    rows = [["", *(method.name for method in methods)]]
    for one in methods:
        cells = [one.name]
        for other in methods:
            found = None if one is other else difference(one, other)
            cells.append(
                "-"
                if found is None
                else f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
            )
        rows.append(cells)
    return rows


def _rates(methods: Sequence[MethodResult]) -> list[list[str]]:
    scores = {method.name: rate_scores(method) for method in methods}
    rates = sorted({rate for found in scores.values() for rate in found})
    rows = [["score by rate", *(f"{rate:g}" for rate in rates), "best lies"]]
    for method in methods:
        found = scores[method.name]
        cells = [_percent(found[rate]) if rate in found else "" for rate in rates]
        rows.append([method.name, *cells, "inside" if method.inside else "at an end"])
    return rows


def _texts(methods: Sequence[MethodResult], before: float) -> list[list[str]]:
    losses = {method.name: rate_texts(method) for method in methods}
    rates = sorted({rate for found in losses.values() for rate in found})
    rows = [["text loss by rate, change", *(f"{rate:g}" for rate in rates)]]
    for name, found in losses.items():
        cells = (f"{found[rate] - before:+.2f}" if rate in found else "" for rate in rates)
        rows.append([name, *cells])
    return rows


def _equal(group: Group, *, short: bool = False) -> str:
    amount = f"{group.amount:,} trained parameters" if group.equal == "parameters" else ""
    words = amount or f"rank R = {group.amount}"
    return words if short else f"At equal {group.equal}: {words}"


def _spread(values: np.ndarray, form: str) -> str:
    if not len(values):
        return "-"
    mean = form.format(values.mean())
    return (
        mean if len(values) < 2 else f"{mean} ± {form.replace('+', '').format(values.std(ddof=1))}"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


# --------------------------------------------------------------------------------- how it is laid


def as_markdown(blocks: Sequence[Block]) -> str:
    """The report as Markdown; figures are files beside it."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Paragraph):
            parts.append(block.text.replace("*:", "\\*:"))
        elif isinstance(block, Figure):
            parts.append(f"![{block.caption}]({block.name}.png)")
        else:
            titles, *rows = [[cell.replace("|", "\\|") for cell in row] for row in block.rows]
            rule = ["---", *["---:"] * (len(titles) - 1)]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in [titles, rule, *rows]))
    return "\n\n".join(parts) + "\n"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1f24; background: #fff;
       max-width: 88rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.5rem }
h3 { font-size: 1rem; margin-top: 1.6rem } p { max-width: 60rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; margin: .6rem 0 }
th, td { padding: .3rem .55rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #dfe3e8; font-variant-numeric: tabular-nums }
th { border-bottom: 2px solid #9aa4b1; white-space: normal; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; white-space: nowrap }
tbody tr:hover { background: #f4f6f9 }
figure { margin: 1.2rem 0 } figure img { width: 100%; max-width: 54rem; height: auto }
figcaption { color: #525c69; font-size: 13px }
"""


def as_html(blocks: Sequence[Block]) -> str:
    """The report as one page that needs nothing beside itself."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h{block.level}>{html.escape(block.text)}</h{block.level}>")
        elif isinstance(block, Paragraph):
            parts.append(f"<p>{html.escape(block.text)}</p>")
        elif isinstance(block, Figure):
            caption = html.escape(block.caption)
            parts.append(f"<figure>{_inline(block)}<figcaption>{caption}</figcaption></figure>")
        else:
            titles, *rows = [[html.escape(cell) for cell in row] for row in block.rows]
            head = "".join(f"<th>{cell}</th>" for cell in titles)
            body = "".join(
                f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows
            )
            parts.append(
                f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div>"
            )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Experiments</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _inline(figure: Figure) -> str:
    """A picture of its own, so that names inside it meet those of no other."""
    data = base64.b64encode(figure.svg).decode()
    return f'<img alt="{html.escape(figure.caption)}" src="data:image/svg+xml;base64,{data}">'
