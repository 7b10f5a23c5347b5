"""Groups whose completions all have the same reward: they have no advantage, so they teach nothing."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

Tie = Literal["low", "high", "between", "unscored"]

# Rewards are added up in single precision; TRL divides by a deviation of at least 1e-4.
_EQUAL = 1e-6


def total(rewards: Sequence[float], weights: Sequence[float]) -> float:
    """A completion's reward as TRL adds it up: NaN counts as 0 beside a number, and alone is NaN."""
    known = [weight * reward for weight, reward in zip(weights, rewards, strict=True) if not math.isnan(reward)]
    return math.fsum(known) if known else math.nan


def is_tied(rewards: Sequence[Sequence[float]], weights: Sequence[float], each: bool = False) -> bool:
    """Whether a group has no advantage: fewer than two completions with a reward, or equal ones.

    Args:
        rewards: (G, functions), NaN where a function gave none.
        weights: per function.
        each: every function has to be equal, as where TRL normalises them before it adds them up.
    """
    if each:
        columns = zip(*rewards, strict=True)
        return all(_equal([value for value in column if not math.isnan(value)]) for column in columns)
    return _equal([value for row in rewards if not math.isnan(value := total(row, weights))])


def _equal(values: list[float]) -> bool:
    return len(values) < 2 or max(values) - min(values) <= _EQUAL * max(1.0, max(map(abs, values)))


class Ranges:
    """The lowest and the highest value that each reward function gave so far.

    A function that has not shown its range is taken to go from 0 to 1; one that gave penalties only, up to 0.
    """

    def __init__(self) -> None:
        self.seen: dict[int, tuple[float, float]] = {}

    def widen(self, rewards: Sequence[Sequence[float]]) -> None:
        """Take the rewards (N, functions) of more completions in."""
        for row in rewards:
            for number, value in enumerate(row):
                if not math.isnan(value):
                    low, high = self.seen.get(number, (value, value))
                    self.seen[number] = (min(low, value), max(high, value))

    def of(self, number: int) -> tuple[float, float]:
        """The range that a function is taken to have."""
        low, high = self.seen.get(number, (0.0, 1.0))
        return min(0.0, low), 0.0 if low < 0 >= high else max(1.0, high)

    def tie(self, rewards: Sequence[Sequence[float]], weights: Sequence[float]) -> tuple[Tie, float]:
        """Where a tied group (G, functions) lies within what its functions can give, and its reward."""
        scored = [row for row in rewards if not math.isnan(total(row, weights))]
        if len(scored) < 2:
            return "unscored", 0.0
        value = total(scored[0], weights)
        ends = [sorted(weight * end for end in self.of(number)) for number, weight in enumerate(weights)]
        given = [number for number, reward in enumerate(scored[0]) if not math.isnan(reward)]
        near = _EQUAL * max(1.0, abs(value))
        if value <= math.fsum(ends[number][0] for number in given) + near:
            return "low", value
        if value >= math.fsum(ends[number][1] for number in given) - near:
            return "high", value
        return "between", value


def most_common(ties: Sequence[tuple[Any, float]], kind: Tie) -> float:
    """The reward at which most groups of one kind are tied."""
    return Counter(round(value, 6) for tie, value in ties if tie == kind).most_common(1)[0][0] + 0.0  # of -0 and 0, 0
