"""Completions to try rewards on: right ones, wrong ones, nothing and noise, for every row."""

import random
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, nearest
from ..rewards.text import completion_text, written

REFERENCE, TAGGED, SWAPPED, LISTED, EMPTY, GARBAGE = (
    "reference",
    "reference in tags",
    "another row's",
    "all answers at once",
    "empty",
    "garbage",
)
KINDS = (REFERENCE, TAGGED, SWAPPED, LISTED, EMPTY, GARBAGE)
_LISTED = 40  # answers that one completion lists
_NOISE = "abcdefgh ijklm nopqrs tuvwxyz."


def completions_of(rows: Sequence[dict[str, Any]], column: str = "answer", seed: int = 0) -> dict[str, list[str]]:
    """A completion of each kind for each row, a list a kind.

    The reference is the row's own completion, else its answer. Another row's and all answers at once are left out where
    all rows have the same answer.

    Raises:
        ConfigError: no row has an answer in the column, nor a completion.
    """
    draw = random.Random(seed)
    if all(row.get(column) is None and row.get("completion") is None for row in rows):
        known = list(dict.fromkeys(name for row in rows for name in row))
        raise ConfigError(
            f'No row has an answer in the column "{column}" (columns: {", ".join(known) or "none"}).'
            f"{nearest(column, known)} Name it with --answer-column."
        )
    bodies = [_answer(row, column) for row in rows]
    references = [_reference(row, body) for row, body in zip(rows, bodies, strict=True)]
    distinct = list(dict.fromkeys(bodies))
    made = {REFERENCE: references, TAGGED: [f"<think>\n...\n</think>\n<answer>{body}</answer>" for body in bodies]}
    if len(distinct) > 1:
        made[SWAPPED] = [references[_another(draw, bodies, index)] for index in range(len(rows))]
        listed = distinct if len(distinct) <= _LISTED else draw.sample(distinct, _LISTED)
        made[LISTED] = [
            f"<answer>{' '.join(answers)}</answer>"
            for body in bodies
            for answers in [list(dict.fromkeys([body, *listed]))]
        ]
    made[EMPTY] = [""] * len(rows)
    made[GARBAGE] = ["".join(draw.choices(_NOISE, k=max(8, len(text)))) for text in references]
    return made


def _another(draw: random.Random, bodies: list[str], own: int) -> int:
    """A row with another answer."""
    while bodies[other := draw.randrange(len(bodies))] == bodies[own]:
        pass
    return other


def _answer(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None and row.get("completion") is not None:
        return completion_text(row["completion"])
    values = value if isinstance(value, list) else [value]
    return written(values[0]) if values and values[0] is not None else ""


def _reference(row: dict[str, Any], body: str) -> str:
    return completion_text(row["completion"]) if row.get("completion") is not None else body
