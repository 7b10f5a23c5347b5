"""What a reward returns, looked at: one finite number a completion, None, or Failed; else an error that names it."""

import functools
import inspect
import math
import reprlib
from collections.abc import Callable, Iterable
from textwrap import shorten
from typing import Any, SupportsFloat

from ..errors import RewardError
from .failed import Failed
from .text import completion_text


def finite_reward(
    function: Callable[..., Any], name: str, note: Callable[[list[Any], str], list[Any]] | None = None
) -> Callable[..., Any]:
    """``function``, which raises ``RewardError`` with the row where it returns NaN or infinity.

    TRL takes NaN for None, and turns an advantage that an infinity has spoilt into 0: both without a word.

    Args:
        function: a reward.
        name: what messages call it.
        note: is given the values and the name, and returns what TRL is to see in their place.
    """
    seen = note or (lambda values, _: values)

    @functools.wraps(function)
    def reward(*args: Any, **columns: Any) -> Any:
        return seen(check_finite(function(*args, **columns), name, columns), name)

    @functools.wraps(function)
    async def async_reward(*args: Any, **columns: Any) -> Any:
        return seen(check_finite(await function(*args, **columns), name, columns), name)

    return async_reward if is_async(function) else reward


def check_finite(values: Iterable[Any], name: str, columns: dict[str, Any]) -> list[Any]:
    """The values of a reward; ``RewardError`` with the row where one is NaN or infinite."""
    values = list(values)
    for number, value in enumerate(values):
        if isinstance(value, SupportsFloat) and not is_finite(value):
            raise _not_finite(name, value, columns, number)
    return values


def check_values(values: Any, name: str, columns: dict[str, Any]) -> list[Any]:
    """The values of a reward as a list: as many as completions, each a finite float, None or Failed.

    Raises:
        RewardError: anything else, with the first completion that it concerns.
    """
    completions = columns.get("completions")
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, dict)):
        raise RewardError(
            f'The reward "{name}" returned {reprlib.repr(values)}. Return a list, one number per completion'
            f"{first_row(columns)}."
        )
    values = list(values)
    if completions is not None and len(values) != len(completions):
        raise RewardError(
            f'The reward "{name}" returned {len(values)} values for {len(completions)} completions. '
            f"Return one per completion{first_row(columns)}."
        )
    for number, value in enumerate(values):
        if value is not None and not isinstance(value, Failed) and not is_finite(value):
            raise _not_finite(name, value, columns, number)
    return [value if value is None or isinstance(value, Failed) else float(value) for value in values]


def is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):  # the latter: a whole number beyond any float
        return False


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine: an async function, or an object with an async ``__call__``."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def row_of(columns: dict[str, Any], number: int) -> str:
    """`` for the completion "..." of the prompt "..."``, as far as the columns of a reward have them."""
    said = [
        f'the {name} "{shorten(completion_text(columns[name + "s"][number]), 80)}"'
        for name in ("completion", "prompt")
        if len(columns.get(name + "s") or ()) > number
    ]
    return f" for {' of '.join(said)}" if said else ""


def first_row(columns: dict[str, Any]) -> str:
    """`` (the call began with ...)``: a row to try the function on."""
    return f" (the call began{row_of(columns, 0).replace(' for', ' with', 1)})" if columns.get("completions") else ""


def _not_finite(name: str, value: Any, columns: dict[str, Any], number: int) -> RewardError:
    return RewardError(
        f'The reward "{name}" returned {_short(value)}. Return a finite number, or None{row_of(columns, number)}.'
    )


def _short(value: Any) -> str:
    """A number of numpy or torch as the number itself; anything else cut short."""
    number = isinstance(value, SupportsFloat) and not isinstance(value, int)
    return repr(float(value)) if number else reprlib.repr(value)
