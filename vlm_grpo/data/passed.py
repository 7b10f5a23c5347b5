"""Rows chosen by how often the model solves them: neither too easy nor too hard to learn from."""

import logging
from typing import Any

from ..errors import ConfigError, DataFormatError
from .sample import shorten

logger = logging.getLogger("vlm_grpo")

COLUMN = "pass_rate"


class PassRates:
    """Bounds of the column ``pass_rate``, from 0 to 1, both included; a bound that is None is none.

    Raises:
        ConfigError: bounds that leave no room.
    """

    def __init__(self, name: str, low: float | None, high: float | None) -> None:
        for option, value in (("min_pass_rate", low), ("max_pass_rate", high)):
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{option}={value} is no share. Give a number from 0 to 1.")
        if low is not None and high is not None and low > high:
            raise ConfigError(f"min_pass_rate={low} is more than max_pass_rate={high}. Swap them.")
        self.name, self.low, self.high = name, low, high
        self._seen = self._kept = 0

    def __bool__(self) -> bool:
        return self.low is not None or self.high is not None

    def keeps(self, row: dict[str, Any], where: str) -> bool:
        """Whether a row lies within the bounds.

        Raises:
            DataFormatError: it has no ``pass_rate``, or one that is no share.
        """
        if not self:
            return True
        rate = row.get(COLUMN)
        if rate is None:
            raise DataFormatError(
                f'{where}: the row has no "{COLUMN}", which min_pass_rate and max_pass_rate look at. Let the model '
                "write it, and give its file: vlm-grpo eval MODEL --data FILE --samples K --save-rows OUT."
            )
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
            raise DataFormatError(f'{where}: "{COLUMN}" is {shorten(rate)}. Give a share from 0 to 1.')
        keeps = (self.low is None or rate >= self.low) and (self.high is None or rate <= self.high)
        self._seen, self._kept = self._seen + 1, self._kept + keeps
        return keeps

    def keeps_numbered(self, row: dict[str, Any], index: int) -> bool:
        """``keeps`` for a row by its position from 0."""
        return self.keeps(row, f"{self.name} row {index + 1}")

    def kept(self, dataset: Any, limit: int | None) -> list[int] | None:
        """The positions of a table's rows within the bounds, at most so many; None where there are no bounds."""
        if not self:
            return None
        if COLUMN not in dataset.column_names:
            self.keeps({}, self.name)
        self.begin()
        kept: list[int] = []
        for position, rate in enumerate(dataset.select_columns([COLUMN]).with_format(None)[COLUMN]):
            if limit is not None and len(kept) == limit:
                break
            if self.keeps_numbered({COLUMN: rate}, position):
                kept.append(position)
        self.end()
        return kept

    def begin(self) -> None:
        """Count anew."""
        self._seen = self._kept = 0

    def end(self) -> None:
        """Say how many rows were left out.

        Raises:
            DataFormatError: all of them.
        """
        if not self or not self._seen:
            return
        bounds = f"{0 if self.low is None else self.low:g} to {1 if self.high is None else self.high:g}"
        if not self._kept:
            raise DataFormatError(f"{self.name}: no row has a {COLUMN} from {bounds}. Widen the bounds.")
        if self._kept < self._seen:
            logger.warning(
                "%s: %d of %d rows are left out, whose %s is not from %s.",
                *(self.name, self._seen - self._kept, self._seen, COLUMN, bounds),
            )
