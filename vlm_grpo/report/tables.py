"""The two tables of a page: what the model wrote while it learned, and what it answers on held-out rows."""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from .embed import Embedder, Shown, labels_of, short
from .records import finite, number, read_jsonl

_MOST_SAMPLES, _MOST_OF_A_GROUP, _MOST_HELD_OUT = 160, 32, 100
# Of a text: characters and lines shown at once, those of both ends of a longer one, and characters in the page at all.
_WHOLE, _WHOLE_LINES, _END, _CUT = 320, 6, 120, 8000
_NOTHING = "(empty)"
_OURS = ("step", "prompt", "completion", "rewards", "advantage", "media", "media_files")


class Column(NamedTuple):
    """A column: its heading, its kind (``number``, ``text``, ``long``, ``media``), and whether a group repeats it."""

    title: str
    kind: str
    shared: bool = False


class Cell(NamedTuple):
    """One cell.

    Attributes:
        text: what it shows, or its beginning.
        rest: all that follows the beginning, folded away.
        tail: the last of it, shown while it is folded: answers stand at the end.
        cut: characters that are not in the page.
        value: what a number sorts by.
        fill: share of a bar behind it, 0 to 1.
        media: pictures and players.
        mark: ``right`` or ``wrong``.
    """

    text: str = ""
    rest: str = ""
    tail: str = ""
    cut: int = 0
    value: float | None = None
    fill: float | None = None
    media: tuple[Shown, ...] = ()
    mark: str = ""


class Row(NamedTuple):
    """Cells, and the group they belong to."""

    cells: list[Cell]
    group: int


class Table(NamedTuple):
    """A table of a page: ``name`` is its id, ``note`` says what is left out, ``sorted_by`` is a column's title."""

    name: str
    note: str
    columns: list[Column]
    rows: list[Row]
    sorted_by: str = ""


def samples_table(path: Path, embedder: Embedder, weights: Sequence[float] = ()) -> Table | None:
    """Of samples.jsonl the first group, the last, and others evenly between them; None where it has no line.

    Args:
        path: the file; a line that a kill has torn is left out.
        embedder: of the page.
        weights: of the rewards, in the order of the log; with them a column shows the weighted sum.
    """
    sizes = [(first, sum(1 for _ in lines)) for (first, _), lines in groupby(_grouped(path), key=_first_two)]
    if not sizes:
        return None
    chosen = _spread([size for _, size in sizes])
    groups: dict[int, list[dict[str, Any]]] = {index: [] for index in chosen}
    for index, _, record in _grouped(path):
        if index in groups and len(groups[index]) < _MOST_OF_A_GROUP:
            groups[index].append(record)
    for index in _ends_first(list(groups)):
        for record in groups[index]:
            embedder.load(record)
    records = [(index, record) for index, lines in groups.items() for record in lines]
    total = sum(size for _, size in sizes)
    note = "" if len(records) == total else f"{len(records):,} of {total:,} shown. samples.jsonl has all."
    return _samples(records, embedder, weights, note)


def _first_two(item: tuple[int, str, Any]) -> tuple[int, str]:
    return item[0], item[1]


