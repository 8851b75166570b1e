"""Parsers of configurations and of functions, and their messages in the words of our own.

The configuration parser (jsonargparse) is imported when a command is known, and here alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from smoa_jax.checks import require
from smoa_jax.commands.help import COMMANDS, asked_for, command_page, options_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def plain_parser(command: str) -> ArgumentParser:
    """A parser without options yet."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=f"smoa {command}", exit_on_error=False, allow_abbrev=False)


def config_parser(command: str, kind: type, text: str) -> ArgumentParser:
    """A parser whose options are the fields of a configuration, section by section."""
    parser = plain_parser(command)
    parser.add_argument("--config", action="config", help=text)
    parser.add_class_arguments(kind, None)
    return parser


def instantiated(parser: ArgumentParser, parsed: Namespace, kind: type) -> Any:
    """The configuration that parsed options make, validated."""
    made = parser.instantiate(parsed)
    return kind(**{name: made[name] for name in kind.__dataclass_fields__})


def function_parser(
    command: str, function: Callable[..., int], *, skip: set[str | int]
) -> ArgumentParser:
    """A parser whose options are the keyword arguments of a command, but those in ``skip``."""
    parser = plain_parser(command)
    parser.add_function_arguments(function, as_positional=False, skip=skip)
    return parser


def parse(
    parser: ArgumentParser, arguments: Sequence[str], parser_of: Callable[[str], ArgumentParser]
) -> Namespace:
    """The options of a command, or its help and ``SystemExit``.

    Args:
        parser: The command's.
        arguments: Words after the command.
        parser_of: The parser of any command by its name: whose an option is that this one lacks.

    Raises:
        ValueError: in one line.
    """
    from jsonargparse import ArgumentError

    if page := asked_for(arguments):
        print(command_page(parser, page))
        raise SystemExit(0)
    _check_model_option(parser, arguments)
    try:
        return parser.parse_args(list(arguments))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"got a --config file that is not text ({error}); expected YAML in UTF-8"
        ) from error
    except ArgumentError as error:
        message = _reworded(" ".join(str(error).split()))
        raise ValueError(
            f"{_explained(parser, message, parser_of)}; see {parser.prog} --help all"
        ) from error


def _check_model_option(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Refuses ``--model`` where the option is ``--model.path``, and the other way round.

    The parser would take the first for a file of the section model, the second for a part of it.
    """
    known = {action.dest for action in parser._actions}
    wanted, other = ("model.path", "model") if "model.path" in known else ("model", "model.path")
    given = {word.split("=")[0] for word in arguments}
    require(
        f"--{other}" not in given,
        f"--{other}, which {parser.prog} does not have",
        f"--{wanted}",
        f"did you mean --{wanted}?",
    )


def _reworded(message: str) -> str:
    """The parser's message in the words of our own: got, expected."""
    wrong = re.fullmatch(r'Parser key "(.+?)": Expected an? (.+?)\. Got value: (.*)', message)
    if wrong:
        key, kind, value = wrong.groups()
        choices = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
        if choices:
            kind = "one of " + choices.group(1).replace("'", "")
        elif kind in ("<class 'list'>", "<class 'tuple'>"):
            kind = f"a list, such as '[{value}]'"
        else:
            kind = re.sub(r"<class '(\w+)'>", r"\1", kind)
        return f"got {key}={value}; expected {kind}"
    lost = re.fullmatch(r'Parser key "config": .*does not exist.*?:? ?([^\s\']+)\'?', message)
    if lost:
        return f"got --config {lost.group(1)}, which does not exist; expected a YAML file of a run"
    empty = re.fullmatch(r"Unexpected config:? ?(.*)", message)
    if empty:
        return (
            f"got a --config file that holds {empty.group(1)[:60]!r}; expected YAML with the "
            "sections of a run (model, train, data, ...), as in configs/files.yaml"
        )
    return message


def _explained(
    parser: ArgumentParser, message: str, parser_of: Callable[[str], ArgumentParser]
) -> str:
    """Of an option that a command doesn't have: whose it is, or what may have been meant."""
    words = message.replace("'", " ").split() if "nrecognized" in message else []
    unknown = [word[2:].split("=")[0] for word in words if word.startswith("--")]
    if not unknown:
        return message
    name, command = unknown[0], parser.prog.split()[-1]
    near = _near(name, options_of(parser))
    hint = f" (did you mean --{near}?)" if near else ""
    owners = [
        f"smoa {other}"
        for other in COMMANDS
        if other != command and name in options_of(parser_of(other))
    ]
    if not owners:
        return f"{message}{hint}"
    return f"got --{name}, an option of {', '.join(owners)}; expected one of smoa {command}'s{hint}"


def _near(name: str, known: Sequence[str]) -> str:
    """The option most like ``name``, as a whole or by its last part; empty if none is."""
    if whole := difflib.get_close_matches(name, known, n=1):
        return whole[0]
    lasts = {option.rpartition(".")[2]: option for option in known}
    found = difflib.get_close_matches(name.rpartition(".")[2], lasts, n=1)
    return lasts[found[0]] if found else ""
