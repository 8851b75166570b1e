"""What documents say is so: links lead somewhere, commands parse, snippets run, names exist.

Three conventions. Python in ``docs/library.md`` and ``docs/method.md`` is one program a page, which
is run; a snippet under ``<!-- not run: why -->`` is compiled alone, as are all others. A ``text``
block right after a snippet that prints is what it prints. ``smoa ...`` and ``python train.py ...``
in ``sh`` blocks are command lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import re
import shlex
import unicodedata
from pathlib import Path
from typing import get_type_hints

import jax
import pytest

import smoa_jax
from scripts import reference
from smoa_jax import cli
from smoa_jax.commands.help import COMMANDS
from smoa_jax.training.config import DEFAULT_LEARNING_RATES, RunConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "configs" / "README.md"]
#: Pages whose snippets are run.
RUN = ("library.md", "method.md")

every_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


# --------------------------------------------------------------------------- reading a document


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line before it."""

    language: str
    text: str
    before: str


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a document, those in lists too."""
    found, lines = [], text.splitlines()
    index = 0
    while index < len(lines):
        opening = re.fullmatch(r"( *)```(\w*).*", lines[index])
        if not opening:
            index += 1
            continue
        end = next(at for at in range(index + 1, len(lines)) if lines[at].strip() == "```")
        inner = [line.removeprefix(opening[1]) for line in lines[index + 1 : end]]
        before = lines[index - 1].strip() if index else ""
        found.append(Block(opening[2], "\n".join(inner), before))
        index = end + 1
    return found


def without_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links_of(text: str) -> list[str]:
    """The targets of links that are no addresses elsewhere."""
    prose = re.sub(r"`[^`\n]*`", "", without_blocks(text))
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors_of(text: str) -> set[str]:
    """Anchors of the headings, as Python-Markdown makes them."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", without_blocks(text), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        ascii_only = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        words = re.sub(r"[^\w\s-]", "", ascii_only).strip().lower()
        name, number = re.sub(r"[-\s]+", "-", words), 0
        while (name if not number else f"{name}_{number}") in anchors:
            number += 1
        anchors.add(name if not number else f"{name}_{number}")
    return anchors


def broken_links(path: Path, text: str) -> list[str]:
    broken = []
    for target in links_of(text):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        # The site holds nothing beside docs/.
        outside = (ROOT / "docs") in path.parents and ROOT / "docs" not in file.resolve().parents
        there = (not name or file.exists()) and not outside
        if not there or (anchor and anchor not in anchors_of(file.read_text() if name else text)):
            broken.append(target)
    return broken


def commands_of(text: str) -> list[list[str]]:
    """The words of every command line of ours, without what a shell would take."""
    found = []
    for block in blocks_of(text):
        if block.language != "sh":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"<<'\w+'", "", line), comments=True)
            if words[:2] == ["python", "train.py"]:
                found.append(["train", *words[2:]])
            elif words and re.fullmatch(r"(\.venv/bin/)?smoa", words[0]):
                found.append(words[1:])
    return found


def check_command(words: list[str]) -> None:
    """Parse a command line; configurations that a page makes up are left out."""
    command, rest = words[0], list(words[1:])
    if command == "--version":
        return
    if "--config" in rest:
        at = rest.index("--config") + 1
        if not rest[at].startswith("configs/"):
            given = {word.split("=")[0] for word in rest}
            needed = {"--model.path": "MODEL", "--train.output_dir": "runs/x"}
            rest[at - 1 : at + 1] = [
                word
                for name, value in needed.items()
                if name not in given
                for word in (name, value)
            ]
    if command == "evaluate":
        rest = cli.evaluate_words(rest)
        if "--model.path" not in rest and "--config" not in rest:  # an adapter brings them
            rest += ["--model.path", "MODEL", "--train.output_dir", "runs/x"]
    parser = cli.command_parser(command)
    parsed = cli._parse(parser, rest)
    if command in ("train", "evaluate"):
        cli._run_config(parser, parsed)


@functools.cache
def known_fields() -> frozenset[str]:
    """The dotted name of every field, and of every section."""
    names = set()

    def walk(prefix: str, kind: type) -> None:
        for field in dataclasses.fields(kind):
            name = f"{prefix}{field.name}"
            names.add(name)
            hint = get_type_hints(kind)[field.name]
            if dataclasses.is_dataclass(hint):
                walk(f"{name}.", hint)

    walk("", RunConfig)
    return frozenset(names)


SECTIONS = tuple(RunConfig.__dataclass_fields__)
#: Names in documents that begin as a section does and are no field: files, modules, file names.
NO_FIELDS = re.compile(r".*\.(py|md|json|jsonl|yaml|safetensors|png)")


