"""Write ``docs/reference/``: what docstrings, dataclasses and parsers already say, as pages.

    python scripts/reference.py

Nothing of these pages is written by hand: a field's meaning stands in its class's docstring, a
command's options in its parser, a file's format in the docstring of the module that writes it. The
pages lie in the repository, so that they can be read there; ``make docs`` writes them afresh, and a
test fails where they are not what the code says.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import smoa_jax
from smoa_jax import cli
from smoa_jax.commands.help import COMMANDS
from smoa_jax.experiments.config import ExperimentConfig, MethodConfig
from smoa_jax.training.config import RunConfig

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "reference"

_SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example", "Yields")
_MADE = "<!-- Written by scripts/reference.py from the code; change the code, then `make docs`. -->"


def pages() -> dict[str, str]:
    """Every page of the reference by its file name."""
    return {
        "configuration.md": configuration(),
        "commands.md": commands(),
        "api.md": api(),
        "files.md": files(),
    }


# ------------------------------------------------------------------------------------ docstrings


@dataclasses.dataclass(frozen=True)
class Docstring:
    """A docstring of Google's form: text, then sections, of which some are lists of names."""

    text: str
    sections: Mapping[str, str]

    def entries(self, section: str) -> dict[str, str]:
        """``name: text`` of a section, in order."""
        found: dict[str, str] = {}
        name = ""
        for line in self.sections.get(section, "").splitlines():
            entry = re.match(r"(\w+): (.*)", line)
            if entry:
                name = entry[1]
                found[name] = entry[2]
            elif name and line.strip():
                found[name] += f" {line.strip()}"
        return found


def parse_docstring(text: str | None) -> Docstring:
    """The parts of a docstring."""
    sections: dict[str, list[str]] = {}
    kept: list[str] = []
    lines = kept
    for line in inspect.cleandoc(text or "").splitlines():
        heading = line.rstrip(":")
        if heading in _SECTIONS and line.endswith(":"):
            lines = sections.setdefault(heading, [])
        else:
            lines.append(line)
    return Docstring(
        text="\n".join(kept).strip(),
        sections={
            name: textwrap.dedent("\n".join(lines)).strip("\n") for name, lines in sections.items()
        },
    )


def markdown(text: str) -> str:
    """Docstring text as Markdown: one kind of backtick, fenced code, Markdown's own tables."""
    text = re.sub(r"``(.+?)``", r"`\1`", text.replace("::\n", ":\n"))
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        if lines and all(line.startswith("    ") for line in lines):
            blocks.append(f"```text\n{textwrap.dedent(block)}\n```")
        elif lines and all(line.startswith((">>>", "...")) for line in lines):
            code = "\n".join(line[4:] for line in lines)
            blocks.append(f"```python\n{code}\n```")
        elif re.match(r"=+( =+)+$", lines[0] if lines else ""):
            blocks.append(_table_of_rst(lines))
        elif lines and any(line.startswith("- ") for line in lines):
            blocks.append(_with_lists_apart(lines))
        else:
            blocks.append(block)
    joined = "\n\n".join(blocks).replace("\n```\n\n```text\n", "\n\n")
    return joined.strip()


def _with_lists_apart(lines: Sequence[str]) -> str:
    """Markdown wants an empty line before a list."""
    first = next(index for index, line in enumerate(lines) if line.startswith("- "))
    parts = ["\n".join(lines[:first]), "\n".join(lines[first:])]
    return "\n\n".join(part for part in parts if part)


def _table_of_rst(lines: Sequence[str]) -> str:
    """A simple table of reStructuredText: columns under rows of equals signs."""
    spans = [found.span() for found in re.finditer(r"=+", lines[0])]
    spans[-1] = (spans[-1][0], 200)
    rows = [
        [line[start:end].strip() for start, end in spans]
        for line in lines
        if not line.startswith("=")
    ]
    return table(rows[0], rows[1:])


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell for cell in line)} |" for line in lines)


def cell(text: str) -> str:
    """Text as it may stand in a table."""
    return markdown(text).replace("|", "\\|").replace("\n", " ")


# --------------------------------------------------------------------------------- configuration


def configuration() -> str:
    """Every field of a run's configuration, section by section."""
    parts = [
        "# Configuration",
        _MADE,
        "A configuration is one YAML file of these sections. Every field can be given on the "
        "command line too, as `--section.field VALUE`, where it overrides the file. "
        "`model.path` and `train.output_dir` alone have no default.",
    ]
    of_runs = get_type_hints(RunConfig)
    for name, kind in of_runs.items():
        parts += _section(name, kind)
    parts += [
        "## Of an experiment",
        "`smoa experiment` takes the sections model, train, data, optimizer and evaluation of a "
        "run, whose seeds, adapter and learning rate are the grid's, and these.",
    ]
    for name, kind in get_type_hints(ExperimentConfig).items():
        if name not in of_runs:
            parts += _section(name, kind)
    # An adapter's fields are those of the section of that name above.
    parts += list(_section("grid.methods.NAME", MethodConfig))[:3]
    return "\n\n".join(parts) + "\n"


