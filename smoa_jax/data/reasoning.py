"""Tasks of reasoning-gym, an optional extra that generates and scores many kinds of puzzles.

Its item i under seed s is drawn with seed s + i, so data sets of two near seeds share most of their
rows. Training and held-out rows are therefore disjoint index ranges under one seed; what still
occurs twice, since a puzzle can be drawn twice, is dropped and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from smoa_jax.checks import how_to_install
from smoa_jax.data.rows import AnyRow, Row
from smoa_jax.data.splits import draw_split

#: Indices drawn per wanted row, so that duplicates can be replaced.
_TRIES = 4


class ReasoningTask:
    """A task of reasoning-gym: rows by index, and the library's own scoring.

    Args:
        name: Of the task, such as ``"chain_sum"``.
        options: The task's settings.
        seed: Of its rows.
        size: How many indices there are.

    Raises:
        ValueError: The extra is not installed, or the library knows no such task or setting.
    """

    def __init__(self, name: str, options: Mapping[str, Any], *, seed: int, size: int) -> None:
        try:
            import reasoning_gym  # type: ignore[import-not-found]
        except ImportError as error:
            raise ValueError(
                "got data source reasoning_gym, which is not installed; expected the extra "
                f"'reasoning'; {how_to_install('reasoning')} (it needs a C compiler)"
            ) from error
        try:
            self._items = reasoning_gym.create_dataset(name, seed=seed, size=size, **options)
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(
                f"got reasoning_gym task {name!r} with {dict(options)}; expected a known task and "
                f"its settings: {error}"
            ) from error
        self._name = name

    def row(self, index: int) -> Row:
        """The ``index``-th row."""
        item = self._items[index]
        answer = str(item["answer"])
        return Row(
            instruction=item["question"],
            output=answer,
            answer=answer,
            origin=f"{self._name} row {index}",
        )

    def score(self, response: str, index: int) -> float:
        """The library's score of ``response`` to row ``index``, from 0 to 1."""
        return float(self._items.score_answer(response, entry=self._items[index]))


def reasoning_rows(
    name: str, options: Mapping[str, Any], *, train_rows: int, eval_rows: int, seed: int
) -> tuple[list[AnyRow], list[AnyRow], Counter[str]]:
    """Distinct training and held-out rows without a common question, and counts of what fell out.

    Raises:
        ValueError: As ``ReasoningTask``, or the task has too few different questions.
    """
    size = _TRIES * (train_rows + eval_rows)
    task = ReasoningTask(name, options, seed=seed, size=size)
    return draw_split(task.row, train_rows=train_rows, eval_rows=eval_rows, tries=_TRIES)
