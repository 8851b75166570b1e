"""The data's configuration; ``build.py`` makes batches and questions of it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

from smoa_jax.checks import require, require_one_of
from smoa_jax.data.arithmetic import ArithmeticTask
from smoa_jax.data.rows import OnBadRow
from smoa_jax.data.sources import ROW_FIELDS
from smoa_jax.data.templates import TemplateName

Source: TypeAlias = Literal["auto", "files", "hub", "arithmetic", "reasoning_gym"]
#: ``auto`` is settled once the rows are known.
TemplateChoice: TypeAlias = Literal["auto", TemplateName]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A generated task, for the sources ``arithmetic`` and ``reasoning_gym``.

    Attributes:
        name: Arithmetic: sum, difference, parity, size, compare, reverse, weave, swap, ends,
            larger, columns or successor; reasoning_gym: what the library calls it.
        digits: Arithmetic: digits of the numbers.
        terms: Arithmetic: how many numbers a question holds.
        options: reasoning_gym: the task's own settings.
        train_rows: Training rows to generate.
        eval_rows: Held-out rows to generate; their questions do not occur in training.
        seed: Of the questions.
    """

    name: str = "parity"
    digits: int = 2
    terms: int = 4
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    train_rows: int = 4000
    eval_rows: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.train_rows >= 1, f"train_rows={self.train_rows}", "at least 1", "raise it")
        for name in ("eval_rows", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"data.task.{name}={value}", "0 or more", "correct it")

    def arithmetic(self) -> ArithmeticTask:
        """What the source ``arithmetic`` generates."""
        return ArithmeticTask(name=self.name, digits=self.digits, terms=self.terms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubConfig:
    """A data set of the Hugging Face hub, read by ``datasets`` (extra ``data``).

    Attributes:
        name: Such as ``tatsu-lab/alpaca``, or a local directory in the hub's layout.
        subset: One of its configurations; empty: its only one.
        train_split: Split to train on; ``train[:1000]`` and the like take a part.
        eval_split: Held-out split; empty: rows are taken out of ``train_split``.
        revision: Branch, tag or commit; empty: the newest.
    """

    name: str = ""
    subset: str = ""
    train_split: str = "train"
    eval_split: str = ""
    revision: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they become batches.

    Attributes:
        source: ``files``, ``hub``, or a generator: ``arithmetic`` or ``reasoning_gym``; ``auto``:
            files or hub, whichever is named, and never a generated task.
        train_files: JSON, JSON Lines or Parquet files.
        eval_files: Held-out files; empty: rows of the training rows.
        hub: A data set of the Hugging Face hub in place of files.
        columns: What the rows call the fields that this project knows, as in ``{instruction:
            question, output: answer}``; others are called as they are.
        train_limit: Use at most this many training rows; 0: all.
        eval_limit: Use at most this many held-out rows of a file or split; 0: all.
        eval_rows: Training rows to hold out instead.
        eval_fraction: The same as a share of the rows; set one of the two.
        on_bad_row: ``error`` stops at a row without the expected fields; ``skip`` counts it.
        task: What to generate.
        template: ``alpaca``, ``chat`` or ``plain``; ``auto``: the tokenizer's chat template for
            conversations, plain for texts and prompts with completions, alpaca for instructions.
        max_length: Tokens of a row: BOS, prompt, response and EOS together. Responses are cut
            there, and rows dropped whose prompt leaves no room for one; texts go on in another row.
        response_only: Train on responses alone.
        pack: Let short examples share rows, without seeing each other.
        stream: Read rows when they come up instead of all at the start, for more than memory holds:
            JSON Lines files or a data set of the hub, packed. Takes ``train.steps``, and held-out
            rows of their own.
        buckets: Row lengths below ``max_length`` for shorter examples; each compiles once.
        seed: Of the batch order and of the held-out choice.
        prefetch: Batches to make ahead in the background.
    """

    source: Source = "auto"
    train_files: tuple[str, ...] = ()
    eval_files: tuple[str, ...] = ()
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    train_limit: int = 0
    eval_limit: int = 0
    eval_rows: int = 0
    eval_fraction: float = 0.0
    on_bad_row: OnBadRow = "error"
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    template: TemplateChoice = "auto"
    max_length: int = 256
    response_only: bool = True
    pack: bool = False
    stream: bool = False
    buckets: tuple[int, ...] = ()
    seed: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        _check(self)

    @property
    def origin(self) -> Source:
        """The source; what ``auto`` means is said by what is named, and is files if nothing is."""
        if self.source != "auto":
            return self.source
        return "hub" if self.hub.name else "files"

    @property
    def holds_out(self) -> bool:
        """Whether held-out rows are named, rather than taken out of the training rows."""
        return bool(self.eval_files or self.hub.eval_split)

    def row_settings(self) -> dict[str, Any]:
        """What decides, beside the files' content, about the rows and their layout; by name."""
        settings = dataclasses.asdict(self)
        sections = {name: settings.pop(name) for name in ("task", "hub")}
        for name in ("train_files", "eval_files", "prefetch"):
            del settings[name]
        for name in ("columns", "stream"):  # which earlier versions did not know
            if not settings[name]:
                del settings[name]
        section = {"hub": "hub", "files": ""}.get(self.origin, "task")
        of_section = sections.get(section, {})
        return settings | {f"{section}.{name}": value for name, value in of_section.items()}


def _check(config: DataConfig) -> None:
    """Refuses settings that are out of range or contradict each other."""
    for name, words in (
        ("source", Source),
        ("on_bad_row", OnBadRow),
        ("template", TemplateChoice),
    ):
        require_one_of(words, getattr(config, name), f"data.{name}=")
    for name, least in (
        *((name, 0) for name in ("train_limit", "eval_limit", "eval_rows", "seed", "prefetch")),
        ("max_length", 2),
    ):
        value = getattr(config, name)
        require(value >= least, f"data.{name}={value}", f"{least} or more", "raise it")
    fraction = config.eval_fraction
    require(0 <= fraction < 1, f"data.eval_fraction={fraction}", "0 to below 1", "correct it")
    require(
        not (config.eval_rows and fraction),
        "data.eval_rows and data.eval_fraction",
        "one of them",
        "set the other to 0",
    )
    require(
        not (config.holds_out and (config.eval_rows or fraction)),
        "held-out files or a split with data.eval_rows or data.eval_fraction",
        "either of them or a share of the training rows",
        "use eval_limit to shorten eval_files",
    )
    files, hub = bool(config.train_files or config.eval_files), bool(config.hub.name)
    require(
        not (files and hub),
        "data files and data.hub.name",
        "one of them",
        "leave data.train_files and data.eval_files, or data.hub out",
    )
    require(
        not files or config.origin == "files",
        f"data files with data.source={config.source}",
        "files, a data set of the hub, or a generated task",
        "leave data.source or the files out",
    )
    require(
        hub == (config.origin == "hub"),
        f"data.source={config.source} with data.hub.name={config.hub.name!r}",
        "hub and a name, or neither",
        "give both, or leave data.source out",
    )
    require(
        not config.stream or config.origin in ("files", "hub"),
        f"data.stream=true with data.source={config.source}",
        "files or a data set of the hub",
        "a generated task needs no streaming",
    )
    require(
        not config.stream or not (config.eval_rows or fraction or config.buckets),
        "data.stream=true with data.eval_rows, data.eval_fraction or data.buckets",
        "held-out rows of their own, and rows of one length, packed",
        "name data.eval_files or data.hub.eval_split, and leave the others out",
    )
    unknown = sorted(config.columns.keys() - set(ROW_FIELDS))
    require(
        not unknown,
        f"data.columns with {', '.join(unknown)}",
        f"fields of a row: {', '.join(ROW_FIELDS)}",
        "write field: column",
    )
    if config.source == "arithmetic":
        config.task.arithmetic()
