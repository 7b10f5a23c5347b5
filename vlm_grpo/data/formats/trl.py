"""TRL and Unsloth: ``prompt`` beside media columns, or with media inside its parts."""

from typing import Any

from .base import Format, Read, Reading, answered, listed


def _read(row: dict[str, Any], reading: Reading) -> Read:
    prompt, completion = listed(row["prompt"]), row.get("completion")
    messages = {} if prompt is row["prompt"] or not _are_messages(prompt) else {"prompt": prompt}
    if row.get("answer") is not None or (completion is None and row.get("solution") is None):
        return Read(messages)
    return Read({**messages, **answered(row, _text(completion))})


def _are_messages(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)


def _text(completion: Any) -> str | None:
    """What a completion says, a text or messages; None where it says nothing."""
    if isinstance(completion, (list, tuple)) and completion and isinstance(completion[-1], dict):
        completion = completion[-1].get("content")
    if isinstance(completion, (list, tuple)):
        completion = "".join(str(part.get("text") or "") for part in completion if isinstance(part, dict))
    return completion if isinstance(completion, str) and completion else None


TRL = Format(
    "trl",
    'has "prompt", whatever else it has',
    {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit?"}]}],
        "image": "7.png",
        "answer": "7",
    },
    (("prompt",),),
    _read,
    {},
)
