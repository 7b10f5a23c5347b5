"""Which of the numbered actions happen? Sets of ids like ``(1) (4)``, compared by intersection over union."""

import re
from typing import Any

from ..errors import RewardError
from .text import answer_body, column_values, completion_text, span, written

_ID = re.compile(r"\(([0-9]+)\)")


def actions(completions: list[Any], column: str = "answer", **columns: Any) -> list[float | None]:
    """Intersection over union of the ids in the first ``<answer>…</answer>`` and the row's, 0 to 1.

    An id is digits in round brackets; ``(01)`` is ``(1)``. Ids are sets: their order and repetitions do not count, so
    equal lists have 1. Without an answer tag, and where either side has no id, the reward is 0: to say nothing is
    never right.

    Args:
        completions: strings or message lists.
        column: the dataset column with the right ids: a text with them, in an ``<answer>`` tag or not, or a list of
            numbers; None in it means that the row cannot be scored.

    Raises:
        RewardError: the dataset has no such column, or a row's text in it has no id.
    """
    truths = column_values(columns, column)
    return [
        None if truth is None else _overlap(_said(completion_text(completion)), _right(truth))
        for completion, truth in zip(completions, truths, strict=True)
    ]


def _said(text: str) -> set[str]:
    return _ids(answer_body(text)) if span(text, "answer") else set()


def _right(truth: Any) -> set[str]:
    if not isinstance(truth, list | tuple):
        return _ids_of_row(answer_body(written(truth)), truth)
    texts = [written(item) for item in truth if item is not None]
    return set().union(*(_ids_of_row(f"({text})" if text.isdecimal() else text, truth) for text in texts))


def _ids_of_row(text: str, truth: Any) -> set[str]:
    found = _ids(text)
    if text.strip() and not found:
        raise RewardError(f'the right answer {str(truth)[:60]!r} has no ids like "(1) (4)". Correct the row.')
    return found


def _ids(text: str) -> set[str]:
    """As text: a hostile id of ten thousand digits is no number that Python converts."""
    return {found.lstrip("0") or "0" for found in _ID.findall(text)}


def _overlap(given: set[str], right: set[str]) -> float:
    return len(given & right) / len(given | right) if given and right else 0.0
