"""One row of a data file: read as far as it goes, its media looked at in threads."""

import os
import re
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import MediaOptions
from ..data import Sample, to_sample
from ..data.formats import canonical, detect
from ..data.reading import json_files
from ..errors import DataFormatError, MediaError, UnsupportedError
from ..media import Medium
from ..media.container import load_av
from .figures import shortened
from .media_facts import Facts, look_at
from .problems import in_two

ROLES = ("system", "developer", "user", "assistant", "tool")
_QUEUED = 64  # rows whose media are being looked at
_LABEL = 200  # characters of a name
_FILES = 4096  # whose answer is kept, for rows that name a file again
_OPTIONS = re.compile(r"has options that cannot be \((.*)\)$")
_SURROGATE = re.compile("[\ud800-\udfff]")

_Look = Future[tuple[str | None, Facts | None]]


@dataclass(frozen=True)
class Options:
    """What to look at, and how.

    Attributes:
        split: of a folder or name.
        media_root: the folder that relative media paths start from; None: the file's.
        limit: rows, from the top.
        format, columns, tags: as ``data.formats.canonical`` takes them; a format by its name.
        media: how media are opened, and how closely they are looked at (``scan``).
        shown: rows kept for a page.
    """

    split: str = "train"
    media_root: Path | None = None
    limit: int | None = None
    format: str | None = None
    columns: dict[str, str] | None = None
    tags: dict[str, str] | None = None
    media: MediaOptions = field(default_factory=MediaOptions)
    shown: int = 0


@dataclass
class Row:
    """One row: as it is read, or why it is not.

    Attributes:
        number: as a user finds it.
        sample, canonical: None where the row cannot be read as one.
        facts: of each of the sample's media, None for a bad one.
        tokens: (of the prompt, of its media), with a model.
        problems: (what, what to do), of this row alone.
    """

    number: int
    format: str = ""
    sample: Sample | None = None
    canonical: dict[str, Any] | None = None
    facts: list[Facts | None] = field(default_factory=list)
    tokens: tuple[int, int] | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)


def root_of(name: str, options: Options) -> Path | None:
    """The folder that relative media paths start from, as for ``load_data``; None for a name, and a saved dataset."""
    path = Path(name).expanduser()
    if options.media_root is not None:
        return options.media_root.expanduser()
    if not path.is_dir():
        return path.parent if path.is_file() else None
    if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return None
    files = json_files(path, options.split)
    return files[0].parent if files else path


def read_row(number: int, raw: dict[str, Any] | Exception, where: str, root: Path | None, options: Options) -> Row:
    """A raw row as far as it can be read; what keeps it from being a sample is in its ``problems``."""
    row = Row(number)
    try:
        if isinstance(raw, Exception):
            raise raw
        if problem := _unstorable(raw):
            row.problems.append(problem)
            return row
        row.format = options.format or detect(raw, where, options.columns, options.tags).name
        columns = canonical(raw, where, options.format, options.columns, options.tags)
        sample = to_sample(columns, root, where)
    except (DataFormatError, MediaError) as error:
        row.problems.append(in_two(str(error), where))
        return row
    row.sample, row.canonical = sample, columns
    if isinstance(sample.prompt, str):
        if not sample.prompt.strip():
            row.problems.append(("The prompt is empty", "Give a text."))
    else:
        row.problems += _of_messages(sample)
    return row


def _unstorable(value: Any) -> tuple[str, str] | None:
    """(what is wrong, what to do) with a value that JSON can say, and neither a table nor a tokenizer takes."""
    if isinstance(value, str):
        found = None if value.isascii() else _SURROGATE.search(value)
        return found and (f"A text holds half of a character ({found[0]!a})", "Write the text anew, as UTF-8.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"A number has more than 64 bits ({shortened(value, 30)})", "Write it as a text, in every row."
    if isinstance(value, dict):
        return next(filter(None, map(_unstorable, (*value, *value.values()))), None)
    return next(filter(None, map(_unstorable, value)), None) if isinstance(value, (list, tuple)) else None


def _of_messages(sample: Sample) -> Iterator[tuple[str, str]]:
    """What ``to_sample`` lets through, since a chat template may take it, and a model will not."""
    roles = [str(message.get("role")) for message in sample.prompt if isinstance(message, dict)]
    for role in dict.fromkeys(role for role in roles if role not in ROLES):
        yield f"A message has the role {role!r}, which no chat template knows", f"Use one of {', '.join(ROLES)}."
    if "user" not in roles and set(roles) <= set(ROLES):
        yield 'The prompt has no message of the role "user"', "Add one."
    texts = [part.get("text", "") for message in sample.prompt for part in message["content"]]  # type: ignore[index]
    if not sample.media and not "".join(texts).strip():
        yield "The prompt has neither text nor media", "Fill it in, or remove the row."


def with_media(rows: Iterable[Row], options: Options, root: Path | None) -> Iterator[Row]:
    """The rows in their order, with the facts and the problems of their media.

    Raises:
        UnsupportedError: there is a video or a sound, and PyAV is not installed.
    """
    with suppress(UnsupportedError):  # said where a medium needs it
        load_av()  # before the threads, which would meet a module that is half imported
    pool = ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1)), thread_name_prefix="inspect")
    looks = _Looks(pool, options.media)
    waiting: deque[tuple[Row, list[_Look]]] = deque()
    try:
        for row in rows:
            waiting.append((row, [looks.start(medium) for medium in row.sample.media] if row.sample else []))
            if len(waiting) > _QUEUED:
                yield _looked_at(*waiting.popleft(), root)
        while waiting:
            yield _looked_at(*waiting.popleft(), root)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _looked_at(row: Row, looks: list[_Look], root: Path | None) -> Row:
    for medium, look in zip(row.sample.media if row.sample else [], looks, strict=True):
        problem, facts = look.result()
        row.facts.append(facts)
        if problem is None:
            continue
        named = f'The {medium.kind} "{short_label(medium, root)}"'
        if options := _OPTIONS.match(problem):
            what, fix = in_two(options[1].replace(f'The {medium.kind} "{medium.label}"', named), medium.where)
        else:
            gone = "Correct the path" if problem == "does not exist" else "Replace the file"
            what, fix = f"{named} {problem}", f"{gone}, or remove the row."
        row.problems.append((what, fix))
    return row


def short_label(medium: Medium, root: Path | None) -> str:
    """The medium's name, a path from ``root`` on."""
    source = medium.source
    if root is not None and isinstance(source, Path) and source.is_relative_to(root):
        return shortened(str(source.relative_to(root)), _LABEL)
    return shortened(medium.label, _LABEL)


class _Looks:
    """Media handed to threads; a file that rows name again is opened once."""

    def __init__(self, pool: ThreadPoolExecutor, options: MediaOptions) -> None:
        self._pool, self._options = pool, options
        self._files: OrderedDict[tuple[str, str, str], _Look] = OrderedDict()

    def start(self, medium: Medium) -> _Look:
        if not isinstance(medium.source, Path):
            return self._pool.submit(look_at, medium, self._options.scan, self._options)
        key = (medium.kind, str(medium.source), repr(sorted(medium.overrides.items())))
        if key in self._files:
            self._files.move_to_end(key)
        else:
            self._files[key] = self._pool.submit(look_at, medium, self._options.scan, self._options)
            if len(self._files) > _FILES:
                self._files.popitem(last=False)
        return self._files[key]
