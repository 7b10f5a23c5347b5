"""Figures of a stream of rows, of any length, in memory that does not grow with it."""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

_KEPT = 100_000  # values of which quantiles are taken; beyond, a fair draw of them
_DISTINCT = 10_000
_PATHS = 500  # keys of nested objects, which free text as a key would make endless
_ROWS = 20  # row numbers kept for each type of a column
_EXAMPLE = 60  # characters


class Spread:
    """Least, median, 95th percentile and most of a stream of numbers."""

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0
        self.least = self.most = 0.0
        self._values: list[float] = []
        self._draw = random.Random(0)

    def add(self, value: float) -> None:
        self.least = value if not self.count else min(self.least, value)
        self.most = value if not self.count else max(self.most, value)
        self.count += 1
        self.total += value
        if len(self._values) < _KEPT:
            self._values.append(value)
        elif (place := self._draw.randrange(self.count)) < _KEPT:  # reservoir sampling
            self._values[place] = value

    def quantile(self, share: float) -> float:
        """The smallest value that at least ``share`` of all values do not exceed."""
        ordered = sorted(self._values)
        return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]

    def as_dict(self) -> dict[str, float]:
        """``min``, ``median``, ``p95``, ``max``; empty where there was no number."""
        if not self.count:
            return {}
        return {"min": self.least, "median": self.quantile(0.5), "p95": self.quantile(0.95), "max": self.most}


class Distinct:
    """How many different values, counted up to 10,000."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def add(self, value: Any) -> None:
        if len(self._seen) <= _DISTINCT:
            self._seen.add(fingerprint(value))

    def __len__(self) -> int:
        return min(len(self._seen), _DISTINCT)

    @property
    def more(self) -> bool:
        """Whether there are more than were counted."""
        return len(self._seen) > _DISTINCT


class Column:
    """One column, or one key inside of its objects: which types it holds, how often, and where first."""

    def __init__(self, name: str) -> None:
        self.name, self.filled = name, 0
        self.types: Counter[str] = Counter()
        self.first: dict[str, list[int]] = {}
        self.distinct, self.example = Distinct(), ""

    def add(self, row: int, value: Any) -> None:
        kind = type_of(value)
        self.types[kind] += 1
        rows = self.first.setdefault(kind, [])
        if len(rows) < _ROWS and (not rows or rows[-1] != row):
            rows.append(row)


class Columns:
    """All columns of the rows, and the keys inside of their objects and lists."""

    def __init__(self) -> None:
        self.rows = 0
        self._paths: dict[str, Column] = {}
        self._top: dict[str, None] = {}

    def add(self, number: int, row: dict[str, Any]) -> None:
        self.rows += 1
        for name, value in row.items():
            self._top[name] = None
            self._add(number, name, value)
            if not is_empty(value):
                column = self._paths[name]
                column.filled += 1
                column.distinct.add(value)
                column.example = column.example or shortened(value)

    def _add(self, number: int, path: str, value: Any, nested: bool = False) -> None:
        if path not in self._paths:
            if nested and len(self._paths) >= _PATHS:
                return
            self._paths[path] = Column(path)
        if value is None:
            return
        self._paths[path].add(number, value)
        if isinstance(value, dict):
            for key, inner in value.items():
                self._add(number, f"{path}.{key}", inner, nested=True)
        elif isinstance(value, (list, tuple)):
            for inner in value[:100]:
                self._add(number, f"{path}[]", inner, nested=True)

    def __iter__(self) -> Iterator[Column]:
        """The columns themselves, in their order."""
        return (self._paths[name] for name in self._top)

    def type_text(self, column: Column) -> str:
        """``text``, ``list of number``, or several of them with their shares."""
        total = sum(column.types.values())
        texts = []
        for kind, count in column.types.most_common():
            inner = self._paths.get(f"{column.name}[]") if kind == "list" else None
            text = f"list of {' and '.join(inner.types)}" if inner and inner.types else kind
            texts.append(text if count == total else f"{text} ({count / total:.0%})")
        return ", ".join(texts) or "empty"

    def mixed(self, without: tuple[str, ...] = ()) -> Iterator[tuple[Column, str, str]]:
        """(column or key, its usual type, another one it holds), where one table cannot hold both.

        Args:
            without: columns that are not looked at.
        """
        for path, column in self._paths.items():
            if len(column.types) < 2 or path.split(".")[0].split("[")[0] in without:
                continue
            usual = column.types.most_common(1)[0][0]
            yield from ((column, usual, kind) for kind in column.types if kind != usual)


def type_of(value: Any) -> str:
    """What a table calls it: whole numbers and others are one type, since they fit into one column."""
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict):
        return "file" if value.keys() == {"bytes", "path"} else "object"
    if isinstance(value, (list, tuple)):
        return "list"
    return "bytes" if isinstance(value, (bytes, bytearray, memoryview)) else type(value).__name__


def is_empty(value: Any) -> bool:
    """None, blank text, or a list or object without anything inside."""
    if value is None or isinstance(value, str):
        return not (value or "").strip()
    return isinstance(value, (list, tuple, dict)) and not value


def fingerprint(value: Any) -> int:
    """A hash of values as rows hold them: equal values have equal ones."""
    if isinstance(value, dict):
        # Arrow fills the keys that a row lacks with None.
        return hash(tuple((key, fingerprint(value[key])) for key in sorted(value, key=str) if value[key] is not None))
    if isinstance(value, (list, tuple)):
        return hash(tuple(map(fingerprint, value)))
    if isinstance(value, (bytearray, memoryview)):
        return hash(bytes(value))
    return hash(value) if value.__hash__ is not None else hash(repr(value))


def shortened(value: Any, length: int = _EXAMPLE) -> str:
    """A value on one line, cut to ``length`` characters: the texts of messages, the number of bytes."""
    if not isinstance(value, str):
        value = _said(value) or _without_bytes(value)
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _said(value: Any) -> str | None:
    """What messages say, each medium as its kind in brackets; None of anything else."""
    if not (isinstance(value, list) and value and all(isinstance(m, dict) and "content" in m for m in value)):
        return None
    contents = [m["content"] if isinstance(m["content"], list) else [{"text": m["content"]}] for m in value]
    parts = [part for content in contents for part in content if isinstance(part, dict)]
    return " ".join(str(part.get("text") or f"[{part.get('type')}]") for part in parts)


def _without_bytes(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:  # a cell of a media column
            return value["path"] or _without_bytes(value["bytes"])
        return {key: _without_bytes(inner) for key, inner in value.items()}
    return [_without_bytes(inner) for inner in value[:10]] if isinstance(value, (list, tuple)) else value
