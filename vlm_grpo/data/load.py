"""Dataset files and names: read, checked row by row, media paths resolved against the file's folder."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataFormatError, MediaError
from ..media import KINDS, Medium
from .columns import inner_feature, undecoded
from .sample import MEDIA_COLUMNS, Sample, to_sample

if TYPE_CHECKING:
    from datasets import Dataset

_TABLES = {".parquet": "parquet", ".csv": "csv"}
_CHUNK = 1000  # JSON rows that are in memory as Python objects at a time


def load_data(
    name_or_path: str,
    split: str = "train",
    limit: int | None = None,
    media_root: str | Path | None = None,
    check_files: bool = True,
) -> "Dataset":
    """Load and check a dataset: a .jsonl, .json, .parquet or .csv file, a folder, or a Hugging Face dataset name.

    Rows of a .jsonl or .json file come back in one canonical form: ``prompt`` with list contents, media as
    absolute paths (a relative path starts at the file's folder), and every other column unchanged.

    Args:
        name_or_path: the file, folder or name.
        split: which split of a folder or name.
        limit: keep at most this many rows, from the top.
        media_root: the folder that relative media paths start from, instead of the file's.
        check_files: refuse a row that names a file which does not exist, or holds what is no medium; ``scan_media``
            looks closer.

    Raises:
        DataFormatError: no rows, or one that is no sample; the message names file and row.
        MediaError: a file that a row names does not exist.
    """
    path = Path(name_or_path).expanduser()
    root = None if media_root is None else Path(media_root).expanduser()
    if path.suffix in (".jsonl", ".json"):
        return _from_json(path, limit, root or path.parent, check_files)
    dataset = _from_datasets(path, name_or_path, split, root)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if len(dataset) == 0:
        raise DataFormatError(f"{name_or_path} has no rows. Give at least one.")
    for number, row in enumerate(undecoded(dataset)[0], 1):
        try:
            sample = to_sample(row, where=f"{name_or_path} row {number}")  # type: ignore[arg-type]
        except MediaError:
            if check_files:
                raise
            continue
        if check_files:
            _check_files(sample)
    return dataset


def _from_json(path: Path, limit: int | None, root: Path, check_files: bool) -> "Dataset":
    import pyarrow as pa
    from datasets import Dataset

    def canonical(number: int, row: dict[str, Any]) -> dict[str, Any]:
        try:
            sample = to_sample(row, root, f"{path} row {number}")
        except MediaError:  # of no medium at all: whoever scans the rows reports it among the others
            if check_files:
                raise
            return _with_lists(row)
        if check_files:
            _check_files(sample)
        return _canonical(sample, row)

    tables = []
    rows = islice(_json_rows(path), limit)
    try:
        while chunk := [canonical(number, row) for number, row in islice(rows, _CHUNK)]:
            names = dict.fromkeys(key for row in chunk for key in row)
            tables.append(pa.Table.from_pylist([{key: row.get(key) for key in names} for row in chunk]))
        if not tables:
            raise DataFormatError(f"{path} has no rows. Give at least one.")
        return Dataset(pa.concat_tables(tables, promote_options="permissive").combine_chunks())
    except (pa.ArrowException, OverflowError) as error:
        raise DataFormatError(_mixed_types(path, limit, error)) from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) from 1; the number is the line of a .jsonl file, the position in a .json list."""
    if not path.is_file():
        raise DataFormatError(f'The data file "{path}" does not exist. Correct the path.')
    try:
        for number, piece in _json_lines(path) if path.suffix == ".jsonl" else _json_list(path):
            row = _parse(piece, f"{path} row {number}") if isinstance(piece, str) else piece
            if not isinstance(row, dict):
                raise DataFormatError(
                    f"{path} row {number}: the row is a {type(row).__name__}, not an object with columns."
                )
            yield number, row
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error


def _json_lines(path: Path) -> Iterator[tuple[int, str]]:
    # newline: JSON may hold U+2028 and its like inside a string.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    document = _parse(path.read_text(encoding="utf-8-sig"), f"{path}")
    if not isinstance(document, list):
        raise DataFormatError(f"{path} holds one {type(document).__name__}, not a list. Give a list of rows.")
    yield from enumerate(document, 1)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataFormatError(f"{where}: not valid JSON ({error}). Correct or remove it.") from error


def _from_datasets(path: Path, name: str, split: str, root: Path | None) -> "Dataset":
    import datasets

    if path.suffix in _TABLES:
        if not path.is_file():
            raise DataFormatError(f'The data file "{path}" does not exist. Correct the path.')
        return _absolute(_read_table(path), root or path.parent)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict) and split not in loaded:
            raise DataFormatError(f'{name} has no split "{split}". It has {", ".join(map(str, loaded))}.')
        return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    try:
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise DataFormatError(
            f'The dataset "{name}" (split "{split}") cannot be loaded: no such file, folder or reachable name '
            f"({_first_line(error)}). Correct the name, or the connection."
        ) from error


