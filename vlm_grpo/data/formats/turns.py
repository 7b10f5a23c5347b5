"""Turns of a conversation, under anyone's names, as messages whose placeholders are slots."""

import re
from collections.abc import Mapping
from typing import Any

from ...errors import nearest
from ...media import KINDS, Kind
from ..sample import media_mismatch, shorten
from .base import Reading, listed

_PLACEHOLDER = re.compile(f"<({'|'.join(KINDS)})>")
_OWN_SOUND = re.compile("<audio>\n?")
_KEYS = (("role", "content"), ("from", "value"))
ROLES: dict[str, str] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function"), "tool"),
}
# One call after another is one turn in parts, not two turns.
_CALLS = ("function_call", "tool_call")
_TEXTS = ("text", "input_text", "output_text")
# Parts of OpenAI's chat and responses interfaces: type -> kind.
_ADDRESSED: dict[str, Kind] = {"input_image": "image", "input_audio": "audio", **{f"{k}_url": k for k in KINDS}}

Message = dict[str, Any]


def read_turns(value: Any, column: str, reading: Reading) -> list[Message]:
    """Messages ``{"role", "content", ...}`` with OpenAI's roles; contents and further keys as they are.

    Raises:
        DataFormatError: no list of turns, an unknown role, a content that is neither text nor parts, two turns of
            the same side in a row, or a conversation that the assistant begins.
    """
    value = listed(value)
    if isinstance(value, Mapping):
        value = _transposed(value)
    if not isinstance(value, (list, tuple)):
        raise reading.refuse(f'"{column}" is {shorten(value)}. Give a list of turns.')
    if not value:
        raise reading.refuse(f'"{column}" is empty. Give at least one turn of the user.')
    turns, before = [], None
    for number, turn in enumerate(value, 1):
        name, message = _message(turn, f'turn {number} of "{column}"', reading)
        role = message["role"]
        if role == before == "user" or (role == before == "assistant" and name not in _CALLS):
            both = f'turns {number - 1} and {number} of "{column}" are both from "{name}"'
            raise reading.refuse(f"{both}. Join them, or add the turn between.")
        if role == "assistant" and before in (None, "system"):
            raise reading.refuse(
                f'"{column}" begins with a turn from "{name}". Put the user\'s turn before it, or remove it.'
            )
        turns.append(message)
        before = role
    if not any(turn["role"] == "user" for turn in turns):
        raise reading.refuse(f'"{column}" has no turn of the user. Add one.')
    return turns


def _message(turn: Any, name: str, reading: Reading) -> tuple[str, Message]:
    """(what the file calls the role, message)."""
    if not isinstance(turn, Mapping):
        raise reading.refuse(f'{name} is {shorten(turn)}. Give {{"from", "value"}} or {{"role", "content"}}.')
    tags = reading.tags
    role_key, content_key = next((keys for keys in _KEYS if turn.get(keys[0]) is not None), _KEYS[0])
    role_key, content_key = tags.role or role_key, tags.content or content_key
    role = turn.get(role_key)
    known = {**ROLES, **tags.roles}
    if not isinstance(role, str) or role not in known:
        hint = nearest(role, list(known)) if isinstance(role, str) else ""
        hint = hint or f" Known are {', '.join(known)}."
        raise reading.refuse(f'{name} has "{role_key}": {shorten(role)}.{hint} Other names go into the option tags.')
    content = turn.get(content_key)
    rest = {key: item for key, item in turn.items() if key not in (role_key, content_key) and item is not None}
    if content is None and not rest.get("tool_calls"):
        raise reading.refuse(f'{name} has no "{content_key}": {shorten(dict(turn))}. Give a text.')
    if content is not None and not isinstance(content, (str, list, tuple)):
        raise reading.refuse(f'{name} has "{content_key}": {shorten(content)}. Give a text.')
    return role, {"role": known[role], "content": content, **rest}


def _transposed(columns: Mapping[str, Any]) -> Any:
    """Turns from one list a key, which is what older tables make of a list of objects."""
    lists = list(columns.values())
    if not lists or not all(isinstance(item, list) and len(item) == len(lists[0]) for item in lists):
        return columns
    return [dict(zip(columns, items, strict=True)) for items in zip(*lists, strict=True)]