def _grouped(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number, identity, record) of each line; adjacent lines of one step and one prompt are a group."""
    last, index = "", -1
    for record in read_jsonl(path):
        identity = json.dumps([record.get(key) for key in ("step", "prompt", "media", "answer")], default=str)
        if identity != last or index < 0:
            last, index = identity, index + 1
        yield index, identity, record


def _spread(sizes: list[int]) -> list[int]:
    """As many groups as fit, in order: the first, the last, and others at equal distances."""
    room = max(2, _MOST_SAMPLES * len(sizes) // max(1, sum(sizes)))
    if room >= len(sizes):
        return list(range(len(sizes)))
    return sorted({round(place * (len(sizes) - 1) / (room - 1)) for place in range(room)})


def _ends_first(indices: list[int]) -> list[int]:
    """Both ends, then the middle, then the quarters: whatever is cut off, the rest is spread evenly."""
    count = len(indices)
    weight = {place: place & -place for place in range(1, count - 1)}
    weight |= {0: count * 2, count - 1: count * 2}
    return [indices[place] for place in sorted(weight, key=lambda place: -weight[place])]


def _samples(records: list[tuple[int, Any]], embedder: Embedder, weights: Sequence[float], note: str) -> Table:
    every = [record for _, record in records]
    names = list(dict.fromkeys(str(name) for record in every for name in _rewards(record)))
    weight_of = dict(zip(names, weights, strict=True)) if len(weights) == len(names) else {}
    watched = [name for name, weight in weight_of.items() if weight == 0]
    with_sum = len(names) > 1 and bool(weight_of)
    logged = list(dict.fromkeys(str(key) for record in every for key in record if key not in _OURS))
    extra = [key for key in logged if any(record.get(key) not in (None, "") for record in every)]
    figures = [
        key
        for key in extra
        if key != "answer" and all(isinstance(record.get(key), (float, NoneType)) for record in every)
    ]
    with_media = any(record.get("media") or record.get("media_files") for record in every)
    columns = [Column("step", "number")]
    columns += [Column("media", "media", True)] if with_media else []
    columns += [Column("prompt", "long", True), Column("completion", "long")]
    columns += [Column(name, "text") for name in extra if name not in figures]
    columns += [Column("reward", "number")] if with_sum else []
    columns += [Column(f"{name} (watched)" if name in watched else name, "number") for name in names]
    columns += [Column(name, "number") for name in figures]
    columns += [Column("advantage", "number")]
    values = {name: [finite(_rewards(record).get(name)) for record in every] for name in names}
    sums = [_weighted([values[name][row] for name in names], weights) for row in range(len(every))] if with_sum else []
    advantages = [finite(record.get("advantage")) for record in every]
    rows = []
    for place, (group, record) in enumerate(records):
        cells = [number_cell(record.get("step"))]
        cells += [Cell(media=tuple(embedder.place(record)))] if with_media else []
        cells += [text_cell(shortened(record)), text_cell(record.get("completion"), empty=_NOTHING)]
        cells += [text_cell(record.get(name)) for name in extra if name not in figures]
        cells += [number_cell(sums[place], sums)] if with_sum else []
        cells += [number_cell(values[name][place], values[name]) for name in names]
        cells += [number_cell(record.get(name)) for name in figures]
        rows.append(Row([*cells, number_cell(advantages[place])], group))
    return Table("samples", note, columns, rows)


def _rewards(record: dict[str, Any]) -> dict[str, Any]:
    rewards = record.get("rewards")
    return rewards if isinstance(rewards, dict) else {}


def _weighted(values: list[float | None], weights: Sequence[float]) -> float | None:
    known = [value * weight for value, weight in zip(values, weights, strict=True) if value is not None]
    return sum(known) if known else None


def number_cell(value: Any, column: Sequence[float | None] = ()) -> Cell:
    """A number, with a bar behind it where ``column`` has the others."""
    found = finite(value)
    if found is None:
        return Cell("–")
    known = [other for other in column if other is not None]
    low, high = (min(0.0, *known), max(0.0, *known)) if known else (0.0, 0.0)
    return Cell(number(round(found, 4)), value=found, fill=(found - low) / (high - low) if high > low else None)


def text_cell(value: Any, mark: str = "", empty: str = "") -> Cell:
    """Any value as text: long ones folded, huge ones cut, what no file can hold replaced."""
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    text = text.encode("utf-8", "replace").decode().strip()
    if len(text) <= _WHOLE and text.count("\n") < _WHOLE_LINES:
        return Cell(text or empty, mark=mark)
    head = _begun(text)
    rest = text[len(head) :]
    tail = rest[-_END:].partition("\n\n")[2] or rest[-_END:] if len(rest) > _END else rest
    return Cell(head, rest[:_CUT], tail.lstrip(), max(0, len(rest) - _CUT), mark=mark)


def _begun(text: str) -> str:
    """The first lines or letters of a long text."""
    lines = text[:_END].split("\n", 3)
    return "\n".join(lines[:3]) if len(lines) > 3 else text[:_END]


def shortened(record: dict[str, Any]) -> str:
    """The prompt, its media's paths without their folders."""
    prompt = record.get("prompt")
    prompt = prompt if isinstance(prompt, str) else "" if prompt is None else json.dumps(prompt, ensure_ascii=False)
    for label in labels_of(record):
        prompt = prompt.replace(f"[{label}]", f"[{short(label)}]")
    return prompt


