"""Reading completions, shared by the text rewards."""

import re
from typing import Any

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def completion_text(completion: Any) -> str:
    """The text of a completion in either of TRL's forms: a string, or a list of messages (the last one counts)."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else ""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def answer_body(text: str) -> str:
    """The body of the first ``<answer>…</answer>``, or the whole text when there is none."""
    match = _ANSWER.search(text)
    return match.group(1) if match else text


def normalized(text: str) -> str:
    """Case, outer punctuation and white space removed, so that ``" Seven. "`` equals ``"seven"``."""
    return " ".join(text.casefold().split()).strip(" .!\"'`")
