"""A canonical row on its way into a table: its files looked for, its paths absolute, its media in their columns."""

import base64
import logging
import os
from pathlib import Path
from typing import Any

from ..errors import DataFormatError, MediaError
from ..media import KINDS, Medium
from .sample import Sample, all_parts

logger = logging.getLogger("vlm_grpo")

_LONGEST_PATH = 1000
_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".mp4", ".avi", ".mov", ".mkv", ".webm"),
    *(".wav", ".mp3", ".flac", ".ogg", ".m4a"),
)


def check_sources(sample: Sample) -> None:
    """Raises MediaError where the row names a file that does not exist."""
    for medium in sample.media:
        for source in medium.source if isinstance(medium.source, list) else [medium.source]:
            if isinstance(source, Path) and not os.path.isfile(source):
                raise MediaError(
                    f'{sample.where}: the {medium.kind} "{source}" does not exist. Correct the path or remove the row.'
                )


def as_row(sample: Sample, row: dict[str, Any]) -> dict[str, Any]:
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


def with_lists(row: dict[str, Any]) -> dict[str, Any]:
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
    if isinstance(medium.source, list):
        return [_address(source, medium) for source in medium.source]
    return _address(medium.source, medium)


def _address(source: Any, medium: Medium) -> str:
    """The path of a file, or a ``data:`` address as the row gave it."""
    if isinstance(source, Path):
        return str(source.resolve())
    if isinstance(source, bytes):
        return f"data:;base64,{base64.b64encode(source).decode()}"
    raise DataFormatError(
        f"A JSON row can only name media by path — {medium.where}. Write the {medium.kind} to a file and give its path."
    )


class Hints:
    """Says once of each: media that a prompt names by tags which are texts to the model, and media no format reads."""

    def __init__(self) -> None:
        self._tags = self._unread = False

    def look(self, sample: Sample) -> None:
        if sample.media and not self._tags and not isinstance(sample.prompt, str):
            self._look_for_tags(sample)
        elif not sample.media and not self._unread:
            name = next((name for name, value in sample.columns.items() if _is_medium(value)), None)
            if name is not None:
                self._unread = True
                logger.warning(
                    '%s has no medium that the model sees, though the column "%s" holds one. If it should see it, give '
                    "the column under the name of its kind, in the file or by the option columns: {image: %s}.",
                    *(sample.where, name, name),
                )

    def _look_for_tags(self, sample: Sample) -> None:
        messages: Any = sample.prompt
        texts = "".join(part["text"] for part in all_parts(messages) if part["type"] == "text")
        for kind in KINDS:
            tags = texts.count(f"<{kind}>")
            if tags and tags == sum(medium.kind == kind for medium in sample.media):
                self._tags = True
                logger.warning(
                    '%s: "<%s>" stands in the prompt as text, and its %s elsewhere. For a slot write the part '
                    '{"type": "%s"}, or call the column "messages" in place of "prompt".',
                    *(sample.where, kind, kind, kind),
                )
                return


def _is_medium(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes)
    return isinstance(value, str) and len(value) < _LONGEST_PATH and value.lower().endswith(_SUFFIXES)
