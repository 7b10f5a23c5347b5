"""What the parts of a report share: reading what a run logged, and how numbers and times are written."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; a line torn by a kill is left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


def finite(value: Any) -> float | None:
    """The number; None of what is none, and of NaN and infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def series(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """The steps and values of one metric, where both are finite numbers."""
    pairs = ((finite(record.get("step")), finite(record.get(key))) for record in records)
    known = [(step, value) for step, value in pairs if step is not None and value is not None]
    return [step for step, _ in known], [value for _, value in known]


def number(value: float, _position: object = None) -> str:
    """``0.25``, ``1e-5``: short, the same on every panel, and no offset text above the axis."""
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def duration(seconds: float) -> str:
    """``0:07``, ``12:30``, ``3:05:00``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