def split_answer(turns: list[Message], reading: Reading) -> tuple[list[Message], list[Message] | None, str | None]:
    """(prompt, completion, its text): the completion is the assistant's turn at the end, if there is one.

    Raises:
        DataFormatError: that turn holds media, which no model here can be taught to answer.
    """
    if turns[-1]["role"] != "assistant":
        return turns, None, None
    last = turns[-1]
    content = last["content"]
    if isinstance(content, (list, tuple)):
        parts = [_part(part, reading) for part in content]
        if any(part["type"] != "text" for part in parts):
            raise reading.refuse("the answer, the assistant's last turn, holds media. Only texts can be learned.")
        content = "".join(part["text"] for part in parts)
    return turns[:-1], [{**last, "content": content}], content or None


def without_own_sound(messages: list[Message], reading: Reading) -> tuple[list[Message], bool]:
    """R1-Omni writes ``<video>\\n<audio>\\n`` for a video that is heard: without sounds in the row, and with as many
    ``<audio>`` as ``<video>``, the former are the videos' own tracks and take no slot.

    Returns:
        the messages without such ``<audio>``, and whether there were any.
    """
    texts = [message["content"] for message in messages if isinstance(message["content"], str)]
    sounds, videos = (sum(text.count(f"<{kind}>") for text in texts) for kind in ("audio", "video"))
    if not sounds or sounds != videos or reading.media.get("audio") != 0:
        return messages, False
    silent = [
        {**m, "content": _OWN_SOUND.sub("", m["content"])} if isinstance(m["content"], str) else m for m in messages
    ]
    return silent, True


def with_slots(messages: list[Message], reading: Reading) -> list[Message]:
    """The messages with list contents, ``<image>``, ``<video>`` and ``<audio>`` in their texts as slots.

    Every other character of a text stays. Where a message says by parts where its media go, texts are only texts.

    Raises:
        DataFormatError: more or fewer placeholders than media of a kind; a part of no known type.
    """
    contents = [_parts(message["content"], reading) for message in messages]
    if all(part["type"] == "text" for parts in contents for part in parts):
        contents = [[piece for part in parts for piece in _pieces(part)] for parts in contents]
        for kind in KINDS:
            slots = sum(part["type"] == kind for parts in contents for part in parts)
            media = reading.media.get(kind)
            if slots and media is not None and slots != media:
                raise reading.refuse(media_mismatch(kind, slots, media, f"<{kind}> placeholder"))
    return [{**message, "content": parts} for message, parts in zip(messages, contents, strict=True)]


def _pieces(part: dict[str, Any]) -> list[dict[str, Any]]:
    pieces: list[dict[str, Any]] = []
    for number, piece in enumerate(_PLACEHOLDER.split(part["text"])):
        if number % 2:
            pieces.append({"type": piece})
        elif piece:
            pieces.append({**part, "text": piece})
    return pieces or [part]


def _parts(content: Any, reading: Reading) -> list[dict[str, Any]]:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else [_part(p, reading) for p in content]


def _part(part: Any, reading: Reading) -> dict[str, Any]:
    """A part of a message under our names: OpenAI's ``image_url`` as ``image``, a bare text as a text part."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in (*_TEXTS, *KINDS, *_ADDRESSED):
        known = ", ".join((*_TEXTS[:1], *KINDS, *_ADDRESSED))
        raise reading.refuse(f"a message has a part of type {shorten(kind)}: {shorten(part)}. Use one of {known}.")
    part = {key: value for key, value in part.items() if value is not None}
    if kind in _TEXTS:
        if not isinstance(part.get("text"), str):
            raise reading.refuse(f'a text part has no "text": {shorten(part)}. Give a string.')
        return {**part, "type": "text"}
    if kind in KINDS and f"{kind}_url" not in part:  # Qwen's processors take {"type": "audio", "audio_url": ...} too
        return part
    ours = _ADDRESSED.get(kind, kind)
    given = part.get(kind, part.get(f"{ours}_url"))
    if isinstance(given, Mapping):
        # OpenAI's sounds are bare base64, its pictures addresses.
        encoded = given.get("data")
        given = f"data:;base64,{encoded}" if isinstance(encoded, str) else given.get("url")
    if not isinstance(given, str):
        raise reading.refuse(
            f'a part of type "{kind}" has no address: {shorten(part)}. Give a path or a data: address.'
        )
    rest = {key: value for key, value in part.items() if key not in ("type", kind, f"{ours}_url")}
    return {**rest, "type": ours, ours: given}
