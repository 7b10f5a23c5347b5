"""Reading completions, shared by the text rewards."""

import unicodedata
from typing import Any

from ..errors import RewardError
from ..tags import answer_body as answer_body
from ..tags import span as span

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


def normalized(text: str) -> str:
    """Case, outer punctuation and white space removed, so that ``" Seven. "`` equals ``"seven"``."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).lstrip(_QUOTES).rstrip(_TRAILING)


def column_values(columns: dict[str, Any], column: str) -> list[Any]:
    """The values of ``column`` among the columns that a reward is given.

    Raises:
        RewardError: the rows have no such column; the message names those that they have.
    """
    if column in columns:
        return columns[column]
    known = [
        key
        for key, value in columns.items()
        if isinstance(value, list) and key not in ("prompts", "completions", "completion_ids")
    ]
    raise RewardError(
        f'there is no column "{column}" (the rows have: {", ".join(known) or "none"}). Name the right one.'
    )


def accepted(value: Any) -> list[str]:
    """The texts that a truth allows: one, or each of a list; None and empty lists allow none."""
    values = value if isinstance(value, list | tuple) else [value]
    return [written(item) for item in values if item is not None]
