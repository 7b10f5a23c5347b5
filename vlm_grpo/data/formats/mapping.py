"""Names that a file has for things: ``columns`` and ``tags``, as in LLaMA-Factory's ``dataset_info.json``."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...errors import ConfigError, nearest
from .base import Tags

_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "tool",
    "function_tag": "assistant",
}
_TAGS = ("role_tag", "content_tag", *_ROLES)
# LLaMA-Factory's names for the columns of an instruction.
_SYNONYMS = {"prompt": "instruction", "query": "input", "response": "output"}


def read_tags(tags: Mapping[str, str] | None) -> Tags:
    """The option ``tags``.

    Raises:
        ConfigError: an unknown tag.
    """
    tags = tags or {}
    for name in tags:
        if name not in _TAGS:
            hint = nearest(name, list(_TAGS)) or f" Known are {', '.join(_TAGS)}."
            raise ConfigError(f'tags has the unknown name "{name}".{hint}')
    roles = {tags[name]: role for name, role in _ROLES.items() if name in tags}
    return Tags(tags.get("role_tag"), tags.get("content_tag"), roles)


def renamed(row: dict[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    """The row with the columns of the option ``columns`` (our name: the file's) under our names.

    A text under ``prompt`` is an instruction, to which the chat template has yet to be applied. A column that already
    has the name goes on as ``original_<name>``.
    """
    if not columns:
        return row
    names = rename(row, columns, lambda name: isinstance(row[name], str))
    return {names.get(name, name): value for name, value in row.items()}


def rename(present: Iterable[str], columns: Mapping[str, str] | None, is_text: Callable[[str], bool]) -> dict[str, str]:
    """{the file's name: ours} of the columns that are present; ``is_text`` says of a column whether it holds texts."""
    present = list(present)
    names: dict[str, str] = {}
    taken: set[str] = set()
    for ours, theirs in (columns or {}).items():
        if theirs not in present:
            continue
        taken.add(ours)
        # Without a prompt they are ms-swift's, and have these names themselves.
        if ours in ("query", "response") and "prompt" in (columns or {}):
            ours = _SYNONYMS[ours]
        if ours == "prompt" and theirs != "prompt" and is_text(theirs):
            ours = _SYNONYMS[ours]
        names[theirs] = ours
        taken.add(ours)
    return {**{name: f"original_{name}" for name in present if name in taken and name not in names}, **names}


def check_columns(columns: Mapping[str, str] | None, present: Iterable[str], name: str) -> None:
    """Raises ConfigError where the option ``columns`` names one that no row has."""
    present = list(present)
    for ours, theirs in (columns or {}).items():
        if theirs not in present:
            hint = nearest(theirs, present) or f" It has {', '.join(present) or 'none'}."
            raise ConfigError(f'columns reads "{ours}" from the column "{theirs}", but no row of {name} has it.{hint}')