def _section(name: str, kind: Any) -> Iterator[str]:
    docstring = parse_docstring(kind.__doc__)
    meanings = docstring.entries("Args") | docstring.entries("Attributes")
    yield f"## {name}"
    yield markdown(docstring.text)
    inner, rows = [], []
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, path = hints[field.name], f"{name}.{field.name}"
        if dataclasses.is_dataclass(hint):
            inner.append((path, hint))
            continue
        if field.name not in meanings:
            raise ValueError(f"got {path} without a word in the docstring of {kind.__name__}")
        rows.append((f"`{path}`", type_name(hint), _default(field), cell(meanings[field.name])))
    yield table(("field", "takes", "default", "meaning"), rows)
    for path, hint in inner:
        yield from _section(path, hint)


def type_name(hint: Any) -> str:
    """A type in words."""
    plain = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
    if hint in plain:
        return plain[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in arguments)
    if origin in (Union, UnionType):
        words = [type_name(part) for part in arguments if part is not type(None)]
        return " or ".join(words + ["null"] * (type(None) in arguments))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"map of {type_name(arguments[0])} to {type_name(arguments[1])}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"list of {type_name(arguments[0])}s"
    return "anything" if hint is Any else getattr(hint, "__name__", str(hint))


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value: Any = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "required"
    else:
        value = field.default
    return shown(value)


