"""Whole groups stay together: TRL shuffles and splits a list with one entry per group instead of per completion."""

import math
from typing import Any

import torch
from torch import Tensor

_UNITS = "units"


def unit_of(batch_size: int, num_generations: int) -> int:
    """The rows that must stay together: the largest equal part of a group of which a micro-batch holds whole ones."""
    return math.gcd(batch_size, num_generations)


def advice(batch_size: int, num_generations: int) -> str | None:
    """What a micro-batch of ``batch_size`` rows loses, where it is neither whole groups nor an equal part of one."""
    unit = unit_of(batch_size, num_generations)
    if unit in (batch_size, num_generations):
        return None
    good = [
        n for n in range(1, 2 * batch_size + num_generations) if unit_of(n, num_generations) in (n, num_generations)
    ]
    nearest = min(good, key=lambda n: (abs(n - batch_size), -n))
    return (
        f"per_device_train_batch_size={batch_size} holds groups of num_generations={num_generations} only in parts of "
        f"{unit}: each prompt is processed {num_generations // unit} times instead of once. The nearest size without "
        f"that loss is {nearest}."
    )


def to_units(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """Every entry with one value per row becomes a list with one value per ``size`` adjacent rows.

    Args:
        batch: tensors and lists over rows, of whatever names; tensors without dimensions, numbers and None stay.
        size: rows of a unit.
    """
    rows = len(batch["completion_ids"])
    count = torch.arange(rows // size)  # what TRL's helpers count: the first entry

    def split(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == rows:
            return list(value.split(size))
        if isinstance(value, (list, tuple)) and len(value) == rows:
            return [list(value[start : start + size]) for start in range(0, rows, size)]
        return value

    return {_UNITS: count, **{key: split(value) for key, value in batch.items()}}


def from_units(batch: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``to_units``, for any selection of units in any order."""

    def join(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if isinstance(value[0], Tensor):
            return torch.cat(value)
        return [row for unit in value for row in unit]

    return {key: join(value) for key, value in batch.items() if key != _UNITS}
