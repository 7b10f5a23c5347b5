"""Does the completion repeat itself?"""

from dataclasses import dataclass
from typing import Any

from ..errors import RewardError
from .length import UNITS
from .options import check_name, check_number
from .words import Unit, in_units


@dataclass(eq=False)
class Repetition:
    """``max_penalty`` times the share of n-grams that were there before; in [max_penalty, 0].

    TRL's function (Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning", appendix C.2), on tokens or on
    words. A completion shorter than ``ngram`` has no n-gram and gets 0.

    Args:
        ngram: its length, in ``unit``.
        max_penalty: of a completion that is nothing but repetition; at most 0.
        unit: ``tokens`` (TRL's ``completion_ids``), ``words`` (lower-case; in scripts written without spaces each
            character; "hahaha" is one word) or ``characters``.

    Raises:
        RewardError: options that cannot be, no ``completion_ids``.
    """

    ngram: int = 3
    max_penalty: float = -1.0
    unit: Unit = "tokens"

    __name__ = "repetition"

    def __post_init__(self) -> None:
        check_name("unit", self.unit, UNITS)
        check_number("ngram", self.ngram, 1)
        check_number("max_penalty", self.max_penalty)
        if self.max_penalty > 0:
            raise RewardError(f"max_penalty is {self.max_penalty}. Give a number of at most 0.")

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        from trl.rewards.other_rewards import get_repetition_penalty_reward

        parts = in_units(completions, columns, self.unit)
        return get_repetition_penalty_reward(self.ngram, self.max_penalty)(parts)
