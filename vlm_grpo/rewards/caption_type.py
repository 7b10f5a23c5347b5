"""LLaVA-RLHF's correctness bonus: what a row's ``caption_type`` says of the right answer, against the completion."""

import re
from typing import Any

from ..data.formats.caption_types import ANSWERS, KNOWN, known_type
from ..errors import RewardError
from .answers import said
from .checked import row_of
from .options import check_number
from .text import column_values, completion_text

_FRONT = re.compile(r"([A-D])\.")
_CALLED = re.compile(r"(?i:\bcorrect option is):?\s+[(\[\"'“*]*([A-D])(?![\w'’])")
# A first word that begins with "No", as far as it denies: not "Note", nor "Notice".
_FIRST = re.compile(r"\W*(?:(?P<no>no(?:t|ne|pe|thing|body|where)?)|yes)\b", re.IGNORECASE)


def caption_type(
    completions: list[Any], column: str = "caption_type", *, score: float = 2.0, **columns: Any
) -> list[float]:
    """``score * c``, the correctness rule of LLaVA-RLHF (Sun et al. 2023; ``RLHF/models/ppo_trainer.py``).

    By the type of the row: 2 to 5 (the right letter is A to D): c = 1 where the completion starts with the letter and
    a full stop ("B. a cat") or says that the correct option is the letter, else 0. 6 (the right answer is no): c = 0.5
    where it starts with "No", -0.5 where it starts with "Yes", else 0. 1 (general) and 7 (yes): 0, since a model that
    always says yes would be paid. So the values are 2 and 0, and ±1 and 0.

    Read is the body of ``<answer>`` where there is one, what follows ``</think>`` where there is that, else all. Three
    readings differ from the original's: a completion that names several letters in these two ways has c = 0 (there
    naming all four won), "no" and "yes" are whole words in any case (there "Note" was a no), and "the correct option
    is B" needs no full stop behind the letter.

    Args:
        completions: strings or message lists.
        column: the dataset column with the types.
        score: what c is multiplied by; at least 0.

    Raises:
        RewardError: the dataset has no such column, a row has no type or an unknown one, or a wrong option.
    """
    check_number("score", score, 0)
    types = column_values(columns, column)
    values: list[float] = []
    for number, (completion, given) in enumerate(zip(completions, types, strict=True)):
        known = known_type(given)
        if known is None:
            row = row_of({"completions": completions, **columns}, number)
            raise RewardError(f'the column "{column}" holds {given!r}{row}. Give {KNOWN}.')
        values.append(score * _correct(said(completion_text(completion)).strip(), ANSWERS[known]))
    return values


def _correct(text: str, right: str | None) -> float:
    if right is None or right == "yes":
        return 0.0
    if right == "no":
        first = _FIRST.match(text)
        return 0.0 if first is None else 0.5 if first["no"] else -0.5
    front = _FRONT.match(text)
    named = {match[1] for match in _CALLED.finditer(text)} | ({front[1]} if front else set())
    return float(named == {right})


vars(caption_type)["right_at"] = lambda score=2.0, **options: score / 2  # where it measures: a right "no" earns half
