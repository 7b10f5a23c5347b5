"""Files that canonical rows are written to, beside their names and then renamed: no kill leaves half a file."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from ..data import MEDIA_COLUMNS
from ..errors import DataFormatError
from ..media import Medium
from .rows import Row
from .written import as_path, file_name, written

_CHUNK = 200  # rows of a table that are in memory at a time, with their media


class JsonLinesWriter:
    """Writes a .jsonl; bytes go to files beside it."""

    def __init__(self, out: Path) -> None:
        self.out, self.files = out, 0
        self._into = out.with_name(f"{out.stem}_media")
        self._made: set[Path] = set()
        self._new: list[Path] = []

    @property
    def folder(self) -> Path | None:
        return self._into if self.files else None

    def foresee(self, row: Row) -> None:
        """Refuse what JSON has no form for."""
        self._line(row, lambda medium, source, name: "")

    def write(self, rows: Iterator[Row]) -> int:
        count = 0
        beside = self.out.with_name(f".{self.out.name}.new")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("w", encoding="utf-8", newline="\n") as file:
                for row in rows:
                    file.write(self._line(row, self._cell) + "\n")
                    count += 1
            os.replace(beside, self.out)
        except BaseException:
            for path in (beside, *self._new):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # it is not there, or holds files of before
                self._into.rmdir()
            raise
        return count

    def _line(self, row: Row, cell: Callable[[Medium, Path | bytes, str], Any]) -> str:
        assert row.sample is not None and row.canonical is not None, "bad rows are left out"
        values = written(row.sample, row.canonical, cell)
        for name, value in values.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise DataFormatError(
                    f'{row.sample.where}: column "{name}" holds what JSON has no form for ({error}). Write a .parquet.'
                ) from error
        return json.dumps(values, ensure_ascii=False)

    def _cell(self, medium: Medium, source: Path | bytes, name: str) -> str:
        if isinstance(source, Path):
            return as_path(source, self.out.parent)
        path = self._into / file_name(source, name)
        if path not in self._made:
            self.files += 1
            self._made.add(path)
            if not (path.is_file() and path.stat().st_size == len(source)):
                self._into.mkdir(parents=True, exist_ok=True)
                beside = path.with_name(f".{path.name}.new")
                self._new += [beside] if path.exists() else [beside, path]
                beside.write_bytes(source)
                os.replace(beside, path)
        return as_path(path, self.out.parent)


class ParquetWriter:
    """Writes a .parquet. Its schema is that of all rows, which are therefore seen before any is written."""

    files, folder = 0, None

    def __init__(self, out: Path) -> None:
        self.out = out
        self._schema: Any = None
        self._waiting: list[dict[str, Any]] = []
        self._names: dict[str, None] = {}
        self._depth: dict[str, int] = {}  # lists around the media of a column
        self._embedded: set[str] = set()  # columns that hold bytes in one row or more

    def foresee(self, row: Row) -> None:
        """Take the types of a row into the schema."""
        values = self._values(row, lambda medium, source, name: _file(b"", name) if isinstance(source, bytes) else "")
        self._names |= dict.fromkeys(values)
        for name in [name for name in values if name in MEDIA_COLUMNS]:
            value, depth = values.pop(name), 0
            while isinstance(value, list):
                value, depth = (value[0] if value else ""), depth + 1
            self._depth[name] = max(depth, self._depth.get(name, 0))
            if isinstance(value, dict):
                self._embedded.add(name)
        self._waiting.append(values)
        if len(self._waiting) >= _CHUNK:
            self._unify()

    def write(self, rows: Iterator[Row]) -> int:
        """Write all rows; how many there were."""
        import pyarrow as pa
        from pyarrow import parquet

        schema = self._finished()
        count = 0
        beside = self.out.with_name(f".{self.out.name}.new")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with parquet.ParquetWriter(beside, schema) as file:
                while chunk := [self._shaped(row) for row in islice(rows, _CHUNK)]:
                    file.write_table(pa.Table.from_pylist(chunk, schema=schema))
                    count += len(chunk)
            os.replace(beside, self.out)
        except pa.ArrowException as error:
            raise DataFormatError(f"{self.out} cannot hold these rows ({_line(error)}). Write a .jsonl.") from error
        finally:
            beside.unlink(missing_ok=True)
        return count

    def _values(self, row: Row, cell: Callable[[Medium, Path | bytes, str], Any]) -> dict[str, Any]:
        assert row.sample is not None and row.canonical is not None, "bad rows are left out"
        return written(row.sample, row.canonical, cell)

    def _unify(self) -> None:
        import pyarrow as pa

        rows, self._waiting = self._waiting, []
        names = dict.fromkeys(name for row in rows for name in row)
        try:
            table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
            known = [table.schema] if self._schema is None else [self._schema, table.schema]
            self._schema = pa.unify_schemas(known, promote_options="permissive")
        except (pa.ArrowException, OverflowError) as error:
            raise DataFormatError(f"{self.out} cannot hold these rows ({_line(error)}). Write a .jsonl.") from error

    def _finished(self) -> Any:
        """The schema, which says of pictures that they are some: a reward then gets them opened."""
        import datasets
        import pyarrow as pa

        if self._waiting:
            self._unify()
        fields = []
        for name in self._names:
            if name not in self._depth:
                fields.append(self._schema.field(name))
                continue
            embedded = pa.struct({"bytes": pa.binary(), "path": pa.string()})
            of_type = embedded if name in self._embedded else pa.string()
            for _ in range(self._depth[name]):
                of_type = pa.list_(of_type)
            fields.append(pa.field(name, of_type))
        features = datasets.Features.from_arrow_schema(pa.schema(fields))
        for name in self._embedded & {"image", "images"}:
            features[name] = datasets.Image() if not self._depth[name] else datasets.List(datasets.Image())
        return features.arrow_schema

    def _shaped(self, row: Row) -> dict[str, Any]:
        """The row as the schema has it. A path beside bytes, and one of a frame, is absolute: nobody resolves those."""
        values = self._values(row, lambda medium, source, name: _file(source, name))
        for name in values.keys() & self._depth.keys():
            folder = self.out.parent if self._depth[name] < 2 and name not in self._embedded else None
            values[name] = _with_paths(values[name], folder, wrapped=name in self._embedded)
        return {**values, "prompt": _with_paths(values["prompt"], None, wrapped=False)}


def _file(source: Path | bytes, name: str) -> Any:
    return {"bytes": source, "path": name or None} if isinstance(source, bytes) else source


def _with_paths(value: Any, folder: Path | None, wrapped: bool) -> Any:
    """The value with every path as text, from ``folder`` on or absolute; wrapped as ``{"bytes", "path"}`` if asked."""
    if isinstance(value, list):
        return [_with_paths(item, folder, wrapped) for item in value]
    if isinstance(value, dict):
        return {key: _with_paths(item, folder, wrapped) for key, item in value.items()}
    if not isinstance(value, Path):
        return value
    text = os.path.abspath(value) if folder is None else as_path(value, folder)
    return {"bytes": None, "path": text} if wrapped else text


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
