"""A dataset row as the trainer sees it: messages whose media parts hold the media, and the reward columns."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DataFormatError
from ..media import KINDS, OVERRIDES, Kind, Medium

# Singular and plural of every kind, in the order in which media without a slot are put before the text.
COLUMNS: dict[str, Kind] = {name: kind for kind in KINDS for name in (kind, f"{kind}s")}
MEDIA_COLUMNS = tuple(COLUMNS)
_PART_TYPES = ("text", *KINDS)
_SOURCES = ("url", "path", "bytes")
_STILLS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
_SIZES, _SOUNDS = ("min_pixels", "max_pixels"), ("max_audio_seconds",)
_MAY_SET = {"image": _SIZES, "audio": _SOUNDS, "video": OVERRIDES}


@dataclass(frozen=True)
class Sample:
    """One row.

    Attributes:
        prompt: messages with list contents, media parts as ``{"type": "video", "video": Medium}``; or a plain string,
            to which the chat template has been applied already.
        media: the row's media, in the order of their slots.
        columns: every other column, for the reward functions.
        where: how the user finds the row again.
    """

    prompt: list[dict[str, Any]] | str
    media: list[Medium]
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = ""


def to_sample(row: dict[str, Any], root: Path | None = None, where: str = "") -> Sample:
    """Read a TRL or Unsloth row: ``prompt`` with media columns, or with media inside the message parts.

    Media columns are ``image(s)``, ``video(s)`` and ``audio(s)``. The columns ``min_pixels``, ``max_pixels``,
    ``min_frames``, ``max_frames``, ``base_interval``, ``fps``, ``frame_cnts``, ``dynamic_sample`` and
    ``max_audio_seconds``, also inside ``meta``, hold for the row's own media; a message part may set them too.

    Args:
        row: the row; it is not changed.
        root: the folder that relative media paths start from.
        where: how the user finds the row again, such as ``train.jsonl row 17``.

    Raises:
        DataFormatError: no prompt, an unknown part type, or slots and media that do not match in number.
        MediaError: a medium of a type that cannot be one.
    """
    prompt = row.get("prompt")
    if not isinstance(prompt, (str, list, tuple, type(None))):
        raise DataFormatError(at(where, f'"prompt" is {shorten(prompt)}. Give a text or a list of messages.'))
    if not prompt:
        raise DataFormatError(at(where, 'the row has no "prompt". Give a text or a list of messages.'))
    reader = _Reader(_overrides(row), root, where)
    media: dict[Kind, list[Medium]] = {kind: reader.column(row, kind) for kind in KINDS}
    columns = {key: value for key, value in row.items() if key not in ("prompt", *MEDIA_COLUMNS)}
    if isinstance(prompt, str):
        return Sample(prompt, [medium for kind in KINDS for medium in media[kind]], columns, where)
    messages = _fill_slots(list(prompt), media, reader)
    found = [part[part["type"]] for part in all_parts(messages) if part["type"] in KINDS]
    return Sample(messages, found, columns, where)


@dataclass(frozen=True)
class _Reader:
    """Turns cells of one row into media."""

    overrides: dict[str, Any]
    root: Path | None
    where: str

    def column(self, row: dict[str, Any], kind: Kind) -> list[Medium]:
        """The media in the row's ``kind`` or ``kind + "s"`` column."""
        given = [name for name in (kind, f"{kind}s") if row.get(name) is not None]
        if len(given) > 1:
            raise DataFormatError(at(self.where, f'the row has both "{kind}" and "{kind}s". Keep one of them.'))
        if not given:
            return []
        value = row[given[0]]
        several = _is_list(value) if given[0] == f"{kind}s" else _are_several(value, kind)
        return [self.medium(item, kind) for item in (value if several else [value])]

    def medium(self, value: Any, kind: Kind, part: dict[str, Any] | None = None) -> Medium:
        """One medium; a message part's own options come before the row's."""
        options = {**self.overrides, **{key: part[key] for key in OVERRIDES if key in part}} if part else self.overrides
        options = {key: item for key, item in options.items() if key in _MAY_SET[kind]}
        if kind == "video" and _is_list(value) and len(value) == 1 and _is_clip(value[0]):
            value = value[0]  # a table where other rows list frames
        return Medium.of(_numbers(value, kind), kind, self.root, self.where, options)


def swap_media(sample: Sample, instead: dict[int, Medium]) -> Sample:
    """The sample with other media, given by the identity of the ones they replace."""
    media = [instead[id(medium)] for medium in sample.media]
    if isinstance(sample.prompt, str):
        return replace(sample, media=media)
    prompt = [
        {
            **message,
            "content": [
                {**part, part["type"]: instead[id(part[part["type"]])]} if part["type"] in KINDS else part
                for part in message["content"]
            ],
        }
        for message in sample.prompt
    ]
    return replace(sample, prompt=prompt, media=media)


def _overrides(row: dict[str, Any]) -> dict[str, Any]:
    meta = row.get("meta")
    own = {**(meta if isinstance(meta, dict) else {}), **{key: row[key] for key in OVERRIDES if key in row}}
    return {key: own[key] for key in OVERRIDES if own.get(key) is not None}


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _are_several(value: Any, kind: Kind) -> bool:
    """Whether a list in the singular column is several media: frames are one video, numbers are one sound."""
    if not _is_list(value) or not value:
        return _is_list(value)
    if kind == "image":
        return True
    return _is_clip(value[0]) if kind == "video" else not isinstance(value[0], (int, float))


