"""A row in the canonical form, as a file holds it: media by path, or with their bytes."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..data import Sample
from ..errors import DataFormatError
from ..media import KINDS, Medium

# What a file's first bytes say, where its name is not known: (offset, bytes, suffix).
_MAGIC = (
    *((0, b"\x89PNG", ".png"), (0, b"\xff\xd8\xff", ".jpg"), (0, b"GIF8", ".gif"), (8, b"WEBP", ".webp")),
    *((0, b"BM", ".bmp"), (0, b"II*\0", ".tif"), (0, b"MM\0*", ".tif"), (8, b"WAVE", ".wav"), (8, b"AVI ", ".avi")),
    *((0, b"fLaC", ".flac"), (0, b"OggS", ".ogg"), (0, b"ID3", ".mp3"), (0, b"\xff\xfb", ".mp3")),
    *((4, b"ftyp", ".mp4"), (0, b"\x1aE\xdf\xa3", ".mkv")),
)

# What one file of a medium becomes, from it and the name that its bytes had.
Cell = Callable[[Medium, Path | bytes, str], Any]


def written(sample: Sample, row: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """``prompt`` with list contents, media columns under the row's own names, and all other columns in their order.

    A video given by its frames goes into its part of the prompt: one column cannot hold texts and lists.

    Args:
        sample: the row as it was read.
        row: the same in canonical columns.
        cell: writes one file, or one frame.

    Raises:
        DataFormatError: a medium that is no file, such as a list of numbers.
    """
    names = dict(_names(row))

    def source(medium: Medium) -> Any:
        sources = medium.source if isinstance(medium.source, list) else [medium.source]
        for item in sources:
            if not isinstance(item, (Path, bytes)):
                raise DataFormatError(
                    f"{sample.where}: the {medium.kind} is {medium.label}, which is no file. Write it to one, and give "
                    "the file's path."
                )
        cells = [cell(medium, item, names.get(id(item), "")) for item in sources]
        return cells if isinstance(medium.source, list) else cells[0]

    def part_of(part: dict[str, Any]) -> dict[str, Any]:
        kind = part["type"]
        if kind not in KINDS:
            return part
        medium = part[kind]
        frames = {kind: source(medium)} if isinstance(medium.source, list) else {}
        return {"type": kind, **frames, **medium.overrides}

    prompt: Any = sample.prompt
    if not isinstance(sample.prompt, str):
        prompt = [{**m, "content": [part_of(part) for part in m["content"]]} for m in sample.prompt]
    columns: dict[str, Any] = {}
    for kind in KINDS:
        media = [medium for medium in sample.media if medium.kind == kind]
        in_column = [medium for medium in media if not isinstance(medium.source, list)]
        media = media if isinstance(prompt, str) else in_column
        if media:
            single = row.get(kind) is not None and len(media) == 1
            columns[kind if single else f"{kind}s"] = source(media[0]) if single else [source(m) for m in media]
    return {"prompt": prompt, **columns, **sample.columns}


def as_path(path: Path, folder: Path) -> str:
    """The path from ``folder`` on where it lies below it, else an absolute one."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def file_name(data: bytes, name: str) -> str:
    """The name of a file by its content, with the suffix that it had or that its first bytes tell."""
    suffix = Path(name).suffix or next((end for at, magic, end in _MAGIC if data[at : at + len(magic)] == magic), "")
    return f"{hashlib.sha256(data).hexdigest()[:32]}{suffix.lower()}"


def _names(value: Any) -> Iterator[tuple[int, str]]:
    """(identity of the bytes, name) of every ``{"bytes", "path"}`` inside of a row."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            yield id(value["bytes"]), str(value.get("path") or "")
        for inner in value.values():
            yield from _names(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _names(inner)
