"""LLaVA-RLHF's ``caption_type``: what is known of the right answer to a row's question."""

import math
from collections.abc import Mapping
from typing import Any

from ...errors import DataFormatError
from ..sample import at, shorten
from .base import Reading
from .mapping import renamed

# 1 is a general question, which has no one right answer.
ANSWERS: dict[int, str | None] = {1: None, 2: "A", 3: "B", 4: "C", 5: "D", 6: "no", 7: "yes"}
KNOWN = "1 (general), 2 to 5 (the right letter is A to D), 6 (no) or 7 (yes)"


def known_type(value: Any) -> int | None:
    """The type, or None of anything that is none; ``7.0`` is 7, since a table makes floats beside an empty cell."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if value in ANSWERS else None


def right_answer(row: dict[str, Any], reading: Reading) -> str | None:
    """The letter, "no" or "yes" that the row's type gives; None of a general question.

    Raises:
        DataFormatError: a type that is none, or a ``length_bonus`` that is no number.
    """
    known = known_type(row["caption_type"])
    if known is None:
        raise reading.refuse(f'"caption_type" is {shorten(row["caption_type"])}. Give {KNOWN}.')
    bonus = row.get("length_bonus")
    is_number = isinstance(bonus, int | float) and not isinstance(bonus, bool) and not math.isinf(bonus)
    if bonus is not None and not is_number:
        raise reading.refuse(f'"length_bonus" is {shorten(bonus)}. Give a number, or nothing, which counts as 1.')
    return ANSWERS[known]


def refuse_untyped(where: str, typed: str = "another row") -> DataFormatError:
    """Of a row with ``conversations`` alone beside rows with a type: it would be read by another format's rules."""
    return DataFormatError(
        at(where, f'the row has no "caption_type", and {typed} has one. Give {KNOWN}; or remove it from every row.')
    )


class TypedAlike:
    """Watches rows go by whose columns are their own, and so do not tell what the others have.

    Args:
        format, columns: as for ``canonical``; with a format given nothing is detected, and nothing watched.
    """

    def __init__(self, format: str | None, columns: Mapping[str, str] | None) -> None:
        self.format, self.columns = format, columns
        self._first: dict[bool, str] = {}

    def look(self, row: dict[str, Any], where: str) -> None:
        """Raise ``DataFormatError``, which names the row without, where some rows of conversations have a type."""
        if self.format is not None:
            return
        row = renamed(row, self.columns)
        if row.get("conversations") is None or row.get("prompt") is not None:
            return
        self._first.setdefault(row.get("caption_type") is not None, where)
        if len(self._first) == 2:
            raise refuse_untyped(self._first[False], self._first[True])