def _is_clip(item: Any) -> bool:
    """Whether an item of a list is a video of its own, not a frame."""
    if isinstance(item, (str, Path)):
        return Path(item).suffix.lower() not in _STILLS
    return getattr(item, "ndim", 3) == 4 or (_is_list(item) and bool(item) and not _is_number(_leaf(item)))


def _numbers(value: Any, kind: Kind) -> Any:
    """Nested lists of numbers, which is what a table makes of an array, as that array again."""
    if kind == "image" or not _is_list(value) or not _is_number(_leaf(value)):
        return value
    import numpy as np

    try:
        return np.asarray(value, np.uint8 if kind == "video" else np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        reason = f"{error}".splitlines()[0].rstrip(".")
        raise DataFormatError(f"The numbers of a {kind} form no array ({reason}). Correct the row.") from error


def _leaf(value: Any) -> Any:
    while _is_list(value) and value:
        value = value[0]
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def at(where: str, sentence: str) -> str:
    """The sentence behind the place it is about."""
    return f"{where}: {sentence}" if where else sentence[0].upper() + sentence[1:]


def _fill_slots(prompt: list[dict[str, Any]], media: dict[Kind, list[Medium]], reader: _Reader) -> list[dict[str, Any]]:
    """Give each slot its medium, kind by kind in order; media of a kind without slots go before the first user text."""
    where = reader.where
    remaining, slots = {kind: list(items) for kind, items in media.items()}, dict.fromkeys(KINDS, 0)
    messages: list[dict[str, Any]] = []
    for message in prompt:
        if not isinstance(message, dict) or message.get("role") is None:
            raise DataFormatError(
                at(where, f'a message of "prompt" has no "role": {shorten(message)}. Give {{"role", "content"}}.')
            )
        parts = []
        for part in _parts(message.get("content"), where):
            kind = part["type"]
            if kind in KINDS:
                own = _own_source(part)
                slots[kind] += own is None
                if own is None and not remaining[kind]:
                    slots_in_all = _count_slots(prompt, kind)
                    raise DataFormatError(
                        at(where, media_mismatch(kind, slots_in_all, len(media[kind]), f"{kind} slot"))
                    )
                medium = remaining[kind].pop(0) if own is None else reader.medium(own, kind, part)
                if own is None:
                    medium.overrides |= {key: part[key] for key in _MAY_SET[kind] if key in part}
                part = {"type": kind, kind: medium}
            parts.append(part)
        # Arrow fills the keys that a row lacks with None; chat templates test for their presence.
        rest = {key: value for key, value in message.items() if value is not None}
        messages.append({**rest, "content": parts})
    for kind in KINDS:
        if remaining[kind] and slots[kind]:
            raise DataFormatError(at(where, media_mismatch(kind, slots[kind], len(media[kind]), f"{kind} slot")))
    loose: list[dict[str, Any]] = [{"type": kind, kind: medium} for kind in KINDS for medium in remaining[kind]]
    if loose:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise DataFormatError(at(where, "the prompt has media but no user message. Add one."))
        first["content"] = loose + first["content"]
    return messages


def _own_source(part: dict[str, Any]) -> Any:
    """What a media part holds itself, or None for a slot that a column fills."""
    return next((part[key] for key in (part["type"], *_SOURCES) if part.get(key) is not None), None)


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise DataFormatError(
            at(where, f'the "content" of a message is {shorten(content)}. Give a text or a list of parts.')
        )
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _PART_TYPES:
            raise DataFormatError(
                at(
                    where,
                    f"a message has a part of type {kind!r}: {shorten(part)}. Use one of {', '.join(_PART_TYPES)}.",
                )
            )
        if kind == "text" and not isinstance(part.get("text"), str):
            raise DataFormatError(at(where, f'a text part has no "text": {shorten(part)}. Give a string.'))
        parts.append({key: value for key, value in part.items() if value is not None})
    return parts


def all_parts(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every part of every message with a list content."""
    return (part for message in messages if isinstance(message.get("content"), list) for part in message["content"])


def _count_slots(prompt: list[dict[str, Any]], kind: Kind) -> int:
    return sum(part.get("type") == kind and _own_source(part) is None for part in all_parts(prompt))


def media_mismatch(kind: Kind, slots: int, media: int, slot: str) -> str:
    """Says that so many slots (or whatever a format calls one) face another number of media."""
    name = slot.rpartition(" ")[2]
    return (
        f'the prompt has {slots} {slot}{"s" * (slots != 1)} but "{kind}(s)" holds {media}. '
        f"Give one {kind} per {name}, or remove the {name}s."
    )


def media_count(row: dict[str, Any], kind: Kind) -> int | None:
    """How many media of a kind the row's columns hold; None where ``to_sample`` will refuse them."""
    given = [name for name in (kind, f"{kind}s") if row.get(name) is not None]
    if len(given) != 1:
        return None if given else 0
    value = row[given[0]]
    several = _is_list(value) if given[0] == f"{kind}s" else _are_several(value, kind)
    return len(value) if several else 1


def shorten(value: Any) -> str:
    """A value as it may stand in a message: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
