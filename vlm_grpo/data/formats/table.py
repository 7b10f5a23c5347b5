"""Tables and streams in the canonical form: texts are written anew, media columns are carried and never copied."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import DataFormatError
from ...media import KINDS, Kind
from ..columns import undecoded
from .base import Reading, listed
from .caption_types import TypedAlike
from .detection import READ, canonical, choose, media_names
from .mapping import check_columns, read_tags, rename

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

_TURNS = ("conversations", "messages")
_CHUNK = 1000  # rows that are in memory as Python objects at a time


def as_canonical(
    dataset: Any,
    where: str = "",
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Any:
    """A dataset whose rows are canonical; see ``canonical``. One that is so already comes back itself.

    The texts of a table are read and written anew in memory, in chunks; its media columns are neither read nor
    copied. A stream is read as it comes.

    Args:
        dataset: a ``datasets`` table or stream, several of them in a dict, a list of rows, or None.
        where: what messages call it; they end in the number of the row, from 1.
        format, columns, tags: as for ``canonical``.

    Raises:
        ConfigError: an unknown format or tag, or a column that no row has.
        DataFormatError: a row that fits no format; for a stream, when the row is read.
    """
    import datasets

    options: dict[str, Any] = {"format": format, "columns": columns, "tags": tags}
    if dataset is None:
        return None
    if isinstance(dataset, dict):  # several, by name
        parts = {name: as_canonical(part, f"{where} {name}".strip(), **options) for name, part in dataset.items()}
        return datasets.DatasetDict(parts) if isinstance(dataset, datasets.DatasetDict) else parts
    if isinstance(dataset, datasets.IterableDataset):
        return _stream(dataset, where, options)
    if not isinstance(dataset, datasets.Dataset):
        types, rows = TypedAlike(format, columns), []
        for number, row in enumerate(dataset, 1):
            types.look(row, _at(where, number))
            rows.append(canonical(row, _at(where, number), **options))
        return rows
    if dataset.format["type"] == "custom":  # a transform makes the rows
        return _transformed(dataset, where, options)
    check_columns(columns, dataset.column_names, where or "the dataset")
    if not len(dataset) or (not columns and _is_canonical(dataset.column_names, format) and not _is_json(dataset)):
        return dataset
    return _table(dataset, where, options)


def _at(where: str, number: int) -> str:
    return f"{where} row {number}".strip()


def _is_canonical(names: Any, format_: str | None) -> bool:
    answered = "answer" in names or not {"completion", "solution"} & set(names)
    return "prompt" in names and answered and format_ in (None, "trl")


def _is_json(dataset: "Dataset") -> bool:
    """Whether the prompts are messages written as JSON, which is how a CSV file holds them."""
    prompt = dataset.select_columns(["prompt"]).with_format(None)[0]["prompt"]
    return listed(prompt) is not prompt


def _transformed(dataset: "Dataset", where: str, options: dict[str, Any]) -> "Dataset":
    if not len(dataset) or _is_canonical(list(dataset[0]), options["format"]):
        return dataset
    raise DataFormatError(
        f'{where or "The dataset"} makes its rows by a transform, and they have no "prompt". '
        "Let the transform return it, or call vlm_grpo.data.canonical in it."
    )


def _table(dataset: "Dataset", where: str, options: dict[str, Any]) -> "Dataset":
    import datasets

    format_ = dataset.format
    dataset, features = dataset.with_format(None), dataset.features
    names = rename(
        dataset.column_names,
        options["columns"],
        lambda name: getattr(features[name], "dtype", "") in ("string", "large_string"),
    )
    for name in [name for name in names if names[name].startswith("original_")]:  # it makes room for the others
        dataset = dataset.rename_column(name, names.pop(name))
    dataset = dataset.rename_columns(names)
    found = choose({name: True for name in dataset.column_names}, where, options["format"])
    for ours, theirs in media_names({name: True for name in dataset.column_names}, found).items():
        dataset = _copied(dataset, theirs, ours)
    written, used = _written(dataset, where, options)
    rest = [name for name in dataset.column_names if name not in (*written.column_names, *used)]
    whole = datasets.Dataset(written)
    dataset = beside(whole, dataset.select_columns(rest)) if rest else whole
    return dataset.with_format(format_["type"], **format_["format_kwargs"]) if format_["type"] else dataset


def _written(dataset: "Dataset", where: str, options: dict[str, Any]) -> "tuple[pa.Table, set[str]]":
    """(the columns that the formats write, the names of those they stand for)."""
    import pyarrow as pa

    tags = read_tags(options["tags"])
    texts = [name for name in dataset.column_names if name in READ]
    unread = {name: True for name in dataset.column_names if name not in READ}
    counts = _media_counts(dataset)
    tables, used, needed, wrote, number = [], set(), set(), set(), 0
    chunks: Any = dataset.select_columns(texts).iter(batch_size=_CHUNK)
    for chunk in chunks:
        columns: list[dict[str, Any]] = []
        for values in zip(*(chunk[name] for name in texts), strict=True):
            row = dict(zip(texts, values, strict=True))
            media: dict[Kind, int | None] = {kind: next(counts[kind]) for kind in KINDS}
            number += 1
            reading = Reading(_at(where, number), media, tags)
            read = choose({**unread, **row}, reading.where, options["format"]).read(row, reading)
            # Where one row has no answer of its own and the next has, both stand in one column.
            own = {name: row[name] for name in ("prompt", "answer", "completion") if row.get(name) is not None}
            columns.append({**read.columns, **{name: value for name, value in own.items() if name not in read.columns}})
            used.update(read.used)
            # A column that only some rows are done with, as LLaVA-RLHF's longer conversations are not, stays.
            needed.update(name for name in _TURNS if row.get(name) is not None and name not in read.used)
            wrote.update(read.columns)
        keys = dict.fromkeys(key for row in columns for key in row)
        tables.append(_arrow([{key: row.get(key) for key in keys} for row in columns], where))
    try:
        table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        return table.select([name for name in table.column_names if name in wrote]), used - needed
    except pa.ArrowException as error:
        raise _mixed(where, error) from error


def _arrow(rows: list[dict[str, Any]], where: str) -> "pa.Table":
    import pyarrow as pa

    try:
        return pa.Table.from_pylist(rows)
    except (pa.ArrowException, OverflowError) as error:
        raise _mixed(where, error) from error


def _mixed(where: str, error: Exception) -> DataFormatError:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return DataFormatError(
        f'{where or "The dataset"}: "prompt", "answer" or "completion" would mix types ({reason}). '
        "Give every row the same types."
    )


def _media_counts(dataset: "Dataset") -> dict[Kind, Iterator[int | None]]:
    """For each kind and row how many media its columns hold, without a look at them; None where only a look tells."""

    def of_kind(kind: Kind) -> Iterator[int | None]:
        names = [name for name in (kind, f"{kind}s") if name in dataset.column_names]
        if not names:
            yield from (0 for _ in range(len(dataset)))
            return
        chunks: Any = dataset.select_columns(names).with_format("arrow").iter(batch_size=_CHUNK)
        for chunk in chunks:
            columns = [_lengths(chunk[name], name) for name in names]
            for lengths in zip(*columns, strict=True):
                yield None if None in lengths else sum(length or 0 for length in lengths)

    return {kind: of_kind(kind) for kind in KINDS}


def _lengths(column: Any, name: str) -> list[int | None]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_null(column.type):
        return [0] * len(column)
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return [int(valid) for valid in column.is_valid().to_pylist()]
    if name in ("video", "audio"):  # several, or one as frames or numbers
        return [None if valid else 0 for valid in column.is_valid().to_pylist()]
    length = pc.get_function("list_value_length")
    return pc.fill_null(length.call([column]), 0).to_pylist()


def _copied(dataset: "Dataset", name: str, copy: str) -> "Dataset":
    """The dataset with a column under a second name too, which shares its memory."""
    if copy in dataset.column_names:  # of nothing but None, or it would have been taken
        dataset = dataset.remove_columns(copy)
    import datasets

    with_copy = dataset.data.table.append_column(copy, dataset.data.column(name))
    features = datasets.Features({**dataset.features, copy: dataset.features[name]})
    whole = datasets.Dataset(with_copy.replace_schema_metadata(), info=datasets.DatasetInfo(features=features))
    return whole if dataset._indices is None else whole.select(_positions(dataset))


def beside(written: "Dataset", carried: "Dataset") -> "Dataset":
    """Two tables side by side, of which what is carried is not copied.

    Of a shuffled or filtered table ``datasets`` would copy every row, media included: instead what is written is put
    in the order of the table underneath, and the same rows are chosen again.
    """
    import datasets

    if carried._indices is None:
        return datasets.concatenate_datasets([written, carried], axis=1)
    import numpy as np
    import pyarrow as pa

    positions = _positions(carried)
    origin = np.zeros(carried.data.num_rows, dtype=np.int64)  # rows that are not chosen take any
    origin[positions] = np.arange(len(positions))
    whole = datasets.Dataset(carried.data, info=carried.info)
    aligned = datasets.Dataset(written.data.table.take(pa.array(origin)))
    return datasets.concatenate_datasets([aligned, whole], axis=1).select(positions)


def _positions(dataset: "Dataset") -> Any:
    assert dataset._indices is not None, "the caller asked"
    return dataset._indices.column(0).to_numpy()


def _stream(dataset: "IterableDataset", where: str, options: dict[str, Any]) -> "IterableDataset":
    names = dataset.column_names or list(next(iter(undecoded(dataset)[0].take(1)), {}))
    if not options["columns"] and _is_canonical(names, options["format"]):
        return dataset
    check_columns(options["columns"], names, where or "the dataset")
    # A mapped stream keeps the columns of the row that it is not told to drop.
    gone = [name for name in names if name in _TURNS or name in (options["columns"] or {}).values()]
    return dataset.map(partial(_whole, where, options), with_indices=True, remove_columns=gone)


def _whole(where: str, options: dict[str, Any], row: dict[str, Any], index: int) -> dict[str, Any]:
    return canonical(row, _at(where, index + 1), **options)