def shown(value: Any) -> str:
    """A value as YAML would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, Mapping):
        return "`{}`" if not value else "the decoder's own"
    return f"`{value}`" if value != "" else "empty"


# -------------------------------------------------------------------------------------- commands


def commands() -> str:
    """Every command with its options."""
    overview = textwrap.dedent((cli.__doc__ or "").split("\n\n")[1])
    parts = [
        "# Commands",
        _MADE,
        f"```text\n{overview}\n```",
        "Bad input is one line on standard error and exit status 2. `--help` after a command lists "
        "its options.",
    ]
    for command in COMMANDS:
        parts += _command(command, cli.command_parser(command))
    return "\n\n".join(parts) + "\n"


def _command(command: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## smoa {command}"
    yield COMMANDS[command]
    takes_run = command in ("train", "evaluate", "experiment")
    rows = []
    for action in parser._actions:
        if action.dest == "help" or action.default == argparse.SUPPRESS:
            continue
        if takes_run and "." in action.dest:
            continue
        rows.append(_option(action))
    yield table(("option", "takes", "default", "meaning"), rows)
    if takes_run:
        yield (
            "And every field of the [configuration](configuration.md), as `--section.field VALUE`; "
            "`--print_config` prints the configuration that comes of it and stops."
        )


def _option(action: argparse.Action) -> tuple[str, str, str, str]:
    # What evaluate's --adapter was called before is what the parser knows it by.
    name = (action.option_strings or [str(action.metavar)])[0]
    option = f"`{name.replace('--adapter_dir', '--adapter')}`"
    hint = getattr(action, "_typehint", None)
    kind = hint if hint is not None else action.type
    if action.nargs == 0:
        return option, "", "off", cell(action.help or "")
    takes = type_name(kind) if kind is not None else "text"
    default = "required" if action.required else ""
    if not action.required and action.default not in (None, "", []):
        default = shown(action.default)
    return option, takes, default, cell(action.help or "")


# ------------------------------------------------------------------------------------------- API

_METHOD = (
    "SmoaConfig",
    "plan_spectra",
    "apply_smoa",
    "trainable_mask",
    "partition",
    "combine",
    "count_trainable",
    "merge_smoa",
    "merge_report",
    "strip_smoa",
    "modulated_matmul",
    "tree_fingerprint",
)
_WITH = {
    "The method": (
        "adapter.placement.MatmulSharding",
        "adapter.merge.MergeLoss",
        "adapter.types.LowRank",
        "adapter.types.Blocks",
        "adapter.types.Bands",
    ),
    "Models, files and training": (
        "checkpoint.base.AbstractBase",
        "checkpoint.base.BaseModel",
        "checkpoint.native.directory.AdapterDescription",
        "training.run.Summary",
    ),
}


def api() -> str:
    """Every public name with its docstring, and the types that they take and give."""
    rest = [name for name in smoa_jax.__all__ if name not in _METHOD]
    parts = [
        "# Python API",
        _MADE,
        "`import smoa_jax` gives all of these names. Those of the method need JAX and NumPy alone; "
        "the others need the extra `train`, and are imported when they are first asked for.",
    ]
    for title, names in (("The method", _METHOD), ("Models, files and training", rest)):
        parts.append(f"## {title}")
        for name in names:
            parts += _described(f"smoa_jax.{smoa_jax._HOMES[name]}", name, f"smoa_jax.{name}")
        for path in _WITH[title]:
            module, _, name = f"smoa_jax.{path}".rpartition(".")
            parts += _described(module, name, f"{module}.{name}")
    return "\n\n".join(parts) + "\n"


def _described(module: str, name: str, shown_as: str) -> Iterator[str]:
    source = inspect.getsource(importlib.import_module(module))
    node = next(
        found
        for found in ast.parse(source).body
        if isinstance(found, ast.FunctionDef | ast.ClassDef) and found.name == name
    )
    yield f"### {name}"
    if isinstance(node, ast.FunctionDef):
        yield f"```python\n{_signature(shown_as, node)}\n```"
        yield from _doc(ast.get_docstring(node))
        return
    yield f"```python\n{_class(shown_as, node, source.splitlines())}\n```"
    yield from _doc(ast.get_docstring(node))
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or method.name.startswith("_"):
            continue
        if not ast.get_docstring(method) or method.name == "setup":
            continue
        decorators = {ast.unparse(found) for found in method.decorator_list}
        is_property = "property" in decorators
        yield f"#### {name}.{method.name}{' (property)' * is_property}"
        if not is_property:
            yield f"```python\n{_signature(f'{name}.{method.name}', method)}\n```"
        yield from _doc(ast.get_docstring(method))


def _signature(name: str, node: ast.FunctionDef) -> str:
    arguments = [word for word in _arguments(node.args) if word not in ("self", "cls")]
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) <= 88:
        return line
    inner = "".join(f"    {word},\n" for word in arguments)
    return f"{name}(\n{inner}){result}"


def _arguments(arguments: ast.arguments) -> list[str]:
    """Each argument of a function as it is written."""
    words = []
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    words += [_argument(*pair) for pair in zip(plain, defaults, strict=True)]
    if arguments.vararg:
        words.append(f"*{_argument(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        words.append("*")
    words += [
        _argument(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        words.append(f"**{_argument(arguments.kwarg, None)}")
    return words


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    if argument.arg in ("self", "cls"):
        return argument.arg
    return f"{argument.arg}{kind}" + (f" = {ast.unparse(default)}" if default else "")


def _class(name: str, node: ast.ClassDef, source: Sequence[str]) -> str:
    """A class with its fields, as they are written, with the comments behind them."""
    fields = []
    for found in node.body:
        if isinstance(found, ast.AnnAssign) and not ast.unparse(found.target).startswith("_"):
            fields += source[found.lineno - 1 : found.end_lineno]
    bases = ", ".join(map(ast.unparse, node.bases))
    head = f"class {name}({bases})" if bases else f"class {name}"
    if not fields:
        return head
    return "\n".join([f"{head}:", *fields]).replace("dataclasses.field(", "field(")


def _doc(text: str | None) -> Iterator[str]:
    docstring = parse_docstring(text)
    if docstring.text:
        yield markdown(docstring.text)
    for section, body in docstring.sections.items():
        if section == "Example":
            code = textwrap.dedent(body).strip()
            yield f"```python\n{code}\n```"
            continue
        entries = docstring.entries(section)
        yield f"**{section}**"
        if not entries or section in ("Returns", "Yields"):
            yield markdown(body)
            continue
        yield "\n".join(f"- `{name}`: {cell_free(words)}" for name, words in entries.items())


def cell_free(text: str) -> str:
    """An entry's text, on one line."""
    return " ".join(markdown(text).split())


# ----------------------------------------------------------------------------------------- files

_FORMATS = (
    ("A run", "training.directory"),
    ("Checkpoints of a run", "training.checkpoints"),
    ("An adapter", "checkpoint.native.directory"),
    ("A merged Hugging Face model", "checkpoint.export.huggingface"),
    ("An Orbax model", "checkpoint.export.orbax"),
    ("An adapter for PEFT", "checkpoint.peft.export"),
    ("The cache of spectra", "adapter.planning.cache"),
    ("The ledger of an experiment", "experiments.ledger"),
)


def files() -> str:
    """Every format that is written, out of the module that writes it."""
    parts = [
        "# Files",
        _MADE,
        "What the commands write, as the modules that write it say.",
    ]
    for title, module in _FORMATS:
        path = ROOT / "smoa_jax" / f"{module.replace('.', '/')}.py"
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        parts += [f"## {title}", markdown(text)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the pages."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (OUTPUT / name).write_text(text, encoding="utf-8")
        print(f"docs/reference/{name}")


if __name__ == "__main__":
    main()
