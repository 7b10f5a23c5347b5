"""Is the answer right? By text, mathematics, number, choice, or yes and no."""

from collections.abc import Callable
from typing import Any

from .answers import number_in, said, yes_or_no
from .choices import LETTERS, choice_is, right_letter, row_options
from .math_answers import math_equal
from .options import check_name, check_number, readable
from .text import answer_body, column_values, completion_text, normalized, written

METHODS = ("text", "exact", "math", "number", "choice", "yes_no", "auto")


def accuracy(
    completions: list[Any],
    column: str = "answer",
    *,
    method: str = "text",
    right: float = 1.0,
    wrong: float = 0.0,
    tolerance: float = 0.0,
    relative: float = 0.0,
    choices_column: str | None = None,
    seconds: float = 2.0,
    **columns: Any,
) -> list[float | None]:
    """``right`` where the completion's answer is the row's, else ``wrong``.

    The answer is the body of the first ``<answer>…</answer>``; without one, what follows ``</think>``, or the whole
    completion. An empty answer is never right, and a text that lists several answers has none (see ``answers.py``).

    Args:
        completions: strings or message lists.
        column: the dataset column with the right answers; a list in it accepts any of its items. None or an empty list
            in it means that the row cannot be scored.
        method: how answers are compared.
            "text": equal but for case, white space and outer punctuation;
            "exact": equal but for outer white space;
            "math": equal as mathematics by math-verify, or as "text";
            "number": the one number of the answer is the row's (``7 kg`` is 7, ``45%`` is 0.45);
            "choice": the letter that is chosen is the row's, or the answer is the text of the right option;
            "yes_no": "no" where the first sentence has "no" or "not", "yes" where it says "yes";
            "auto": by each right answer: a boolean, "yes" or "no": yes_no; one of the row's options, or a capital A to
            J: choice; a number: number; what has ``\\``, ``$``, ``^``, ``=`` in it: math; else text.
        right: the reward of a right answer.
        wrong: the reward of any other.
        tolerance: for numbers, the largest difference that is right.
        relative: for numbers, the largest difference as a share of the right answer: 0.05 is 5 %.
        choices_column: the column with the options of a choice, in the order of their letters; "choices" or "options"
            where the rows have one. With it, a right answer is a letter, an option's text, or its index from 0.
        seconds: CPU time of one comparison of "math", after which an answer is wrong.

    Raises:
        RewardError: no such column, a wrong option, or a right answer that is none of the method.
    """
    check_name("method", method, METHODS)
    check_number("right", right)
    check_number("wrong", wrong)
    check_number("tolerance", tolerance, 0)
    check_number("relative", relative, 0)
    check_number("seconds", seconds, 0, above=True)
    truths = column_values(columns, column)
    can_choose = method in ("choice", "auto")
    options = row_options(choices_column, columns, len(truths)) if can_choose else [None] * len(truths)
    values: list[float | None] = []
    for completion, truth, choices in zip(completions, truths, options, strict=True):
        given = said(completion_text(completion)).strip()
        kinds = [_comparison(item, method, choices, tolerance, relative, seconds) for item in _items(truth)]
        values.append((right if given and any(equal(given) for equal in kinds) else wrong) if kinds else None)
    return values


def _items(truth: Any) -> list[Any]:
    """The right answers of a row as they are: a boolean and an index say more than their texts."""
    items = truth if isinstance(truth, list | tuple) else [truth]
    return [item for item in items if item is not None]


def _comparison(
    truth: Any, method: str, choices: list[str] | None, tolerance: float, relative: float, seconds: float
) -> Callable[[str], bool]:
    """What says of a completion's answer whether it is ``truth``; an answer that is no truth of the method raises."""
    text = answer_body(written(truth))
    if method == "auto":
        method = _method_of(truth, text, choices)
    if method == "exact":
        return lambda given: given == text.strip()
    if method == "number":
        number = readable(number_in(text), truth, "number", "a number")
        return lambda given: is_close(number_in(given), number, tolerance, relative)
    if method == "choice":
        return choice_is(truth, text, choices)
    if method == "yes_no":
        side = readable(_side(truth, text) or yes_or_no(text, strict=True), truth, "yes_no", "yes or no")
        return lambda given: yes_or_no(given, strict=True) == side
    same = normalized(text)
    if method == "math":
        return lambda given: _same_text(given, same) or math_equal(text, given, seconds)
    return lambda given: _same_text(given, same)


def _same_text(given: str, same: str) -> bool:
    text = normalized(given)
    return bool(text) and text == same


def _method_of(truth: Any, text: str, choices: list[str] | None) -> str:
    if _side(truth, text):
        return "yes_no"
    if choices and right_letter(truth, text, choices):
        return "choice"
    if not choices and len(text.strip()) == 1 and text.strip() in LETTERS[:10]:
        return "choice"
    number = number_in(text)
    if number is not None and not any(character.isalpha() for character in text.replace("e", "").replace("E", "")):
        return "number"
    return "math" if any(mark in text for mark in "\\$^=") else "text"


def _side(truth: Any, text: str) -> str | None:
    """The truth as "yes" or "no"; nothing longer, or "Not before 1990" would be one."""
    known = {"yes": "yes", "no": "no", "true": "yes", "false": "no"}
    if isinstance(truth, bool):
        return "yes" if truth else "no"
    return known.get(normalized(text))


def is_close(given: float | None, truth: float, tolerance: float = 0.0, relative: float = 0.0) -> bool:
    """Whether a number is as right as asked; equal decimals are (0.3 and 3 x 0.1), and None never is."""
    # The tiny share on top makes 0.95 within 0.05 of 1, which floats else deny.
    return given is not None and abs(given - truth) <= max(tolerance, relative * abs(truth)) + 1e-9 * abs(truth)
