"""Dataset files and names: read, checked row by row, media paths resolved against the file's folder."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataFormatError, MediaError
from .sample import MEDIA_COLUMNS, Sample, to_sample

if TYPE_CHECKING:
    from datasets import Dataset

_TABLES = {".parquet": "parquet", ".csv": "csv"}


def load_data(name_or_path: str, split: str = "train", limit: int | None = None) -> "Dataset":
    """Load and check a dataset: a .jsonl, .json, .parquet or .csv file, a folder, or a Hugging Face dataset name.

    Rows of a .jsonl or .json file come back in one canonical form: ``prompt`` with list contents, media as
    absolute paths (a relative path starts at the file's folder), and every other column unchanged.

    Args:
        name_or_path: the file, folder or name.
        split: which split of a folder or name.
        limit: keep at most this many rows, from the top.

    Raises:
        DataFormatError: no rows, or one that is no sample; the message names file and row.
        MediaError: a file that a row names does not exist.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix in (".jsonl", ".json"):
        return _from_json(path, limit)
    dataset = _from_datasets(path, name_or_path, split)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if len(dataset) == 0:
        raise DataFormatError(f"{name_or_path} has no rows. Give at least one.")
    _check_rows(dataset, name_or_path)
    return dataset


def _from_json(path: Path, limit: int | None) -> "Dataset":
    from datasets import Dataset

    rows = []
    for number, row in islice(_json_rows(path), limit):
        where = f"{path} row {number}"
        sample = to_sample(row, root=path.parent, where=where)
        _check_files(sample, where)
        is_one = isinstance(row.get("image"), str) and len(sample.media) == 1
        rows.append(_canonical(sample, "image" if is_one else "images"))
    if not rows:
        raise DataFormatError(f"{path} has no rows. Give at least one.")
    columns = dict.fromkeys(key for row in rows for key in row)
    try:
        return Dataset.from_list([{key: row.get(key) for key in columns} for row in rows])
    except (TypeError, ValueError) as error:  # pyarrow's errors are children of these two
        raise DataFormatError(_mixed_types(path, rows, list(columns), error)) from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) from 1; the number is the line of a .jsonl file, the position in a .json list."""
    if not path.is_file():
        raise DataFormatError(f'The data file "{path}" does not exist. Correct the path.')
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    if path.suffix == ".jsonl":
        # Not splitlines(): JSON may hold U+2028 and its like inside a string.
        pieces = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        document = _parse(text, f"{path}")
        if not isinstance(document, list):
            raise DataFormatError(f"{path} holds one {type(document).__name__}, not a list. Give a list of rows.")
        pieces = list(enumerate(document, 1))
    for number, piece in pieces:
        row = _parse(piece, f"{path} row {number}") if isinstance(piece, str) else piece
        if not isinstance(row, dict):
            raise DataFormatError(
                f"{path} row {number}: the row is a {type(row).__name__}, not an object with columns."
            )
        yield number, row


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataFormatError(f"{where}: not valid JSON ({error}). Correct or remove it.") from error


def _from_datasets(path: Path, name: str, split: str) -> "Dataset":
    import datasets

    if path.suffix in _TABLES:
        if not path.is_file():
            raise DataFormatError(f'The data file "{path}" does not exist. Correct the path.')
        return _absolute(_read_table(path), path.parent)
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
        return str((root / Path(value).expanduser()).resolve()) if isinstance(value, str) else value

    for column in [name for name in MEDIA_COLUMNS if name in dataset.column_names]:
        if getattr(_inner(dataset.features[column]), "dtype", "") in ("string", "large_string"):
            dataset = dataset.map(lambda row, column=column: {column: absolute(row[column])})
    return dataset


def _inner(feature: Any) -> Any:
    """What a list feature lists; any other feature itself."""
    return getattr(feature, "feature", feature)


def _check_rows(dataset: "Dataset", name: str) -> None:
    import datasets

    for column, feature in dataset.features.items():
        if isinstance(_inner(feature), datasets.Image):  # checking the rows must not decode their pictures
            undecoded = datasets.Image(decode=False)
            dataset = dataset.cast_column(column, undecoded if _inner(feature) is feature else datasets.List(undecoded))
    for number, row in enumerate(dataset, 1):
        where = f"{name} row {number}"
        _check_files(to_sample(row, where=where), where)  # type: ignore[arg-type]


def _check_files(sample: Sample, where: str) -> None:
    for medium in sample.media:
        if isinstance(medium.source, Path) and not medium.source.is_file():
            raise MediaError(f'{where}: the image "{medium.label}" does not exist. Correct the path or remove the row.')


def _canonical(sample: Sample, column: str) -> dict[str, Any]:
    """``column`` is the row's own name for its media, under which a reward expects them."""
    if isinstance(sample.prompt, str):
        prompt: Any = sample.prompt
    else:
        prompt = [
            {**message, "content": [{**part, "image": None} if part["type"] == "image" else part for part in parts]}
            for message in sample.prompt
            for parts in [message["content"]]
        ]
    paths = [str(medium.source.resolve()) if isinstance(medium.source, Path) else None for medium in sample.media]
    if None in paths:
        raise DataFormatError("A JSON row can only name images by path. Write the image to a file and give its path.")
    if not paths:
        return {"prompt": prompt, **sample.columns}
    return {"prompt": prompt, column: paths[0] if column == "image" else paths, **sample.columns}


def _mixed_types(path: Path, rows: list[dict[str, Any]], columns: list[str], error: Exception) -> str:
    for column in columns:
        types = {type(row[column]).__name__ for row in rows if row.get(column) is not None}
        if len(types) > 1:
            return f'{path}: the column "{column}" mixes {" and ".join(sorted(types))}. Use one type in every row.'
    return f"{path}: the rows do not fit one table ({_first_line(error)}). Give every row the same columns and types."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


__all__ = ["MEDIA_COLUMNS", "load_data"]
