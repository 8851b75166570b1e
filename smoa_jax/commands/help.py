"""What ``--help`` says: a first page for who begins, and every option for who asks for all.

The words about an option are those beside it in the code, its docstring's; here is only which of
them come first, under which headings, and how a page is laid out. The page of ``smoa`` itself is a
text, so that it is there at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import textwrap
from collections.abc import Sequence

#: What each command does, in a line.
COMMANDS = {
    "train": "Fine-tune a model with an adapter, as options or a file say.",
    "evaluate": "Score a trained adapter: held-out loss, and answers.",
    "generate": "Continue prompts with a model, adapted or not; converse.",
    "export": "Write a trained adapter for other tools, merged or for PEFT.",
    "import": "Make an adapter of a LoRA or HiRA that PEFT wrote.",
    "inspect": "Show what an adapter touches and what it has learned.",
    "experiment": "Run methods, rates and seeds of a grid into a ledger.",
    "report": "Show what ledgers say, as Markdown and HTML.",
    "plan": "Tell what fits a slice before it is rented, and how fast.",
    "upload": "Put an adapter or an export on the Hugging Face hub.",
}

_FIRST_PAGE = """\
Fine-tunes Llama, Gemma and kindred models with high-rank adapters, in JAX.

usage: smoa COMMAND [OPTION ...]

commands:
{commands}

examples:
  smoa train --model.path MODEL --data.train_files '[rows.jsonl]' \\
      --train.output_dir runs/mine
  smoa generate --model MODEL --adapter runs/mine --prompt "Name a colour."
  smoa export --model MODEL --adapter runs/mine --output runs/mine/merged

