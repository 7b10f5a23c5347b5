"""Reading completions, shared by the text rewards."""

import unicodedata
from typing import Any

# Not brackets, signs or units: "(0, 1]" is not "[0, 1)", and "-7" is not "7".
_QUOTES = " \"'`*“”‘’"
_TRAILING = _QUOTES + ".,;:!?。，！？"  # not leading: ".5" is not "5"


def completion_text(completion: Any) -> str:
    """The text of a completion in either of TRL's forms: a string, or a list of messages (the last one counts)."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else ""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def written(value: Any) -> str:
    """A column's value as text; ``7.0`` as ``7``, since a table makes floats of whole numbers beside a fraction."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def answer_body(text: str) -> str:
    """The body of the first ``<answer>…</answer>``, or the whole text when there is none."""
    # find() and not a regular expression, which takes hours on a completion of nothing but opening tags.
    start = text.find("<answer>")
    end = text.find("</answer>", start)
    return text if start < 0 or end < 0 else text[start + len("<answer>") : end]


def normalized(text: str) -> str:
    """Case, outer punctuation and white space removed, so that ``" Seven. "`` equals ``"seven"``."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).lstrip(_QUOTES).rstrip(_TRAILING)