def _read_table(path: Path) -> "Dataset":
    import datasets
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import parquet

    try:
        if path.suffix == ".parquet":
            parquet.read_schema(path)  # datasets would log what is wrong with the file, beside raising it
        return datasets.load_dataset(_TABLES[path.suffix], data_files=str(path), split="train")
    except (ValueError, OSError, DatasetGenerationError) as error:
        reason = _first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise DataFormatError(f"{path} cannot be read as {path.suffix[1:]} ({reason}). Write it anew.") from error


def _absolute(dataset: "Dataset", root: Path) -> "Dataset":
    """Paths in the media columns of a table start at its folder, as those of a .jsonl do."""

    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(item) for item in value]
        is_path = isinstance(value, str) and "://" not in value and not value.startswith("data:")
        return str((root / Path(value).expanduser()).resolve()) if is_path else value

    for column in [name for name in MEDIA_COLUMNS if name in dataset.column_names]:
        if getattr(inner_feature(dataset.features[column]), "dtype", "") in ("string", "large_string"):
            dataset = dataset.map(lambda row, column=column: {column: absolute(row[column])})
    return dataset


def _check_files(sample: Sample) -> None:
    for medium in sample.media:
        for source in medium.source if isinstance(medium.source, list) else [medium.source]:
            if isinstance(source, Path) and not source.is_file():
                raise MediaError(
                    f'{sample.where}: the {medium.kind} "{source}" does not exist. Correct the path or remove the row.'
                )


def _canonical(sample: Sample, row: dict[str, Any]) -> dict[str, Any]:
    """The row as it goes into a table. Media keep the row's own column name, under which a reward expects them;
    a video given by its frames goes into its part, since one column cannot hold texts and lists."""
    if isinstance(sample.prompt, str):
        prompt: Any = sample.prompt
    else:
        prompt = [
            {**message, "content": [_slot(part) if part["type"] in KINDS else part for part in parts]}
            for message in sample.prompt
            for parts in [message["content"]]
        ]
    columns: dict[str, Any] = {}
    for kind in KINDS:
        media = [medium for medium in sample.media if medium.kind == kind]
        if not isinstance(sample.prompt, str):
            media = [medium for medium in media if not isinstance(medium.source, list)]
        single = row.get(kind) is not None and len(media) == 1
        if media:
            columns[kind if single else f"{kind}s"] = _paths(media[0]) if single else [_paths(m) for m in media]
    return {"prompt": prompt, **columns, **sample.columns}


def _with_lists(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it is, its contents as lists, which one table needs of all rows."""
    if isinstance(row["prompt"], str):
        return row
    prompt = [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in row["prompt"]
    ]
    return {**row, "prompt": prompt}


def _slot(part: dict[str, Any]) -> dict[str, Any]:
    """A media part for the table: a slot, or a video's frames, with the options of its medium."""
    medium = part[part["type"]]
    frames = _paths(medium) if isinstance(medium.source, list) else None
    return {**part, part["type"]: frames, **medium.overrides}


def _paths(medium: Medium) -> str | list[str]:
    sources = medium.source if isinstance(medium.source, list) else [medium.source]
    if not all(isinstance(source, Path) for source in sources):
        raise DataFormatError(
            f"A JSON row can only name media by path — {medium.where}. Write the {medium.kind} to a file and give "
            "its path."
        )
    paths = [str(source.resolve()) for source in sources]
    return paths if isinstance(medium.source, list) else paths[0]


def _mixed_types(path: Path, limit: int | None, error: Exception) -> str:
    """Says which column does not fit; reads the file once more, since only a chunk of it was in memory."""
    types: dict[str, set[str]] = {}
    for _, row in islice(_json_rows(path), limit):
        for column, value in row.items():
            if value is not None:
                types.setdefault(column, set()).add(type(value).__name__)
    for column, found in types.items():
        if len(found) > 1 and column not in MEDIA_COLUMNS:
            return f'{path}: the column "{column}" mixes {" and ".join(sorted(found))}. Use one type in every row.'
    return f"{path}: the rows do not fit one table ({_first_line(error)}). Give every row the same columns and types."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


__all__ = ["MEDIA_COLUMNS", "load_data"]
