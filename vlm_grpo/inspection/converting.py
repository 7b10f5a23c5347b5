"""Rows of any format written down in the canonical one, without loss."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..data.reading import raw_rows
from ..errors import ConfigError, DataFormatError, VLMGRPOError
from .bar import counted
from .figures import Columns
from .looking import mixed_columns, mixed_text
from .problems import Problems
from .rows import Options, Row, read_row, root_of, with_media
from .writers import JsonLinesWriter, ParquetWriter


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        out: the file; None where bad rows stopped it, and nothing was written.
        rows: in ``out``.
        formats: rows of each format.
        problems: of the rows of the input.
        left_out: bad rows that were dropped.
        media: files that embedded bytes were written to, and their folder.
    """

    out: Path | None
    rows: int
    formats: Counter[str]
    problems: Problems
    left_out: int = 0
    media: int = 0
    media_folder: Path | None = None


def convert(name: str, out: Path, options: Options, overwrite: bool = False, drop_bad: bool = False) -> Converted:
    """Write the rows of a data file in the canonical format; whatever ``load_data`` gives of both is the same.

    Paths of media are relative to the folder of ``out`` where they lie below it, absolute otherwise. Embedded bytes
    stay bytes in a .parquet; beside a .jsonl they become files, in a folder named after it, by their content.

    Args:
        name: as ``inspect`` takes it.
        out: a .jsonl or .parquet file, or a folder: then a .jsonl of the same name in it.
        overwrite: replace ``out``.
        drop_bad: leave bad rows out instead of stopping.

    Raises:
        ConfigError: an unknown format or tag, or ``out`` cannot be written.
        DataFormatError: ``out`` exists or has another suffix, the input cannot be read at all, or no row is left.
    """
    out = _target(name, out, overwrite)
    problems, formats, columns = Problems(), Counter(), Columns()
    writer = ParquetWriter(out) if out.suffix == ".parquet" else JsonLinesWriter(out)
    for row in with_media(_rows(name, options, f"Looking at {name}"), options, root_of(name, options)):
        for what, fix in row.problems:
            problems.add(row.number, what, fix)
        if not row.problems and row.sample is not None and row.canonical is not None:
            formats[row.format] += 1
            columns.add(row.number, row.canonical)
            try:
                writer.foresee(row)
            except DataFormatError as error:
                problems.add_error(row.number, error, row.sample.where)
    mixed = list(mixed_columns(columns))  # of which no row alone is to blame
    for column, usual, kind in mixed:
        problems.add_rows(column.first[kind], column.types[kind], *mixed_text(column.name, kind, usual))
    if mixed or (problems.count and (not drop_bad or not columns.rows)):
        return Converted(None, 0, formats, problems)
    if not columns.rows:
        raise DataFormatError(f"{name} has no rows. Give at least one.")
    good = (row for row in _rows(name, options, f"Writing {out}") if row.number not in problems)
    try:
        rows = writer.write(good)
    except OSError as error:
        if isinstance(error, VLMGRPOError):
            raise
        raise ConfigError(
            f"{out} cannot be written ({error.strerror or error}). Make room for it, or give another place."
        ) from error
    return Converted(out, rows, formats, problems, problems.bad_rows, writer.files, writer.folder)


def _target(name: str, out: Path, overwrite: bool) -> Path:
    out = Path(os.path.abspath(out.expanduser()))
    if out.is_dir():
        out = out / f"{Path(name).stem}.jsonl"
    if out.suffix not in (".jsonl", ".parquet"):
        raise DataFormatError(f"{out} is neither .jsonl nor .parquet, nor a folder that exists. Give one of these.")
    if out.exists() and not overwrite:
        raise DataFormatError(f"{out} exists already. Give another name, or add --overwrite.")
    return out


def _rows(name: str, options: Options, title: str) -> Iterator[Row]:
    root = root_of(name, options)
    for number, raw in counted(islice(raw_rows(name, options.split), options.limit), title):
        yield read_row(number, raw, f"{name} row {number}", root, options)
