"""Options and right answers, looked at: a wrong one is an error that names it."""

import math
import reprlib
from collections.abc import Sequence
from typing import Any

from ..errors import RewardError, nearest


def check_number(name: str, value: Any, least: float = -math.inf, above: bool = False) -> None:
    """Raise ``RewardError`` unless ``value`` is a finite number of at least (or above) ``least``."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and (value > least or (value == least and not above)):
        return
    limit = "" if least == -math.inf else f" {'above' if above else 'of at least'} {least:g}"
    raise RewardError(f"{_given(name, value)} is not a number{limit}. Correct it{_or_column(name, value)}.")


def check_switch(name: str, value: Any) -> None:
    """Raise ``RewardError`` unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise RewardError(f"{_given(name, value)} is not true or false. Correct it{_or_column(name, value)}.")


def check_name(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise ``RewardError`` unless ``value`` is one of ``known``."""
    if value not in known:
        hint = nearest(value, list(known)) if isinstance(value, str) else ""
        raise RewardError(f"{_given(name, value)} is none of {', '.join(known)}.{hint}{_or_column(name, value, ' ')}")


def readable(value: Any, truth: Any, method: str, kind: str) -> Any:
    """``value``, which is what a method read of the right answer ``truth``; ``RewardError`` where it read nothing."""
    if value is None:
        raise RewardError(
            f'the right answer {reprlib.repr(truth)} is not {kind}, as method "{method}" needs it. Correct the row, or '
            'take another method ("auto" decides by row).'
        )
    return value


def _given(name: str, value: Any) -> str:
    return f"{name}={reprlib.repr(value)}"


def _or_column(name: str, value: Any, before: str = "; ") -> str:
    """TRL gives a reward every column of the dataset by keyword, so a column can take the place of an option."""
    return f'{before}if it is the column "{name}" of the dataset, rename that' if isinstance(value, list) else ""
