"""Multiple choice: the options of a row, and which of them a completion takes."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import RewardError
from .answers import choice_letter
from .options import readable
from .text import accepted, column_values, normalized

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WITHOUT_OPTIONS = LETTERS[:10]


def row_options(choices_column: str | None, columns: dict[str, Any], rows: int) -> list[list[str] | None]:
    """The options of each row in the order of their letters, or None where a row has none.

    Args:
        choices_column: their column; None looks for "choices" and "options".
        columns: those that a reward is given.
        rows: how many there are.

    Raises:
        RewardError: no such column, or more than 26 options.
    """
    if choices_column is None:
        choices_column = next((name for name in ("choices", "options") if name in columns), None)
        if choices_column is None:
            return [None] * rows
    return [_texts(value) for value in column_values(columns, choices_column)]


def choice_is(truth: Any, text: str, choices: list[str] | None) -> Callable[[str], bool]:
    """What says of a completion's answer whether it takes the option ``truth`` (``text`` is its text).

    Without options the letters go from A to J. With them an answer that is the text of one option takes that.

    Raises:
        RewardError: the truth is no letter and no option.
    """
    if choices is None:
        letter = readable(choice_letter(text, _WITHOUT_OPTIONS), truth, "choice", "a letter from A to J")
        return lambda given: choice_letter(given, _WITHOUT_OPTIONS) == letter
    kind = f"one of the options {', '.join(choices)}"
    letter = readable(right_letter(truth, text, choices), truth, "choice", kind)
    letters, texts = LETTERS[: len(choices)], [normalized(choice) for choice in choices]

    def equal(given: str) -> bool:
        body = normalized(given)
        if texts.count(body) == 1:
            return letters[texts.index(body)] == letter
        return choice_letter(given, letters) == letter

    return equal


def right_letter(truth: Any, text: str, choices: Sequence[str]) -> str | None:
    """The letter of the right option: the truth is its text, its letter, or (a whole number) its index from 0."""
    letters, texts = LETTERS[: len(choices)], [normalized(choice) for choice in choices]
    if texts.count(normalized(text)) == 1:
        return letters[texts.index(normalized(text))]
    if isinstance(truth, int) and not isinstance(truth, bool):
        return letters[truth] if 0 <= truth < len(choices) else None
    return choice_letter(text, letters)


def _texts(options: Any) -> list[str] | None:
    """Of a list, of ``{"A": text, ...}``, or of ``{"text": [...], "label": [...]}`` as ARC has it."""
    if isinstance(options, dict):
        options = options["text"] if "text" in options else list(options.values())
    texts = accepted(options) if isinstance(options, list | tuple) else []  # a text that lists them is for the prompt
    if len(texts) > len(LETTERS):
        raise RewardError(f"a row has {len(texts)} options; a choice has at most 26, one per letter.")
    # "B. a dog" as the second option is "a dog".
    return [re.sub(rf"^\(?{letter}[).:]\s+", "", text) for letter, text in zip(LETTERS, texts, strict=False)] or None
