"""The media of a page: each is in it once, as much as fits, and what is not says why."""

import base64
import time
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import VLMGRPOError
from ..media.problems import read_errors
from .previews import medium_of_label, preview

# What browsers show, by the end of a file's name.
_SHOWN = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif"}
_SHOWN |= {".mp4": "video/mp4", ".webm": "video/webm", ".wav": "audio/wav", ".mp3": "audio/mpeg", ".ogg": "audio/ogg"}
_NO_ROOM = ("", "", "no room left on this page")
_OPENING_SECONDS = 15.0  # for files that a run has kept no preview of


class Shown(NamedTuple):
    """One medium in one place of a page.

    Attributes:
        tag: ``img``, ``video`` or ``audio``; empty where it cannot be shown.
        name: its file's name, or the label that the log has.
        key: of the medium: the same wherever it comes again.
        uri: its data, in the first place only.
        reason: why it is not shown.
    """

    tag: str
    name: str
    key: str = ""
    uri: str = ""
    reason: str = ""


class Embedder:
    """Turns what samples.jsonl and evaluation.jsonl say of media into what a page shows.

    Args:
        run: the run folder; previews are read from inside of it only.
        most_bytes: of the page, for media, base64 included.
    """

    def __init__(self, run: Path, most_bytes: int) -> None:
        self.run, self.left = run.resolve(), most_bytes
        self._found: dict[str, tuple[str, str, str]] = {}  # file or label: (tag, address, reason)
        self._keys: dict[str, str] = {}
        self._placed: set[str] = set()
        self._until = time.monotonic() + _OPENING_SECONDS

    def load(self, record: dict[str, Any]) -> None:
        """Take in a record's media, as long as there is room: the most important records come first."""
        for kept, label in _media(record):
            if (kept or label) not in self._found:
                self._found[kept or label] = self._read(kept, label)

    def place(self, record: dict[str, Any]) -> list[Shown]:
        """A record's media, which are loaded, for one place of the page."""
        shown = []
        for kept, label in _media(record):
            name, (tag, uri, reason) = short(label or kept), self._found[kept or label]
            key = self._keys.setdefault(kept or label, f"m{len(self._keys)}")
            if not tag:
                shown.append(Shown("", name, reason=reason))
                continue
            shown.append(Shown(tag, name, key, "" if key in self._placed else uri))
            self._placed.add(key)
        return shown

    def _read(self, kept: str, label: str) -> tuple[str, str, str]:
        try:
            if kept:
                path = (self.run / kept).resolve()
                if not path.is_relative_to(self.run):
                    return "", "", "its file lies outside of the run folder"
                mime = _SHOWN.get(path.suffix.lower(), "")
                if not path.is_file() or not mime:
                    return "", "", "its preview is missing"
                size = path.stat().st_size
                return (
                    self._fit(mime, path.read_bytes()) if size <= self.left else ("", "", "no room left on this page")
                )
            medium = medium_of_label(label)
            if medium is None:
                return "", "", "the run has kept no preview of it"
            if self.left <= 0 or time.monotonic() > self._until:
                return _NO_ROOM
            found = preview(medium)
            return self._fit(found.mime, found.data)
        except (VLMGRPOError, *read_errors()):
            return "", "", "it cannot be opened"

    def _fit(self, mime: str, data: bytes) -> tuple[str, str, str]:
        uri = f"data:{mime};base64,{base64.b64encode(data).decode()}"
        if len(uri) > self.left:
            return _NO_ROOM
        self.left -= len(uri)
        kind = mime.partition("/")[0]
        return "img" if kind == "image" else kind, uri, ""


def _media(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(preview's file, label) of each medium, one of them empty where it is not known."""
    labels = labels_of(record)
    files = [item.get("file") for item in _list(record.get("media_files")) if isinstance(item, dict)]
    files = [file for file in files if isinstance(file, str) and file]
    if not files:
        return [("", label) for label in labels]
    # One that could not be opened has no file, and then nothing says which.
    return list(zip(files, labels if len(labels) == len(files) else [""] * len(files), strict=True))


def labels_of(record: dict[str, Any]) -> list[str]:
    """The labels of a record's media."""
    return [label for label in _list(record.get("media")) if isinstance(label, str) and label]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def short(label: str) -> str:
    """The name of a file without its folders, which are this machine's own; other labels as they are."""
    name = label if label.startswith("<") else label.replace("\\", "/").rstrip("/").rpartition("/")[2] or label
    return name if len(name) <= 60 else f"{name[:59]}…"
