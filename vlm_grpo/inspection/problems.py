"""What is wrong with which rows: gathered as they come, said once for all rows that have it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_TEXTS = 1000  # different problems kept
_ROWS = 1000  # row numbers kept for each
# Between what is wrong and what to do about it: a full stop and a capital letter, the last of them.
_LAST_SENTENCE = re.compile(r"(?s)(.*[.!?)\"'])\s+([A-Z][^.]*(?:\.(?!\s)[^.]*)*\.?)$")
_REMOVE = "Correct or remove the row."


@dataclass
class Problem:
    """One thing that is wrong.

    Attributes:
        what: is wrong.
        fix: what to do.
        rows: the first rows that have it, as a user finds them.
        count: of all such rows.
    """

    what: str
    fix: str
    rows: list[int] = field(default_factory=list)
    count: int = 0


class Problems:
    """Every problem of a file; the first 1,000 different ones with their rows, of all others the number.

    Attributes:
        count: all of them, one for each row.
        unlisted: how many of these are of no listed ``Problem``.
    """

    def __init__(self) -> None:
        self.count = self.unlisted = 0
        self._bad: set[int] = set()
        self._listed: dict[tuple[str, str], Problem] = {}

    def add(self, row: int, what: str, fix: str = _REMOVE) -> None:
        self.count += 1
        self._bad.add(row)
        key = (what, fix)
        if key not in self._listed:
            if len(self._listed) >= _TEXTS:
                self.unlisted += 1
                return
            self._listed[key] = Problem(what, fix)
        problem = self._listed[key]
        problem.count += 1
        if len(problem.rows) < _ROWS:
            problem.rows.append(row)

    def add_rows(self, rows: list[int], count: int, what: str, fix: str = _REMOVE) -> None:
        """One thing that ``count`` rows have, of which the first are given."""
        for row in rows:
            self.add(row, what, fix)
        self.count += count - len(rows)
        if (what, fix) in self._listed:
            self._listed[what, fix].count += count - len(rows)

    def add_error(self, row: int, error: Exception, where: str) -> None:
        """One of our errors, whose message is: what with its value — where. What to do."""
        self.add(row, *in_two(str(error), where))

    @property
    def bad_rows(self) -> int:
        """How many rows have one or more."""
        return len(self._bad)

    def __iter__(self) -> Iterator[Problem]:
        """By their first rows."""
        return iter(sorted(self._listed.values(), key=lambda problem: problem.rows[0]))

    def __contains__(self, row: int) -> bool:
        return row in self._bad


def in_two(message: str, where: str) -> tuple[str, str]:
    """(what is wrong, what to do) of one of our messages, without ``where``, which a table says beside it."""
    text = message.removeprefix(f"{where}: ").replace(f" — {where}", "").replace(f"{where}, ", "")
    text = " ".join(text.split())
    match = _LAST_SENTENCE.match(text)
    what, fix = (match[1], match[2]) if match else (text, _REMOVE)
    what = what.rstrip(".")
    return what[:1].upper() + what[1:], fix
