"""A score as a number within its range."""

import math
from typing import Any

from ..failed import Failed
from .options import ApiOptions


def score_of(value: Any, options: ApiOptions) -> float | Failed:
    """The score as a finite float, mapped to [0, 1] where the options have a range; else what is wrong with it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return Failed("a score that is no number")
    try:
        number = float(value)
    except OverflowError:
        return Failed("a score that is not finite")
    if not math.isfinite(number):
        return Failed("a score that is not finite")
    if options.scale is None:
        return number
    low, high = options.scale
    if not low <= number <= high:
        return Failed("a score out of range")
    return (number - low) / (high - low)
