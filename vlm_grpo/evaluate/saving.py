"""Rows with how often they were answered right, to train on those that are neither too easy nor too hard."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data import MEDIA_COLUMNS
from ..data.columns import inner_feature
from ..errors import ConfigError

PASS_RATE = "pass_rate"


def check_savable(path: Path, rows: Any, name: str) -> None:
    """Refuse before anything is measured what could not be written afterwards.

    Raises:
        ConfigError: a file of another kind, a folder that does not exist, or rows that JSON cannot hold.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f'save_rows: "{path}" is neither .jsonl nor .parquet. Name the file so.')
    if not path.parent.is_dir():
        raise ConfigError(f'save_rows: the folder "{path.parent}" does not exist. Make it, or correct the path.')
    if path.suffix == ".jsonl":
        for column in [column for column in MEDIA_COLUMNS if column in rows.column_names]:
            if getattr(inner_feature(inner_feature(rows.features[column])), "dtype", "") not in _TEXTS:
                raise ConfigError(
                    f'save_rows: the column "{column}" of {name} holds media and no paths, which a .jsonl cannot hold. '
                    "Write a .parquet."
                )


def save_rows(path: Path, rows: Any, pass_rates: dict[int, float | None]) -> None:
    """Write the rows that were answered, with ``pass_rate``: 0 to 1, or nothing without a verdict.

    Args:
        path: a .jsonl or .parquet file; a reader sees the old one or the new one.
        rows: the whole dataset.
        pass_rates: by number of the row, from 1.
    """
    numbers = sorted(pass_rates)
    kept = rows.select([number - 1 for number in numbers])
    if PASS_RATE in kept.column_names:
        kept = kept.remove_columns(PASS_RATE)
    kept = kept.add_column(PASS_RATE, [pass_rates[number] for number in numbers])
    beside = path.with_name(f".{path.name}.new")
    if path.suffix == ".parquet":
        kept.to_parquet(str(beside))
    else:
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(_json_lines(kept))
    os.replace(beside, path)


_TEXTS = ("string", "large_string", "null")


def _json_lines(rows: Any) -> Iterator[str]:
    for row in rows:
        # A table fills the keys that a row or a part lacks with None.
        given = {key: _bare(value) if key in _MESSAGES else value for key, value in row.items() if value is not None}
        yield json.dumps(given, ensure_ascii=False, default=str) + "\n"


_MESSAGES = ("prompt", "completion")


def _bare(value: Any) -> Any:
    if isinstance(value, list):
        return [_bare(item) for item in value]
    if isinstance(value, dict):
        return {key: _bare(item) for key, item in value.items() if item is not None}
    return value
