"""A dataset row as the trainer sees it: messages whose media parts hold the media, and the reward columns."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataFormatError
from ..media import Medium

MEDIA_COLUMNS = ("image", "images")
_PART_TYPES = ("text", "image")
_SOURCES = ("image", "url", "path", "bytes")


@dataclass(frozen=True)
class Sample:
    """One row.

    Attributes:
        prompt: messages with list contents, media parts as ``{"type": "image", "image": Medium}``; or a plain string,
            to which the chat template has been applied already.
        media: the row's media, in the order of their slots.
        columns: every other column, for the reward functions.
    """

    prompt: list[dict[str, Any]] | str
    media: list[Medium]
    columns: dict[str, Any] = field(default_factory=dict)


def to_sample(row: dict[str, Any], root: Path | None = None, where: str = "") -> Sample:
    """Read a TRL or Unsloth row: ``prompt`` with ``image`` or ``images``, or with media inside the message parts.

    Args:
        row: the row; it is not changed.
        root: the folder that relative media paths start from.
        where: how the user finds the row again, such as ``train.jsonl row 17``.

    Raises:
        DataFormatError: no prompt, an unknown part type, or slots and media that do not match in number.
    """
    prompt = row.get("prompt")
    if not isinstance(prompt, (str, list, tuple, type(None))):
        raise DataFormatError(_at(where, f'"prompt" is {_short(prompt)}. Give a text or a list of messages.'))
    if not prompt:
        raise DataFormatError(_at(where, 'the row has no "prompt". Give a text or a list of messages.'))
    media = _column_media(row, root, where)
    columns = {key: value for key, value in row.items() if key not in ("prompt", *MEDIA_COLUMNS)}
    if isinstance(prompt, str):
        return Sample(prompt, media, columns)
    messages = _fill_slots(list(prompt), media, root, where)
    return Sample(messages, [part["image"] for part in _all_parts(messages) if part["type"] == "image"], columns)


def _at(where: str, sentence: str) -> str:
    return f"{where}: {sentence}" if where else sentence[0].upper() + sentence[1:]


def _column_media(row: dict[str, Any], root: Path | None, where: str) -> list[Medium]:
    given = [name for name in MEDIA_COLUMNS if row.get(name) is not None]
    if len(given) > 1:
        raise DataFormatError(_at(where, 'the row has both "image" and "images". Keep one of them.'))
    if not given:
        return []
    value = row[given[0]]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [Medium.of(item, root, where) for item in values]


def _fill_slots(
    prompt: list[dict[str, Any]], media: list[Medium], root: Path | None, where: str
) -> list[dict[str, Any]]:
    """Give each media slot its medium, in order; without a slot, media go before the first user message's text."""
    remaining, slots = list(media), 0
    messages: list[dict[str, Any]] = []
    for message in prompt:
        if not isinstance(message, dict) or "role" not in message:
            raise DataFormatError(
                _at(where, f'a message of "prompt" has no "role": {_short(message)}. Give {{"role", "content"}}.')
            )
        parts = []
        for part in _parts(message.get("content"), where):
            if part["type"] == "image":
                own = next((part[key] for key in _SOURCES if part.get(key) is not None), None)
                slots += own is None
                if own is None and not remaining:
                    raise DataFormatError(_mismatch(where, _count_slots(prompt), len(media)))
                medium = remaining.pop(0) if own is None else Medium.of(own, root, where)
                part = {"type": "image", "image": medium}
            parts.append(part)
        # Arrow fills the keys that a row lacks with None; chat templates test for their presence.
        rest = {key: value for key, value in message.items() if value is not None}
        messages.append({**rest, "content": parts})
    if remaining and slots:
        raise DataFormatError(_mismatch(where, slots, len(media)))
    if remaining:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise DataFormatError(_at(where, "the prompt has media but no user message. Add one."))
        first["content"] = [{"type": "image", "image": medium} for medium in remaining] + first["content"]
    return messages


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise DataFormatError(
            _at(where, f'the "content" of a message is {_short(content)}. Give a text or a list of parts.')
        )
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _PART_TYPES:
            raise DataFormatError(
                _at(
                    where,
                    f"a message has a part of type {kind!r}: {_short(part)}. Use one of {', '.join(_PART_TYPES)}.",
                )
            )
        if kind == "text" and not isinstance(part.get("text"), str):
            raise DataFormatError(_at(where, f'a text part has no "text": {_short(part)}. Give a string.'))
        parts.append({key: value for key, value in part.items() if value is not None})
    return parts


def _all_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]


def _count_slots(prompt: list[dict[str, Any]]) -> int:
    return sum(
        part.get("type") == "image" and all(part.get(key) is None for key in _SOURCES) for part in _all_parts(prompt)
    )


def _mismatch(where: str, slots: int, media: int) -> str:
    return _at(
        where,
        f'the prompt has {slots} image slot{"s" * (slots != 1)} but "image(s)" holds {media}. '
        "Give one image per slot, or remove the slots.",
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
