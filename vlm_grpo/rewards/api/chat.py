"""An OpenAI-compatible chat completions judge: a question in, a reply out that holds a score."""

import json
import re
from typing import Any

from ..failed import Failed
from .client import Problem
from .media import Sent
from .numbers import score_of
from .options import ApiOptions
from .texts import Item

_NUMBER = re.compile(r"[-+]?\d{1,30}(\.\d{1,30})?")
_SAID = re.compile(r"(score|rating)\b", re.IGNORECASE)
_MARKS = " \t\r\n*_#:=`"  # around a number that is a whole reply
_LONGEST_NUMBER = 200  # characters of such a reply
_LONGEST_REPLY = 100_000  # characters; what stands in front of them is not searched for a score
_MOST_OBJECTS = 200


def request(options: ApiOptions, items: list[Item]) -> dict[str, Any]:
    """The body of a request for one completion; media stand before the text."""
    (item,) = items
    parts = [part for sent in item.media for part in _parts(sent)]
    content: Any = [*parts, {"type": "text", "text": item.text}] if parts else item.text
    system = [] if item.system is None else [{"role": "system", "content": item.system}]
    return {**options.body, "model": options.model, "messages": [*system, {"role": "user", "content": content}]}


def _parts(sent: Sent) -> list[dict[str, Any]]:
    if sent.kind == "audio":
        form = "wav" if sent.mime == "audio/wav" else "mp3"
        return [{"type": "input_audio", "input_audio": {"data": sent.base64[0], "format": form}}]
    return [{"type": "image_url", "image_url": {"url": f"data:{sent.mime};base64,{data}"}} for data in sent.base64]


def read(options: ApiOptions, answer: Any, count: int) -> list[float | None | Failed]:
    """The one score of a reply, in a list.

    Raises:
        Problem: no reply, or none that holds a score.
    """
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise Problem("no reply in the answer", str(answer)[:200]) from None
    if isinstance(text, list):  # some servers answer in parts
        text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
    score = score_in(text, options.score_pattern) if isinstance(text, str) else None
    if score is None:
        raise Problem("no score in the reply", f'"{" ".join(str(text).split())[:200]}"')
    return [score_of(score, options)]


def score_in(text: str, pattern: str | None = None) -> float | None:
    """The score that a judge's reply ends with, or None.

    With ``pattern`` its last match counts. Without one the last JSON object with a ``"score"`` does; failing that, a
    reply that is a number and nothing else, such as ``7`` or ``Score: 7.5``. A number within a sentence is not taken
    for one: of "4 out of 5" nobody knows which it would be.
    """
    text = text[-_LONGEST_REPLY:]
    if pattern is not None:
        matches = re.findall(pattern, text)
        return _number(matches[-1]) if matches else None
    found = _last_object(text)
    if found is not None:
        return found
    return _alone(text)


def _alone(text: str) -> float | None:
    """The number that a short reply consists of."""
    if len(text) > _LONGEST_NUMBER:
        return None
    bare = _SAID.sub("", text.strip(_MARKS + "."), count=1).strip(_MARKS)
    return float(bare) if _NUMBER.fullmatch(bare) else None


def _last_object(text: str) -> float | None:
    decoder = json.JSONDecoder()
    end = len(text)
    for _ in range(_MOST_OBJECTS):
        end = text.rfind("{", 0, end)
        if end < 0:
            return None
        try:
            value, _ = decoder.raw_decode(text, end)
        except (ValueError, RecursionError):
            continue
        score = _number(value.get("score"))
        if score is not None:
            return score
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
