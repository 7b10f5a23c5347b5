"""Rows as a file, a folder or a name holds them: nothing of them read, opened or decoded yet."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataFormatError
from .columns import undecoded

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

RawRow = dict[str, Any] | DataFormatError
_JSON = (".json", ".jsonl")
_TABLES = {".parquet": "parquet", ".csv": "csv"}
# Files beside the rows that say something about them.
_ABOUT = ("dataset_info.json", "dataset_infos.json")
_THEIRS = (".parquet", ".csv", ".tsv", ".arrow", ".tar", ".zip", ".gz", ".xml", ".h5")
# What ``Dataset.save_to_disk`` leaves.
_SAVED = ("state.json", "dataset_dict.json")


def raw_rows(name_or_path: str | Path, split: str = "train") -> Iterator[tuple[int, RawRow]]:
    """Every row as it is, media undecoded (paths, or ``{"bytes", "path"}``), one in memory at a time where the file
    allows that.

    Args:
        name_or_path: a .jsonl, .json, .parquet or .csv file, a folder, or a Hugging Face dataset name.
        split: which split of a folder or name.

    Returns:
        (number, row) as a user finds it, from 1: the line of a .jsonl, the position in a .json list, the record of a
        table; in a folder of several JSON files the running number. A line that is no JSON, or no object, comes as
        the error that says so.

    Raises:
        DataFormatError: the file or split is not there, or cannot be read at all.
    """
    files = json_files(name_or_path, split)
    if files is None:
        rows: Any = undecoded(open_table(name_or_path, split))[0]
        yield from enumerate(rows, 1)
    elif len(files) == 1:
        yield from json_rows(files[0])
    else:
        yield from enumerate((row for file in files for _, row in json_rows(file)), 1)


def json_files(name_or_path: str | Path, split: str = "train") -> list[Path] | None:
    """The JSON files of a file or a folder of shards, in order; None for what ``datasets`` reads."""
    path = Path(name_or_path).expanduser()
    if path.suffix in _JSON:
        return [path]
    if not path.is_dir() or any((path / name).is_file() for name in _SAVED):
        return None
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        found = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    except (EmptyDatasetError, FileNotFoundError):
        return None
    files = [Path(file) for file in found.get(split, []) if Path(file).name not in _ABOUT]
    rows = sorted(file for file in files if file.suffix in _JSON)
    # Beside pictures they are rows, unless they are what datasets' own media folders call metadata.
    theirs = any(file.suffix in _THEIRS or file.stem == "metadata" for file in files)
    return rows if rows and not theirs else None


def json_rows(path: Path) -> Iterator[tuple[int, RawRow]]:
    """(number, row) of a .jsonl or .json file; see ``raw_rows``."""
    if not path.is_file():
        raise DataFormatError(f'The data file "{path}" does not exist. Correct the path.')
    try:
        for number, row in _lines(path) if path.suffix == ".jsonl" else _list(path):
            if not isinstance(row, (dict, DataFormatError)):
                problem = f"the row is a {type(row).__name__}, not an object with columns. Correct or remove it."
                row = DataFormatError(f"{path} row {number}: {problem}")
            yield number, row
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    # newline: JSON may hold U+2028 and its like inside a string.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parsed(line, f"{path} row {number}")


def _list(path: Path) -> Iterator[tuple[int, Any]]:
    document = _parsed(path.read_text(encoding="utf-8-sig"), f"{path}")
    if isinstance(document, DataFormatError):
        if not str(document.__cause__).startswith("Extra data"):
            raise document
        yield from _lines(path)  # lines under the wrong name, as in several published datasets
    elif not isinstance(document, list):
        raise DataFormatError(f"{path} holds one {type(document).__name__}, not a list. Give a list of rows.")
    else:
        yield from enumerate(document, 1)


def _parsed(text: str, where: str) -> Any:
    """What a text of JSON holds, or the error that says why it holds nothing."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        refusal = DataFormatError(f"{where}: not valid JSON ({error}). Correct or remove it.")
        refusal.__cause__ = error
        return refusal


def open_table(name_or_path: str | Path, split: str, streaming: bool = False) -> "Dataset | IterableDataset":
    """What ``datasets`` reads: a table, a saved dataset, a folder of media or shards, or a name on the hub.

    Raises:
        DataFormatError: it is not there, has no such split, or cannot be read.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    path = Path(name_or_path).expanduser()
    if path.suffix in _TABLES and not path.is_dir():
        return _read_table(path, streaming)
    if any((path / name).is_file() for name in _SAVED):
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise DataFormatError(f'{path} has no split "{split}". It has {", ".join(map(str, loaded))}.')
            loaded = loaded[split]
        return loaded.to_iterable_dataset() if streaming else loaded
    try:
        return datasets.load_dataset(str(path if path.is_dir() else name_or_path), split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise DataFormatError(
            f'The dataset "{name_or_path}" (split "{split}") cannot be loaded: no such file, folder or reachable name '
            f"({first_line(error)}). Correct the name, or the connection."
        ) from error
    except DatasetGenerationError as error:
        raise DataFormatError(
            f'The files of "{name_or_path}" do not form one table ({_cause(error)}). Name one of them, or take out '
            "what are no rows."
        ) from error


def _read_table(path: Path, streaming: bool) -> "Dataset | IterableDataset":
    import datasets
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import parquet

    if not path.is_file():
        raise DataFormatError(f'The data file "{path}" does not exist. Correct the path.')
    try:
        if path.suffix == ".parquet":
            parquet.read_schema(path)  # datasets would log what is wrong with the file, beside raising it
        kind = _TABLES[path.suffix]
        # "None", "NA" and "null" are answers; only a cell without anything is missing.
        own = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
        return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=streaming, **own)
    except (ValueError, OSError, DatasetGenerationError) as error:
        raise DataFormatError(
            f"{path} cannot be read as {path.suffix[1:]} ({_cause(error)}). Write it anew."
        ) from error


def _cause(error: Exception) -> str:
    """What a library wraps in an error of its own says more than that."""
    return first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)


def first_line(error: Exception) -> str:
    """The first line of what a library says, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
