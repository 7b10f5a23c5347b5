"""Datasets of any format: read, made canonical, checked row by row, media paths resolved against the file's folder."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataFormatError, MediaError
from .columns import inner_feature, remembering, undecoded
from .formats import as_canonical, canonical
from .formats.caption_types import TypedAlike
from .formats.detection import named
from .formats.mapping import check_columns, read_tags
from .formats.table import beside
from .passed import PassRates
from .reading import first_line, json_files, json_rows, open_table
from .ready import Hints, as_row, check_sources, with_lists
from .sample import MEDIA_COLUMNS, to_sample

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_CHUNK = 1000  # JSON rows that are in memory as Python objects at a time


def load_data(
    name_or_path: Any,
    split: str = "train",
    limit: int | None = None,
    media_root: str | Path | None = None,
    check_files: bool = True,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    streaming: bool = False,
    min_pass_rate: float | None = None,
    max_pass_rate: float | None = None,
) -> Any:
    """Load and check a dataset of any format: a .jsonl, .json, .parquet or .csv file, a folder, a Hugging Face dataset
    name, or a ``datasets`` object.

    Rows come back in one canonical form: ``prompt`` with list contents (or a string, to which the chat template has
    been applied), media in their columns, ``answer``, ``completion``, and every other column unchanged. Paths of
    files are absolute: a relative path starts at the file's folder.

    Args:
        name_or_path: the file, folder, name or object.
        split: which split of a folder or name.
        limit: keep at most this many rows, from the top.
        media_root: the folder that relative media paths start from, instead of the file's.
        check_files: refuse a row that names a file which does not exist, or holds what is no medium; ``scan_media``
            looks closer.
        format: the name of the rows' format; by default each row says by its columns.
        columns: names of ours, and the file's column for each: ``{"problem": "text", "image": "picture"}``.
        tags: names inside a turn, as in LLaMA-Factory's ``dataset_info.json``.
        streaming: return an ``IterableDataset``, whose rows are read and checked as they come.
        min_pass_rate, max_pass_rate: keep only rows whose column ``pass_rate`` lies within.

    Raises:
        ConfigError: an option that cannot be.
        DataFormatError: no rows, or one that is no sample; the message names file and row.
        MediaError: a file that a row names does not exist.
    """
    if format is not None:
        named(format)
    read_tags(tags)
    options: dict[str, Any] = {"format": format, "columns": columns, "tags": tags}
    root = None if media_root is None else Path(media_root).expanduser()
    rates = PassRates(_name(name_or_path), min_pass_rate, max_pass_rate)
    is_named = isinstance(name_or_path, (str, Path))
    files = json_files(name_or_path, split) if is_named else None
    if files is not None:
        rows = _JsonRows(files, root, check_files, options, rates)
        return _json_stream(rows, limit) if streaming else _json_table(rows, limit)
    dataset: Any = open_table(name_or_path, split, streaming) if is_named else name_or_path
    if root is None and is_named:
        root = _own_root(Path(name_or_path).expanduser())
    checked = _Checked(_name(name_or_path), root, check_files)
    if not hasattr(dataset, "__len__"):
        return _stream(dataset, limit, checked, options, rates)
    if streaming:
        return _stream(dataset.to_iterable_dataset(), limit, checked, options, rates)
    return _table(dataset, limit, checked, options, rates)


def _name(name_or_path: Any) -> str:
    return str(name_or_path) if isinstance(name_or_path, (str, Path)) else "the dataset"


def _own_root(path: Path) -> Path | None:
    """Where the relative paths of a table start."""
    if path.is_dir():
        return None if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")) else path
    return path.parent if path.is_file() else None


# ---- JSON -------------------------------------------------------------------------------------------------------


class _JsonRows:
    """The rows of JSON files, ready for a table; iterable again and again, and picklable for workers."""

    def __init__(
        self, files: list[Path], root: Path | None, check_files: bool, options: dict[str, Any], rates: PassRates
    ) -> None:
        self.files, self.root, self.check_files, self.options, self.rates = files, root, check_files, options, rates
        self.name = str(files[0]) if len(files) == 1 else str(files[0].parent)
        self.hints = Hints()

    def raw(self) -> Iterator[tuple[Path, str, dict[str, Any]]]:
        """(file, how the user finds the row, row)."""
        for file in self.files:
            for number, row in json_rows(file):
                if isinstance(row, DataFormatError):
                    raise row
                yield file, f"{file} row {number}", row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.seen: dict[str, None] = {}
        self.rates.begin()
        types = TypedAlike(self.options["format"], self.options["columns"])
        for file, where, row in self.raw():
            types.look(row, where)
            self.seen.update(dict.fromkeys(row))
            if self.rates.keeps(row, where):
                yield self._ready(row, self.root or file.parent, where)

    def finish(self) -> None:
        """What can be said only after the last row."""
        self.rates.end()
        if self.seen:
            check_columns(self.options["columns"], self.seen, self.name)

    def _ready(self, row: dict[str, Any], root: Path, where: str) -> dict[str, Any]:
        row = canonical(row, where, **self.options)
        try:
            sample = to_sample(row, root, where)
        except MediaError:  # of no medium at all: whoever scans the rows reports it among the others
            if self.check_files:
                raise
            return with_lists(row)
        if self.check_files:
            check_sources(sample)
        self.hints.look(sample)
        return as_row(sample, row)


def _json_table(rows: _JsonRows, limit: int | None) -> "Dataset":
    import pyarrow as pa
    from datasets import Dataset

    tables, ready = [], islice(rows, limit)
    try:
        while chunk := list(islice(ready, _CHUNK)):
            names = dict.fromkeys(key for row in chunk for key in row)
            tables.append(pa.Table.from_pylist([{key: row.get(key) for key in names} for row in chunk]))
        rows.finish()
        if not tables:
            raise DataFormatError(f"{rows.name} has no rows. Give at least one.")
        return Dataset(pa.concat_tables(tables, promote_options="permissive").combine_chunks())
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise DataFormatError(_mixed_types(rows, limit, error)) from error


def _json_stream(rows: _JsonRows, limit: int | None) -> "IterableDataset":
    from datasets import IterableDataset

    stream = IterableDataset.from_generator(_each, gen_kwargs={"rows": rows})
    return stream if limit is None else stream.take(limit)


def _each(rows: _JsonRows) -> Iterator[dict[str, Any]]:
    yield from rows
    rows.finish()


def _mixed_types(rows: _JsonRows, limit: int | None, error: Exception) -> str:
    """Says which column does not fit; reads the files once more, since only a chunk of them was in memory."""
    types: dict[str, set[str]] = {}
    for _, _, row in islice(rows.raw(), limit):
        for column, value in row.items():
            if value is not None:
                types.setdefault(column, set()).add(type(value).__name__)
    for column, found in types.items():
        if len(found) > 1 and column not in MEDIA_COLUMNS:
            return f'{rows.name}: the column "{column}" mixes {" and ".join(sorted(found))}. Use one type in every row.'
    return (
        f"{rows.name}: the rows do not fit one table ({first_line(error)}). Give every row the same columns and types."
    )


# ---- tables and streams -----------------------------------------------------------------------------------------


class _Checked:
    """Checks rows of a table; ``where`` counts from 1."""

    def __init__(self, name: str, root: Path | None, check_files: bool) -> None:
        self.name, self.root, self.check_files = name, root, check_files
        self.hints = Hints()

    def check(self, row: dict[str, Any], number: int) -> None:
        try:
            sample = to_sample(row, where=f"{self.name} row {number}")
        except MediaError:
            if self.check_files:
                raise
            return
        if self.check_files:
            check_sources(sample)
        self.hints.look(sample)

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """The row of a stream, its paths absolute."""
        media = {name: row[name] for name in MEDIA_COLUMNS if row.get(name) is not None}
        row = {**row, **(media if self.root is None else {n: _absolute(v, self.root) for n, v in media.items()})}
        self.check(row, index + 1)
        return row


def _table(dataset: Any, limit: int | None, checked: _Checked, options: dict[str, Any], rates: PassRates) -> "Dataset":
    dataset = as_canonical(dataset, checked.name, **options)
    if checked.root is not None:
        dataset = _with_absolute_paths(dataset, checked.root)
    if len(dataset) == 0:
        raise DataFormatError(f"{checked.name} has no rows. Give at least one.")
    kept = rates.kept(dataset, limit)
    if kept is not None:
        dataset = dataset.select(kept)
    elif limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    rows: Any = undecoded(dataset)[0]
    for position, row in enumerate(rows):
        checked.check(row, (position if kept is None else kept[position]) + 1)
    return dataset


def _stream(
    dataset: "IterableDataset", limit: int | None, checked: _Checked, options: dict[str, Any], rates: PassRates
) -> "IterableDataset":
    plain: Any
    plain, pictures = undecoded(dataset)
    stream = as_canonical(plain, checked.name, **options)
    ours = {theirs: name for name, theirs in (options["columns"] or {}).items()}
    pictures = {ours.get(name, name): feature for name, feature in pictures.items()}
    # Where the rows are canonical already, they keep their types.
    stream = stream.map(checked, with_indices=True, features=dataset.features if stream is plain else None)
    if rates:
        stream = stream.filter(rates.keeps_numbered, with_indices=True)
    return remembering(stream if limit is None else stream.take(limit), pictures)


def _with_absolute_paths(dataset: "Dataset", root: Path) -> "Dataset":
    """Paths in the media columns of a table start at its folder, as those of a .jsonl do."""
    for column in [name for name in MEDIA_COLUMNS if name in dataset.column_names]:
        if getattr(inner_feature(dataset.features[column]), "dtype", "") in ("string", "large_string"):
            paths = dataset.select_columns([column]).map(
                lambda row, column=column: {column: _absolute(row[column], root)}
            )
            others = [name for name in dataset.column_names if name != column]
            # The whole table through map() would copy every picture of another column.
            dataset = beside(paths, dataset.select_columns(others)).select_columns(dataset.column_names)
    return dataset


def _absolute(value: Any, root: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(item, root) for item in value]
    is_path = isinstance(value, str) and "://" not in value and not value.startswith("data:")
    return str((root / Path(value).expanduser()).resolve()) if is_path else value
