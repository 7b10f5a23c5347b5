"""What every row format is made of."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import DataFormatError
from ...media import KINDS, Kind
from ...tags import answer_body
from ..sample import at, media_count, shorten

PATHS: dict[str, Kind] = {f"{kind}_path": kind for kind in KINDS}


@dataclass(frozen=True)
class Tags:
    """Names inside a turn, where a file has its own: those of ``tags`` in LLaMA-Factory's ``dataset_info.json``.

    Attributes:
        role, content: the keys of a turn; None tries ``from``/``value`` and ``role``/``content``.
        roles: what a file calls a role, and the role it is.
    """

    role: str | None = None
    content: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """What a format knows beside the row itself.

    Attributes:
        where: how the user finds the row again.
        media: how many media of each kind the row's columns hold; None where that is not known yet.
        tags: how a file names its roles.
    """

    where: str = ""
    media: Mapping[Kind, int | None] = field(default_factory=dict)
    tags: Tags = Tags()

    @classmethod
    def of(cls, row: dict[str, Any], where: str, tags: Tags) -> "Reading":
        return cls(where, {kind: media_count(row, kind) for kind in KINDS}, tags)

    def refuse(self, sentence: str) -> DataFormatError:
        return DataFormatError(at(self.where, sentence))


@dataclass(frozen=True)
class Read:
    """What a format makes of a row.

    Attributes:
        columns: what it writes: ``prompt``, ``answer``, ``completion`` and whatever it has to keep beside them.
        used: columns that are wholly in these, and go.
    """

    columns: dict[str, Any]
    used: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """One format of rows.

    Attributes:
        name: what ``format=`` calls it.
        recognised_by: one sentence for the user.
        example: a row.
        needs: the columns a row must have; of each tuple one.
        read: makes it canonical.
        media: other names for media columns, where a row has none under their own names.
    """

    name: str
    recognised_by: str
    example: dict[str, Any]
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[dict[str, Any], Reading], Read]
    media: Mapping[str, Kind] = field(default_factory=lambda: PATHS)

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Whether a row (or whatever maps its columns to values) has all that this format needs."""
        return all(any(row.get(name) is not None for name in names) for names in self.needs)

    def missing(self, row: Mapping[str, Any]) -> list[str]:
        """The columns that a row lacks, alternatives joined by " or "."""
        wanted = [names for names in self.needs if not any(row.get(name) is not None for name in names)]
        return [" or ".join(f'"{name}"' for name in names) for names in wanted]


def answered(row: dict[str, Any], turn: str | None) -> dict[str, Any]:
    """``{"answer": ...}`` of a row without its own: of its ``solution``, else of the turn that was the answer."""
    if row.get("answer") is not None:
        return {}
    given = turn if row.get("solution") is None else row["solution"]
    if not isinstance(given, str):
        return {"answer": given}
    body = answer_body(given)
    return {"answer": given if body == given else body.strip()}


def kept(row: dict[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
    """The columns to write, with those of the row that they would replace under another name: nothing is lost."""
    lost = {f"original_{name}": row[name] for name in columns if row.get(name) is not None}
    return {**columns, **lost}


def assistant(content: str | None, **more: Any) -> list[dict[str, Any]] | None:
    """A completion of one message; None where there is none."""
    return None if content is None else [{"role": "assistant", "content": content, **more}]


def text_of(row: dict[str, Any], column: str, reading: Reading, needed: bool = False) -> str | None:
    """A column that holds a text, or nothing.

    Raises:
        DataFormatError: something else.
    """
    value = row.get(column)
    if value is None and not needed:
        return None
    if not isinstance(value, str) or (needed and not value.strip()):
        raise reading.refuse(f'"{column}" is {shorten(value)}. Give a text.')
    return value


def listed(value: Any) -> Any:
    """A list written as JSON, which is how a CSV file holds one, as that list; anything else itself."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value