# ---- held-out rows ----------------------------------------------------------------------------------------------

_CHANGES = {(False, True): "newly right", (True, False): "newly wrong", (True, True): "right", (False, False): "wrong"}


def held_out_table(path: Path, embedder: Embedder, controls: dict[str, str]) -> Table | None:
    """Of evaluation.jsonl the rows whose answers changed first, and others evenly; None where it has no line.

    Args:
        path: the file: a line a row and state.
        embedder: of the page.
        controls: what was done to the media, by the states that are controls.
    """
    titles = {"before": "before", "after": "after"} | controls
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for record in read_jsonl(path):
        if str(record.get("state")) in titles:
            found.setdefault(json.dumps(record.get("row")), {})[str(record["state"])] = record
    rows = list(found.values())
    if not rows:
        return None
    chosen = _telling(rows)
    for place in _ends_first(chosen):
        embedder.load(_any(rows[place]))
    states = [state for state in titles if any(state in row for row in rows)]
    changed = {"before", "after"} <= set(states)
    with_media = any(_any(row).get("media") or _any(row).get("media_files") for row in rows)
    columns = [Column("row", "number")] + ([Column("media", "media")] if with_media else [])
    columns += [Column("prompt", "long"), Column("answer", "text")]
    columns += [Column(titles[state], "long") for state in states]
    columns += [Column("change", "text")] if changed else []
    out = []
    for place in chosen:
        row, record = rows[place], _any(rows[place])
        cells = [number_cell(record.get("row"))] + ([Cell(media=tuple(embedder.place(record)))] if with_media else [])
        cells += [text_cell(shortened(record)), text_cell(record.get("answer"))]
        cells += [_answer(row.get(state)) for state in states]
        cells += [Cell(_change(row))] if changed else []
        out.append(Row(cells, place))
    note = f"{len(chosen):,} of {len(rows):,} shown: up to {_MOST_HELD_OUT // 2} whose answers became right or wrong, "
    note += "the others evenly spread. evaluation.jsonl has all."
    return Table("held-out", "" if len(chosen) == len(rows) else note, columns, out)


def _any(row: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The record that tells most of a row: the control's media are blank."""
    return next(row[state] for state in ("after", "before", *row) if state in row)


def _answer(record: dict[str, Any] | None) -> Cell:
    if record is None:
        return Cell("–")
    right = record.get("correct")
    mark = {True: "right", False: "wrong"}.get(right, "") if isinstance(right, bool) else ""
    return text_cell(record.get("completion"), mark, _NOTHING)


def _change(row: dict[str, dict[str, Any]]) -> str:
    before, after = (row.get(state, {}).get("correct") for state in ("before", "after"))
    return _CHANGES.get((before, after), "") if isinstance(before, bool) and isinstance(after, bool) else ""


def _telling(rows: list[dict[str, dict[str, Any]]]) -> list[int]:
    """The places of the rows to show, in order."""
    if len(rows) <= _MOST_HELD_OUT:
        return list(range(len(rows)))
    changed = [place for place, row in enumerate(rows) if _change(row).startswith("newly")]
    changed = evenly(changed, _MOST_HELD_OUT // 2)
    others = [place for place in range(len(rows)) if place not in set(changed)]
    return sorted([*changed, *evenly(others, _MOST_HELD_OUT - len(changed))])


def evenly(places: list[int], most: int) -> list[int]:
    """At most so many of them, at equal distances."""
    if len(places) <= most:
        return places
    return [places[round(index * (len(places) - 1) / (most - 1))] for index in range(most)]