smoa COMMAND --help lists its first options; with --help all, every one.
exit status: 0 done, 1 too large, 2 refused, 75 resume, 76 lost, 130 aborted
documentation: README.md, and configs/README.md for ready-made configurations
"""

#: Headings, in the order of a page; "" is for the options of the command itself.
HEADINGS = {
    "": "options",
    "model": "the base model",
    "data": "rows to learn from and to hold out",
    "data.hub": "a data set of the Hugging Face hub (needs the extra data)",
    "data.task": "generated rows, for data.source arithmetic or reasoning_gym",
    "train": "the run",
    "adapter": "what is trained",
    "optimizer": "the optimizer and its learning rate",
    "evaluation": "answers to held-out questions, scored",
    "mesh": "how devices share the work; -1: all that are left",
    "grid": "methods, rates and seeds to compare",
    "probe": "pairs to memorise, in the place of data",
    "scoring": "rows that runs are scored on, beside data's own",
    "distributed": "several processes, as on several hosts",
}


@dataclasses.dataclass(frozen=True)
class _Page:
    """Of one command.

    Attributes:
        usage: How it is typed, a line each.
        first: Options of the first page; none: all of them.
        useless: Regular expression for options that are read and have no effect.
        note: Beneath all of them.
    """

    usage: Sequence[str]
    first: Sequence[str] = ()
    useless: str = "$^"
    note: str = ""


_PAGES = {
    "train": _Page(
        usage=(
            "smoa train --config FILE [OPTION ...]",
            "smoa train --model.path MODEL --data.train_files '[FILE]'",
            "           --train.output_dir DIR [OPTION ...]",
        ),
        first=(
            *("config", "resume", "overwrite", "preview", "model.path"),
            *("data.train_files", "data.eval_files", "data.eval_rows"),
            *("train.output_dir", "train.epochs", "train.batch_size"),
            *("adapter.rank", "adapter.num_subspaces", "optimizer.learning_rate"),
        ),
        note="In a file, --train.steps is the key steps in the section train, and so on.",
    ),
    "evaluate": _Page(
        usage=("smoa evaluate --adapter DIR [--data.eval_files '[FILE]'] [OPTION ...]",),
        first=(
            *("config", "adapter_dir", "checkpoint", "json", "model.path"),
            *("data.eval_files", "data.eval_rows", "data.template"),
            *("evaluation.rows", "evaluation.answer", "evaluation.max_new_tokens"),
        ),
        useless=(
            r"(adapter|optimizer)\..*|evaluation\.before"
            r"|train\.(?!batch_size|accumulate|eval_batch_size|loss_chunk).*"
        ),
        note="A run's other options may be given, in its file say; they have no effect here.",
    ),
    "generate": _Page(
        usage=(
            "smoa generate --model MODEL [--adapter DIR] --prompt TEXT [OPTION ...]",
            "smoa generate --model MODEL [--adapter DIR] --prompt_file FILE",
            "smoa generate --model MODEL [--adapter DIR] --chat",
        ),
        first=(
            *("model", "adapter", "checkpoint", "prompt", "prompt_file", "chat", "system"),
            *("template", "max_new_tokens", "temperature", "top_p", "seed"),
        ),
    ),
    "export": _Page(usage=("smoa export --model MODEL --adapter DIR --output DIR [OPTION ...]",)),
    "import": _Page(usage=("smoa import --model MODEL --peft DIR --output DIR [--overwrite]",)),
    "inspect": _Page(
        usage=(
            "smoa inspect --model MODEL --adapter DIR [--compare DIR]",
            "             [--plot FILE.png] [OPTION ...]",
            "smoa inspect --model MODEL [--rank N] [--target_modules NAMES]",
            "             [OPTION ...]",
        )
    ),
    "experiment": _Page(
        usage=("smoa experiment --config GRID [OPTION ...]",),
        first=(
            *("config", "model.path", "train.output_dir", "train.steps"),
            *("grid.learning_rates", "grid.seeds", "grid.runs_at_once"),
            *("probe.pairs", "scoring.test_files"),
        ),
        note="In a file, --grid.seeds is the key seeds in the section grid, and so on.",
    ),
    "report": _Page(usage=("smoa report LEDGER [LEDGER ...] [--output DIR]",)),
    "plan": _Page(
        usage=(
            "smoa plan --config FILE --topology SLICE [OPTION ...]",
            "smoa plan --model.path MODEL --topology SLICE [--search] [--remat all]",
        ),
        first=(
            *("config", "topology", "search", "remat", "estimate", "json", "model.path"),
            *("model.remat", "train.batch_size", "train.accumulate", "data.max_length"),
        ),
        useless=(
            r"(evaluation|distributed|data\.hub|data\.task)\..*|model\.spectra_cache"
            r"|optimizer\.(?!clip_norm).*|data\.(?!max_length|pack).*"
            r"|train\.(?!batch_size|accumulate|loss_chunk).*"
        ),
        note=(
            "A run's other options may be given, in its file say; they have no effect here.\n"
            "Of the model only its config.json is read. TPUs need the extra tpu."
        ),
    ),
    "upload": _Page(usage=("smoa upload --directory DIR --name ORGANISATION/NAME [OPTION ...]",)),
}

#: What the parser knows by another name, and what of it isn't ours to word.
_HEADS = {
    **{"adapter_dir": "--adapter DIR", "print_config": "--print_config"},
    "ledgers": "LEDGER",
}
_WORDS = {"print_config": "Show the configuration that the options make, and do no more"}
#: What stands for a value, by the option's last name or else its kind.
_PLACEHOLDERS = {
    **dict.fromkeys(("adapter", "compare", "directory", "output", "output_dir", "peft"), "DIR"),
    **dict.fromkeys(("spectra_cache", "spectra_cache_dir"), "DIR"),
    **dict.fromkeys(("model", "path"), "MODEL"),
    **{"config": "FILE", "plot": "FILE.png", "checkpoint": "WHICH", "target_modules": "NAMES"},
    **dict.fromkeys(("train_files", "eval_files", "test_files"), "'[FILE]'"),
    "exclude_modules": "NAMES",
    **{"system": "TEXT", "coordinator_address": "HOST:PORT", "remat": "NAME", "layers": "LAYERS"},
}
_KINDS = {
    r"<class 'int'>|int \| None": "N",
    r"<class 'float'>|float \| None": "X",
    r"tuple\[int.*": "'[N, ...]'",
    r"tuple\[float.*": "'[X, ...]'",
    r"dict.*|.*Mapping.*": "'{KEY: VALUE}'",
}

_WIDTH, _COLUMN = 80, 30


def first_page() -> str:
    """What ``smoa --help`` prints."""
    lines = [f"  smoa {name:11s}{text}" for name, text in COMMANDS.items()]
    return _FIRST_PAGE.format(commands="\n".join(lines))


def asked_for(arguments: Sequence[str]) -> str:
    """``first`` or ``all``, the page that is asked for; empty if none is."""
    for index, word in enumerate(arguments):
        if word in ("--help_all", "--help=all"):
            return "all"
        if word in ("-h", "--help"):
            return "all" if arguments[index + 1 : index + 2] == ["all"] else "first"
    return ""


def command_page(parser: argparse.ArgumentParser, which: str) -> str:
    """The ``first`` page of a command, or ``all`` of it; the parser's prog names the command."""
    command = parser.prog.split()[-1]
    page = _PAGES[command]
    options = {action.dest: action for action in parser._actions}
    useful = options_of(parser)
    shown = page.first if page.first and which == "first" else useful
    usage = "\n       ".join(page.usage)
    blocks = [f"usage: {usage}", COMMANDS[command]]
    for section, heading in HEADINGS.items():
        entries = [_entry(options[name]) for name in shown if _section(name) == section]
        if entries:
            title = f"{section}: {heading}" if section else f"{heading}:"
            blocks.append("\n".join([title, *entries]))
    left = len(useful) - len(shown)
    blocks.append(f"{left} more options: {parser.prog} --help all" if left else page.note)
    return "\n\n".join(blocks).strip()


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a command that have an effect, by name."""
    useless = _PAGES[parser.prog.split()[-1]].useless
    names = [action.dest for action in parser._actions if _is_option(action, parser)]
    return [name for name in names if not re.fullmatch(useless, name)]


def _is_option(action: argparse.Action, parser: argparse.ArgumentParser) -> bool:
    """Not ``--help`` itself, nor ``--train FILE``, which the parser adds to ``--train.steps``."""
    start = f"{action.dest}."
    has_parts = any(other.dest.startswith(start) for other in parser._actions)
    return action.dest != "help" and not has_parts


def _section(name: str) -> str:
    """``data.task`` of ``data.task.digits``."""
    return name.rpartition(".")[0]


def _entry(action: argparse.Action) -> str:
    """An option, what it takes, what it is for and what it is unless given, in two columns."""
    choices = re.fullmatch(r"\{(.*)\}", str(action.metavar))
    words = choices.group(1).split(",") if choices else []
    text = _WORDS.get(action.dest, action.help or "").replace("``", "").strip().rstrip(".")
    value = "|".join(words) or _placeholder(action)
    if len(value) > 24 and words:
        value = "NAME"
        text += "" if all(word in text for word in words) else f": {', '.join(words)}"
    head = f"--{action.dest} {value}" if action.nargs != 0 else f"--{action.dest}"
    head = f"  {_HEADS.get(action.dest, head)}"
    body = textwrap.wrap(text + _default(action), _WIDTH - _COLUMN, break_on_hyphens=False)
    first = f"{head:{_COLUMN}}{body.pop(0)}" if len(head) < _COLUMN else head
    return "\n".join([first, *(" " * _COLUMN + line for line in body)])


def _placeholder(action: argparse.Action) -> str:
    last = action.dest.rpartition(".")[2]
    kind = str(getattr(action, "_typehint", ""))
    by_kind = [text for pattern, text in _KINDS.items() if re.fullmatch(pattern, kind)]
    if not by_kind and isinstance(action.metavar, str) and action.metavar.isalpha():
        by_kind = [action.metavar]
    return _PLACEHOLDERS.get(last) or (by_kind or [last.upper()])[0]


def _default(action: argparse.Action) -> str:
    """In brackets, where it is a number, a word or a list."""
    value = action.default
    if action.nargs == 0 or value == argparse.SUPPRESS or isinstance(value, dict):
        return ""
    if isinstance(value, bool):
        return f" [{str(value).lower()}]"
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return "" if value in (None, "") else f" [{value}]"
