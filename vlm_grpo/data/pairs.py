"""Pairs of answers, of which one is better: what a reward model learns from."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import DataFormatError
from ..media import KINDS
from .columns import remembering, undecoded
from .formats import as_canonical
from .formats.base import Reading, listed
from .formats.preference import implicit, is_conversation
from .formats.table import beside
from .sample import shorten

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

_TRL = ("chosen", "rejected")
_OUTPUTS = ("output_1", "output_2")
_READ = ("prompt", *_TRL, *_OUTPUTS, "preference")
_SHOWN = 20  # numbers of rows in a message
_CHUNK = 1000  # rows that are in memory as Python objects at a time
_NO_PAIR = 'Give "chosen" and "rejected", or "output_1", "output_2" and "preference".'


def as_pairs(dataset: Any, where: str = "") -> Any:
    """A dataset whose rows are canonical (see ``as_canonical``) and have the texts ``chosen`` and ``rejected``.

    A row gives its pair in one of these ways:

    - ``chosen`` and ``rejected`` beside a ``prompt`` (or what a format makes one of, such as ``question``): texts, or
      lists of one message;
    - ``chosen`` and ``rejected`` as conversations that differ in the last answer (TRL's implicit prompt);
    - ``output_1``, ``output_2`` and ``preference``, 1 or 2 (LLaVA-Human-Preference): ``conversations`` ends before
      the turn that is judged, or with a turn in its place, which the outputs replace. An output is a text or
      ``{"from", "value"}``.

    Every other column stays, media columns uncopied; ``preference`` too, since it says which answer stood first. A
    table is read at once, in chunks; a stream as it comes.

    Args:
        dataset: what ``load_data`` returns, or any ``datasets`` table or stream, several of them in a dict, a list of
            rows, or None.
        where: what messages call it; they end in the number of the row, from 1.

    Raises:
        DataFormatError: a row that is no pair, or whose answers are the same, hold media or are no texts.
    """
    import datasets

    if dataset is None:
        return None
    if isinstance(dataset, dict):  # several, by name
        parts = {name: as_pairs(part, f"{where} {name}".strip()) for name, part in dataset.items()}
        return datasets.DatasetDict(parts) if isinstance(dataset, datasets.DatasetDict) else parts
    if isinstance(dataset, datasets.IterableDataset):
        return _stream(dataset, where)
    dataset = as_canonical(dataset, where)
    if not isinstance(dataset, datasets.Dataset):
        return [_row(where, row, index) for index, row in enumerate(dataset)]
    if dataset.format["type"] == "custom":
        raise DataFormatError(
            f"{where or 'The dataset'} makes its rows by a transform, so its pairs cannot be read beforehand. Leave "
            "the transform out: media are opened only when a step needs them."
        )
    return _table(dataset, where) if len(dataset) else dataset


def _stream(dataset: "IterableDataset", where: str) -> "IterableDataset":
    plain: Any
    plain, pictures = undecoded(dataset)
    rows = as_canonical(plain, where)
    names = rows.column_names or list(next(iter(rows.take(1)), {}))
    gone = [name for name in _OUTPUTS if name in names]
    return remembering(rows.map(partial(_row, where), with_indices=True, remove_columns=gone), pictures)


def _table(dataset: "Dataset", where: str) -> "Dataset":
    import datasets

    format_ = dataset.format
    dataset = dataset.with_format(None)
    written = _written(dataset, where)
    rest = [name for name in dataset.column_names if name not in (*written.column_names, *_OUTPUTS)]
    pairs = datasets.Dataset(written)
    whole = beside(pairs, dataset.select_columns(rest)) if rest else pairs
    return whole.with_format(format_["type"]) if format_["type"] else whole


def _written(dataset: "Dataset", where: str) -> "pa.Table":
    """The columns ``chosen`` and ``rejected``, and ``prompt`` where the pairs bring their own."""
    import pyarrow as pa

    tables: list[pa.Table] = []
    same: list[tuple[int, dict[str, Any]]] = []
    own = False
    try:
        for chunk in _chunks(dataset):
            start = sum(table.num_rows for table in tables)
            pairs = [_pair(row, _reading(where, start + number)) for number, row in enumerate(chunk)]
            same += [(start + number, pair) for number, pair in enumerate(pairs) if _is_same(pair)]
            own = own or any("prompt" in pair for pair in pairs)
            tables.append(
                pa.Table.from_pylist(
                    [{"prompt": row.get("prompt"), **pair} for row, pair in zip(chunk, pairs, strict=True)]
                )
            )
        if same:
            raise _same(where, *same[0]) if len(same) == 1 else _all_the_same(where, [row + 1 for row, _ in same])
        table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    except pa.ArrowException as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise DataFormatError(
            f'{where or "The dataset"}: "prompt" would mix types ({reason}). Give every row its pair in the same way.'
        ) from error
    return table if own else table.select(list(_TRL))


def _chunks(dataset: "Dataset") -> Iterator[list[dict[str, Any]]]:
    names = [name for name in _READ if name in dataset.column_names]
    chunks: Any = dataset.select_columns(names).iter(batch_size=_CHUNK)
    for chunk in chunks:
        yield [dict(zip(names, values, strict=True)) for values in zip(*(chunk[name] for name in names), strict=True)]


def _row(where: str, row: dict[str, Any], index: int) -> dict[str, Any]:
    rest = {name: value for name, value in row.items() if name not in _OUTPUTS}
    pair = _pair(row, _reading(where, index))
    if _is_same(pair):
        raise _same(where, index, pair)
    return {**rest, **pair}


def _reading(where: str, index: int) -> Reading:
    return Reading(f"{where} row {index + 1}".strip())


def _pair(row: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    """``chosen`` and ``rejected``, and ``prompt`` where the row's own is not the prompt of these."""
    if any(row.get(name) is not None for name in _TRL):
        pair = _preferred(row, reading)
    elif any(row.get(name) is not None for name in _OUTPUTS):
        pair = _compared(row, reading)
    else:
        raise reading.refuse(f"the row holds no two answers. {_NO_PAIR}")
    return pair


def _is_same(pair: Mapping[str, Any]) -> bool:
    return pair["chosen"].strip() == pair["rejected"].strip()


def _same(where: str, index: int, pair: Mapping[str, Any]) -> DataFormatError:
    return _reading(where, index).refuse(
        f"both answers are {shorten(pair['chosen'])}, so neither is better. Remove the row, or correct one of them."
    )


def _all_the_same(where: str, rows: list[int]) -> DataFormatError:
    """All such rows at once: of thousands, one error a row would be a start of the run for each."""
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return DataFormatError(
        f"{where or 'The dataset'} rows {', '.join(map(str, rows[:_SHOWN]))}{more}: both answers are the same, so "
        "neither is better. Remove these rows, or correct one answer of each."
    )


def _both(row: Mapping[str, Any], names: tuple[str, str], reading: Reading) -> None:
    for name, other in (names, names[::-1]):
        if row.get(name) is None:
            raise reading.refuse(f'the row is no pair: it has "{other}" but no "{name}". {_NO_PAIR}')


def _preferred(row: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    _both(row, _TRL, reading)
    if not any(is_conversation(row[name]) for name in _TRL):
        return {name: _text(row[name], name, reading) for name in _TRL}
    pair = implicit(dict(row), reading)
    if isinstance(row.get("prompt"), str):  # some files give the question a second time, as a text
        return pair
    if _said(pair["prompt"]) != _said(row["prompt"]):
        raise reading.refuse(
            '"chosen" and "rejected" are whole conversations, and they begin otherwise than "prompt". Give the answers '
            'alone, or leave "prompt" out.'
        )
    return {name: pair[name] for name in _TRL}


def _said(messages: Any) -> list[tuple[str, str]]:
    """(role, text) of each message."""
    said = []
    for message in messages:
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
        said.append((message["role"], "".join(parts)))
    return said


def _compared(row: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    _both(row, _OUTPUTS, reading)
    preference = row.get("preference")
    if preference is None:
        raise reading.refuse('"preference" is missing. Give 1 or 2, the number of the better output.')
    if isinstance(preference, str) and preference.strip() in ("1", "2"):
        preference = int(preference)
    if isinstance(preference, bool) or preference not in (1, 2):
        raise reading.refuse(f'"preference" is {shorten(preference)}. Give 1 or 2, the number of the better output.')
    texts = [_text(row[name], name, reading) for name in _OUTPUTS]
    return dict(zip(_TRL, texts if preference == 1 else reversed(texts), strict=True))


def _text(value: Any, name: str, reading: Reading) -> str:
    """What an answer says: a text, a message, or a list of one message or of text parts."""
    given = value
    read = listed(value)
    if isinstance(read, list) and read and all(_is_turn(turn) for turn in read):
        value = read  # also JSON in a CSV file, where any other list that a text looks like is an answer
    if isinstance(value, (list, tuple)) and all(_is_turn(turn) for turn in value):
        if len(value) != 1:
            raise reading.refuse(f'"{name}" has {len(value)} messages. Give one, the answer.')
        value = value[0]
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("value", "content") if value.get(key) is not None), None)
    if isinstance(value, (list, tuple)):
        value = "".join(_part(part, name, reading) for part in value)
    if not isinstance(value, str):
        raise reading.refuse(f'"{name}" is {shorten(given)}. Give the text of an answer.')
    return value


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and any(turn.get(key) is not None for key in ("role", "from"))


def _part(part: Any, name: str, reading: Reading) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in KINDS or (isinstance(kind, str) and kind.endswith("_url")):
        raise reading.refuse(f'"{name}" holds media. A judge reads answers: give texts.')
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise reading.refuse(f'"{name}" has a part without a text: {shorten(part)}. Give texts.')
    return text
