"""The one way in which this package refuses: what it got, what it expected, what to do."""

from __future__ import annotations

from typing import Any, NoReturn, get_args


def refuse(
    got: str,
    expected: str,
    do: str = "",
    *,
    where: object = "",
    error: type[ValueError] = ValueError,
) -> NoReturn:
    """Raises ``error``: ``where: got ...; expected ...; do``, on one line.

    ``where`` is a file, or a row of one.
    """
    what_to_do = f"; {do}" if do else ""
    raise error(f"{f'{where}: ' if where else ''}got {got}; expected {expected}{what_to_do}")


def require(
    ok: bool,
    got: str,
    expected: str,
    do: str = "",
    *,
    where: object = "",
    error: type[ValueError] = ValueError,
) -> None:
    """``refuse`` unless ``ok``."""
    if not ok:
        refuse(got, expected, do, where=where, error=error)


def how_to_install(*extras: str) -> str:
    """How extras are had: the package is on no index, and is installed from its repository."""
    return f"pip install '.[{','.join(extras)}]' in the repository of smoa_jax"


def require_one_of(literal: Any, value: object, name: str) -> None:
    """Raises ``ValueError`` unless ``value`` is one of the words of a ``Literal`` type."""
    known = get_args(literal)
    require(value in known, f"{name}{value!r}", f"one of {', '.join(known)}", "correct it")
