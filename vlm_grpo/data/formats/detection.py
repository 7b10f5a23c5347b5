"""Which format a row has, and the row in the canonical form."""

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError, DataFormatError, nearest
from ..sample import MEDIA_COLUMNS, at
from .base import Format, Reading
from .caption_types import refuse_untyped
from .conversations import CONVERSATIONS, LLAVA_RLHF, MESSAGES
from .mapping import read_tags, renamed
from .preference import PREFERENCE, RLAIF_V
from .questions import ALPACA, EASYR1, R1_AQA, VLM_R1, VQA
from .trl import TRL

# A row has the first format that it fits.
FORMATS: tuple[Format, ...] = (
    TRL,
    LLAVA_RLHF,
    CONVERSATIONS,
    MESSAGES,
    VLM_R1,
    EASYR1,
    R1_AQA,
    VQA,
    RLAIF_V,
    ALPACA,
    PREFERENCE,
)


def detect(
    row: Mapping[str, Any],
    where: str = "",
    columns: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Format:
    """The format of a row, told by the columns that hold something.

    Args:
        row: the row, or its columns with anything that is not None as values.
        where: how the user finds it again.
        columns: our name of a column: the file's.
        tags: names inside a turn; they do not decide the format.

    Raises:
        ConfigError: an unknown tag.
        DataFormatError: the columns fit no format; the message names the nearest and what it lacks.
    """
    read_tags(tags)
    return choose(renamed(dict(row), columns), where, None)


def named(name: str) -> Format:
    """The format of a name.

    Raises:
        ConfigError: there is none.
    """
    known = [format_.name for format_ in FORMATS]
    if name not in known:
        hint = nearest(name, known) or f" Known are {', '.join(known)}."
        raise ConfigError(f'There is no format "{name}".{hint}')
    return next(format_ for format_ in FORMATS if format_.name == name)


def canonical(
    row: dict[str, Any],
    where: str = "",
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The row in the canonical form; the row itself is not changed.

    Args:
        row: of any format; one that is canonical already comes back as it is.
        where: how the user finds it again, such as ``train.jsonl row 17``.
        format: the name of its format, where it is not to be detected.
        columns: our name of a column: the file's.
        tags: names inside a turn, as in LLaMA-Factory's ``dataset_info.json``.

    Returns:
        ``prompt``, then the row's columns without those that are wholly in ``prompt`` and ``completion``.

    Raises:
        ConfigError: an unknown format or tag.
        DataFormatError: the row fits no format, or not the given one; turns, media and answers that do not match.
    """
    absent = [f'"{theirs}" for "{ours}"' for ours, theirs in (columns or {}).items() if theirs not in row]
    row = renamed(row, columns)
    try:
        found = choose(row, where, format)
    except DataFormatError as error:
        if not absent:
            raise
        raise DataFormatError(f"{error} The option columns names {' and '.join(absent)}, which it lacks.") from error
    row = {**row, **{ours: row[theirs] for ours, theirs in media_names(row, found).items()}}
    read = found.read(row, Reading.of(row, where, read_tags(tags)))
    others = {name: value for name, value in row.items() if name not in read.used}
    return {"prompt": read.columns.get("prompt", row.get("prompt")), **others, **read.columns}


def choose(row: Mapping[str, Any], where: str, format: str | None) -> Format:
    """The format of a row whose columns have our names: the given one, or the one that is detected."""
    if format is None:
        found = next((format_ for format_ in FORMATS if format_.matches(row)), None)
        if found is None:
            raise DataFormatError(at(where, _no_format(row)))
        if found is CONVERSATIONS and "caption_type" in row:  # a table's column, empty in this row
            raise refuse_untyped(where)
        return found
    chosen = named(format)
    missing = chosen.missing(row)
    if missing:
        problem = f'the row is no "{format}" row: it lacks {" and ".join(missing)} (it has {_names(row)}).'
        raise DataFormatError(at(where, f"{problem} Correct the row, or leave the option format out."))
    return chosen


def media_names(columns: Mapping[str, Any], found: Format) -> dict[str, str]:
    """{media column: the column that stands for it}, of the kinds that have none under their own names."""
    names: dict[str, str] = {}
    for theirs, kind in found.media.items():
        own = columns.get(kind) is not None or columns.get(f"{kind}s") is not None
        if columns.get(theirs) is not None and not own and kind not in names:
            names[kind] = theirs
    return names


def _no_format(row: Mapping[str, Any]) -> str:
    present = [name for name, value in row.items() if value is not None]
    # Of equals the plainer one, which is further down.
    best = min(reversed(FORMATS), key=lambda f: (len(f.missing(row)) - len(f.needs), len(f.missing(row))))
    needed = [name for format_ in FORMATS for names in format_.needs for name in names]
    if len(best.missing(row)) == len(best.needs):  # nothing of any format: a misspelt name?
        typo = next((f'{hint[:-1]} for "{name}"?' for name in present if (hint := nearest(name, needed))), "")
        advice = typo or ' The nearest is "trl", which needs "prompt".'
    else:
        advice = f' The nearest is "{best.name}", which also needs {" and ".join(best.missing(row))}.'
    return (
        f"the row fits no format: it has {_names(row)}.{advice} Add the column, or say which one it is with the "
        "option columns."
    )


def _names(row: Mapping[str, Any]) -> str:
    names = [f'"{name}"' for name, value in row.items() if value is not None]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "no columns with values"


# Every column that some format reads; a table's other columns stay where they are, unread.
READ = (
    *("prompt", "completion", "answer", "solution", "conversations", "messages", "caption_type"),
    *("length_bonus", "system", "objects"),
    *("problem", "question", "question_text", "choices", "multi_choice"),
    *("instruction", "input", "output", "history", "query", "response"),
    *("chosen", "rejected"),
)
assert not set(READ) & set(MEDIA_COLUMNS), "media are never read"
