"""Lengths of completions: bounds, LLaVA-RLHF's length penalty, and DAPO's soft punishment of overlong ones."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import RewardError
from .checked import row_of
from .options import check_name, check_number
from .text import column_values
from .words import Unit, in_units

UNITS = ("tokens", "words", "characters")


@dataclass(eq=False)
class Length:
    """0 for a length within the bounds, falling linearly to ``penalty`` outside; in [penalty, 0].

    Below ``min_length`` n the value is ``penalty * (min_length - n) / min_length``; above ``max_length`` it is
    ``penalty * (n - max_length) / reach``, at worst ``penalty``.

    The variant ``llava-rlhf`` is ``-10 * n / max_length * length_bonus``, with n at most ``max_length`` and the bonus
    from a column of the row (Sun et al. 2023, LLaVA-RLHF); in [-10 * |bonus|, 10 * |bonus|], None where it is None.

    Args:
        min_length, max_length: in ``unit``; one of them at least. For ``llava-rlhf`` ``max_length`` is the run's
            ``max_completion_length`` unless given.
        penalty: at most 0; -1, or -10 for ``llava-rlhf``.
        reach: how far above ``max_length`` the whole penalty is reached; by default at twice ``max_length``.
        unit: ``tokens`` (TRL's ``completion_ids``, the end token included), ``words`` (in scripts written without
            spaces each character) or ``characters``, both of the text with single spaces.
        column: the bonus's.

    Raises:
        RewardError: options that cannot be, no ``completion_ids``, no such column, a bonus that is no number.
    """

    variant: Literal["bounds", "llava-rlhf"] = "bounds"
    min_length: int | None = None
    max_length: int | None = None
    penalty: float | None = None
    reach: int | None = None
    unit: Unit = "tokens"
    column: str = "length_bonus"

    __name__ = "length"

    def __post_init__(self) -> None:
        check_name("variant", self.variant, ("bounds", "llava-rlhf"))
        check_name("unit", self.unit, UNITS)
        for name in ("min_length", "max_length", "reach"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, 1)
        if self.penalty is None:
            self.penalty = -10.0 if self.variant == "llava-rlhf" else -1.0
        check_number("penalty", self.penalty)
        if self.penalty > 0:
            raise RewardError(f"penalty is {self.penalty}. Give a number of at most 0.")
        low, high = self.min_length, self.max_length
        if self.variant == "bounds" and low is None and high is None:
            raise RewardError("there is neither min_length nor max_length. Give one of them.")
        if low is not None and high is not None and low > high:
            raise RewardError(f"min_length {low} is above max_length {high}. Lower it.")

    def use_run(self, *, max_completion_length: int | None = None, **_: Any) -> None:
        """Take the run's limit as ``max_length`` of the variant ``llava-rlhf``, unless one was given."""
        if self.variant == "llava-rlhf" and self.max_length is None and self.unit == "tokens":
            self.max_length = max_completion_length

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        lengths = [len(parts) for parts in in_units(completions, columns, self.unit)]
        if self.variant == "bounds":
            return [self._outside(length) for length in lengths]
        if self.max_length is None:
            raise RewardError("there is no max_length. Give it: the run's max_completion_length where tokens count.")
        given, rows = column_values(columns, self.column), {"completions": completions, **columns}
        bonuses = [_number(value, self.column, row_of(rows, number)) for number, value in enumerate(given)]
        return [
            None if bonus is None else self._worst * min(1.0, length / self.max_length) * bonus
            for length, bonus in zip(lengths, bonuses, strict=True)
        ]

    @property
    def _worst(self) -> float:
        assert self.penalty is not None, "set when the reward is made"
        return self.penalty

    def _outside(self, length: int) -> float:
        if self.min_length is not None and length < self.min_length:
            return self._worst * (self.min_length - length) / self.min_length
        if self.max_length is not None and length > self.max_length:
            return self._worst * min(1.0, (length - self.max_length) / (self.reach or self.max_length))
        return 0.0


@dataclass(eq=False)
class LengthBonus:
    """LLaVA-RLHF's length penalty, ``-10 * n / max_length * length_bonus``, with n at most ``max_length``.

    It is ``Length(variant="llava-rlhf")`` under the name of the rule (Sun et al. 2023), and with the rule's reading of
    a row whose bonus is empty: it counts as 1. Tokens are counted, the end token included. In
    [-10 * |bonus|, 10 * |bonus|]: a negative bonus rewards length.

    Args:
        max_length: tokens; the run's ``max_completion_length`` unless given.
        penalty: of the longest completion, at most 0.
        column: the bonus's.

    Raises:
        RewardError: options that cannot be, no ``completion_ids``, no such column, a bonus that is no number.
    """

    max_length: int | None = None
    penalty: float = -10.0
    column: str = "length_bonus"

    __name__ = "length_bonus"

    def __post_init__(self) -> None:
        self._length = Length("llava-rlhf", max_length=self.max_length, penalty=self.penalty, column=self.column)

    def use_run(self, *, max_completion_length: int | None = None, **_: Any) -> None:
        """Take the run's limit, unless one was given."""
        self._length.use_run(max_completion_length=max_completion_length)

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        bonuses = [1.0 if _is_empty(value) else value for value in column_values(columns, self.column)]
        return self._length(completions, **{**columns, self.column: bonuses})


@dataclass(eq=False)
class Overlong:
    """DAPO's soft overlong punishment, in [-1, 0]: 0 up to ``max_completion_length - cache`` tokens, then linear.

    TRL's function (Yu et al. 2025, eq. 13). A completion that generation cut off has all its tokens, and gets -1.

    Args:
        max_completion_length: tokens; the run's unless given.
        cache: tokens over which the punishment grows; by default a fifth of it, as published (4096 of 20480). 0
            punishes only what is longer, which generation never makes.

    Raises:
        RewardError: a cache outside [0, max_completion_length], no limit, no ``completion_ids``.
    """

    max_completion_length: int | None = None
    cache: int | None = None

    __name__ = "overlong"

    def __post_init__(self) -> None:
        limit = self.max_completion_length
        if limit is not None:
            check_number("max_completion_length", limit, 1)
        if self.cache is not None:
            check_number("cache", self.cache, 0)
            if limit is not None and self.cache > limit:
                raise RewardError(f"cache is {self.cache}, above max_completion_length {limit}. Lower it.")

    def use_run(self, *, max_completion_length: int | None = None, **_: Any) -> None:
        """Take the run's limit, unless one was given."""
        if self.max_completion_length is None and max_completion_length is not None:
            self.max_completion_length = max_completion_length
            self.__post_init__()

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        from trl.rewards.other_rewards import get_soft_overlong_punishment

        if self.max_completion_length is None:
            raise RewardError("there is no max_completion_length. Give it: the run's.")
        cache = self.max_completion_length // 5 if self.cache is None else self.cache
        if columns.get("completion_ids") is None:
            raise RewardError("there are no completion_ids to count tokens in. Pass them: the trainer does.")
        return get_soft_overlong_punishment(self.max_completion_length, cache)(columns["completion_ids"])


def _is_empty(value: Any) -> bool:
    return value is None or value != value  # a table's empty cell is NaN


def _number(value: Any, column: str, row: str) -> float | None:
    if _is_empty(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(f'the column "{column}" holds {value!r}. Put a number there, or nothing{row}.')
    return number
