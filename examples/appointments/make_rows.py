"""Writes train.jsonl and eval.jsonl: notes in words, and the record that each of them stands for.

A model that has not been trained on them answers in prose, if at all; one that has, in exactly this
JSON. No held-out note occurs in training.

    python examples/appointments/make_rows.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

_WHAT = ("lunch", "dinner", "coffee", "a call", "a meeting", "a walk", "an interview", "breakfast")
_WHO = (
    *("Ana", "Bilal", "Chen", "Dora", "Emeka", "Farah", "Goran", "Hana", "Ivo", "Jana"),
    *("Kofi", "Lena", "Mateo", "Nils", "Olga", "Priya", "Quinn", "Rosa", "Sami", "Tove"),
)
_WHERE = (
    *("Oslo", "Lima", "Porto", "Kyoto", "Accra", "Graz", "Tunis", "Quito", "Lyon", "Leeds"),
    *("the office", "the library", "the park", "the old mill", "room 12", "the station"),
)
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
_FORMS = (
    "{What} with {who} in {where}, {day} at {hour}.",
    "{day}, {hour}: {what} with {who}, {where}",
    "Meet {who} at {hour} on {day} for {what} ({where}).",
    "Please note {what} with {who} on {day}, {hour}, {where}.",
    "{who} wants {what} in {where} at {hour}, {day}",
)


def row(draw: random.Random) -> dict[str, str]:
    """One note and its record."""
    what, who, where = draw.choice(_WHAT), draw.choice(_WHO), draw.choice(_WHERE)
    month, day = draw.choice(_MONTHS), draw.randrange(1, 29)
    hour = f"{draw.randrange(8, 21)}:{draw.choice(('00', '15', '30'))}"
    written_day = draw.choice((f"{day} {month}", f"{month} {day}"))
    note = draw.choice(_FORMS).format(
        What=what.capitalize(),
        **{"what": what, "who": who, "where": where, "day": written_day, "hour": hour},
    )
    record = {
        "what": what.split()[-1],
        "who": who,
        "where": where,
        "day": f"{day} {month}",
        "time": hour,
    }
    return {"instruction": note, "output": json.dumps(record)}


def make(directory: Path, *, train_rows: int = 200, eval_rows: int = 50, seed: int = 0) -> None:
    """Writes both files; no note occurs twice."""
    draw = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < train_rows + eval_rows:
        drawn = row(draw)
        rows[drawn["instruction"]] = drawn
    lines = [json.dumps(each) + "\n" for each in rows.values()]
    (directory / "train.jsonl").write_text("".join(lines[:train_rows]), encoding="utf-8")
    (directory / "eval.jsonl").write_text("".join(lines[train_rows:]), encoding="utf-8")


if __name__ == "__main__":
    make(Path(__file__).parent)
