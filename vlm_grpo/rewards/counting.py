"""How many? The number that a completion says against the row's."""

from typing import Any

from ..errors import RewardError
from .answers import number_in
from .options import check_switch
from .text import accepted, column_values, completion_text


def counting(
    completions: list[Any], column: str = "answer", *, partial: bool = True, **columns: Any
) -> list[float | None]:
    """1.0 for the right count, else ``max(0, 1 - |said - right| / max(right, 1))``, or 0.0 without ``partial``.

    The count is the one number of the answer (first ``<answer>…</answer>``, else what follows ``</think>``, else the
    whole completion), in digits or English words ("seven", "twenty-one", "none"); see ``answers.number_in``. Several
    different numbers are no answer unless one is called the answer ("2 cats + 1 dog = 3"): listing them wins nothing.
    Only whole numbers from 0 count: "6.5" would be near both 6 and 7.

    Args:
        completions: strings or message lists.
        column: the dataset column with the right counts, numbers or texts; of a list the nearest counts; None or an
            empty list means that the row cannot be scored.
        partial: a near miss is worth something. Always saying the usual count is then too: set it to false where counts
            vary little.

    Raises:
        RewardError: the dataset has no such column, a row's count in it is none, or a wrong option.
    """
    check_switch("partial", partial)
    values: list[float | None] = []
    for completion, truth in zip(completions, column_values(columns, column), strict=True):
        rights = [_count_of_row(text) for text in accepted(truth)]
        said = number_in(completion_text(completion))
        values.append(max(_score(said, right, partial) for right in rights) if rights else None)
    return values


def _count_of_row(text: str) -> float:
    right = number_in(text)
    if right is None or right < 0 or not right.is_integer():
        raise RewardError(f"the right answer {text[:60]!r} is not a count. Correct the row: a whole number from 0.")
    return right


def _score(said: float | None, right: float, partial: bool) -> float:
    if said is None or said < 0 or not said.is_integer():
        return 0.0
    if said == right:
        return 1.0
    return max(0.0, 1.0 - abs(said - right) / max(right, 1.0)) if partial else 0.0