def unknown_fields(text: str) -> set[str]:
    names = re.findall(rf"`(?:--)?((?:{'|'.join(SECTIONS)})\.[\w.]+)", text)
    return {name for name in names if name not in known_fields() and not NO_FIELDS.fullmatch(name)}


def machine_paths(text: str) -> list[str]:
    return re.findall(r"(?<![\w.~])/(?:work|root|home|tmp|opt|usr|mnt|Users)/[\w./-]*", text)


# ------------------------------------------------------------------------------------- the tests


@every_document
def test_every_link_leads_to_a_file_and_an_anchor_that_are_there(path):
    assert broken_links(path, path.read_text()) == []


@every_document
def test_every_command_line_parses(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands_of(path.read_text()):
        try:
            check_command(words)
        except ValueError as error:
            pytest.fail(f"{' '.join(words)}: {error}")


@every_document
def test_every_field_in_backticks_is_one_of_a_configuration(path):
    assert unknown_fields(path.read_text()) == set()


@every_document
def test_no_document_names_a_machines_path(path):
    assert machine_paths(path.read_text()) == []


@every_document
def test_every_python_snippet_compiles(path):
    for block in blocks_of(path.read_text()):
        if block.language == "python" and path.parent.name != "reference":
            compile(block.text, str(path), "exec")


@pytest.mark.parametrize("name", RUN)
def test_a_pages_snippets_run_in_order_and_print_what_it_says(name):
    run_page((ROOT / "docs" / name).read_text())


def run_page(text: str) -> None:
    with jax.numpy_rank_promotion("allow"):  # as it is for who reads the page
        _run_page(text)


def _run_page(text: str) -> None:
    space: dict = {"__name__": "a_page"}
    printed = ""
    for block in blocks_of(text):
        if block.language == "python" and not block.before.startswith("<!-- not run: "):
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile(block.text, "a page", "exec"), space)
            printed = stream.getvalue().strip()
        elif block.language == "text" and printed:
            assert block.text.strip() == printed
            printed = ""


def test_the_reference_is_what_the_code_says():
    for name, text in reference.pages().items():
        written = (ROOT / "docs" / "reference" / name).read_text()
        assert written == text, f"docs/reference/{name} is of before; run make reference"


def test_the_reference_has_every_field_command_option_and_public_name():
    pages = reference.pages()
    leaves = {name for name in known_fields() if "." in name} - {"data.task", "data.hub"}
    assert all(f"`{name}`" in pages["configuration.md"] for name in leaves)
    for command in COMMANDS:
        assert f"## smoa {command}" in pages["commands.md"]
    assert all(f"### {name}\n" in pages["api.md"] for name in smoa_jax.__all__)


def test_the_default_learning_rates_are_those_of_the_code():
    text = (ROOT / "docs" / "choosing-an-adapter.md").read_text()
    rows = re.findall(r"^\| `(\w+)`: [^|]+ \| (\S+) \|$", text, re.MULTILINE)
    assert {name: float(rate) for name, rate in rows} == DEFAULT_LEARNING_RATES


def test_every_page_is_in_the_sites_navigation():
    text = (ROOT / "zensical.toml").read_text()
    for path in PAGES:
        assert f'"{path.relative_to(ROOT / "docs")}"' in text


# ---------------------------------------------------------- a broken page is seen by each of them

BROKEN = {
    "a link to nothing": (lambda text: broken_links(ROOT / "docs" / "x.md", text), "[a](no.md)"),
    "an anchor of nothing": (
        lambda text: broken_links(ROOT / "docs" / "x.md", text),
        "# A\n\n[a](#b)",
    ),
    "a link out of the site": (
        lambda text: broken_links(ROOT / "docs" / "x.md", text),
        "[a](../README.md)",
    ),
    "a field that is not there": (unknown_fields, "set `train.save_evry: 3`"),
    "a path of a machine": (machine_paths, "see /home/me/runs"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_page_is_seen(name):
    find, text = BROKEN[name]
    assert find(text)
    assert not find("[index](index.md), `train.save_every`, runs/mine")


def test_a_command_that_does_not_parse_is_seen():
    for line in ("smoa train --model.path M --train.stepz 3", "smoa export --model M --to x"):
        (words,) = commands_of(f"```sh\n{line}\n```")
        with pytest.raises(ValueError, match=r"nrecognized|required"):
            check_command(words)


def test_a_snippet_that_fails_or_prints_something_else_is_seen():
    with pytest.raises(NameError):
        run_page("```python\nnothing\n```")
    with pytest.raises(AssertionError):
        run_page("```python\nprint(1)\n```\n\n```text\n2\n```")
    run_page("<!-- not run: why -->\n```python\nnothing\n```")
