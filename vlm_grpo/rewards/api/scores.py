"""The scoring protocol: a list of texts in, a list of numbers out.

``POST {"model": ..., "messages": [text, ...]}`` gives ``{"scores": [number or null, ...]}``, null for "not applicable".

Where they are asked for, ``"columns": {name: [value, ...]}`` and ``"media": [[{"type", "mime", "data"}, ...], ...]``
stand beside ``messages``, one entry a text: ``type`` is image, video or audio, ``data`` base64; a video may have
``"frames": [base64, ...]`` in place of ``data``. A server may add ``"failed": [null or reason, ...]``.
"""

from typing import Any

from ..failed import Failed
from .client import Problem
from .numbers import score_of
from .options import ApiOptions
from .texts import Item

_LONGEST_REASON = 80  # characters


def request(options: ApiOptions, items: list[Item]) -> dict[str, Any]:
    """The body of a request."""
    body: dict[str, Any] = {"model": options.model, "messages": [item.text for item in items]}
    if options.send_columns:
        body["columns"] = {name: [item.columns[name] for item in items] for name in options.send_columns}
    if options.send_media:
        body["media"] = [[_medium(sent) for sent in item.media] for item in items]
    return body


def _medium(sent: Any) -> dict[str, Any]:
    data = sent.base64
    return {"type": sent.kind, "mime": sent.mime, **({"data": data[0]} if sent.whole else {"frames": data})}


def read(options: ApiOptions, answer: Any, count: int) -> list[float | None | Failed]:
    """One score a text; Failed where one of them is no score.

    Raises:
        Problem: the answer has no scores, or not as many as there are texts.
    """
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise Problem('no "scores" in the answer', str(answer)[:200])
    if len(scores) != count:
        raise Problem("wrong number of scores", f"{len(scores)} for {count} texts")
    failed = answer.get("failed")
    if not isinstance(failed, list) or len(failed) != count:
        failed = [None] * count
    return [
        Failed(f"server: {reason[:_LONGEST_REASON]}")
        if isinstance(reason, str)
        else None
        if score is None
        else score_of(score, options)
        for score, reason in zip(scores, failed, strict=True)
    ]
