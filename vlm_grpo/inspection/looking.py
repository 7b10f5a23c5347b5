"""A data file looked at row by row: nothing stops it, and memory does not grow with the rows."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..data import MEDIA_COLUMNS, Sample
from ..data.formats import FORMATS
from ..data.formats.mapping import check_columns
from ..data.reading import raw_rows
from ..data.sample import all_parts
from ..errors import DataFormatError
from ..media import KINDS, Kind
from .bar import counted
from .figures import Column, Columns, Spread, fingerprint, is_empty, shortened
from .media_facts import MediaTally
from .problems import Problems
from .rows import Options, Row, read_row, root_of, with_media

if TYPE_CHECKING:
    from .tokens import TokenTally

_ANSWERS = 10_000
_REPEATS = 1_000_000  # rows among which repeated ones are found
_LISTED = 1000
_FIRST_COLUMNS = 500


class Inspection:
    """What was found; filled by ``inspect``.

    Attributes:
        rows: all of them, bad ones included.
        formats: how many rows are of each.
        problems: every one, with its rows.
        shown: the first rows.
        text_only, templated, completions: rows without media, with a text for a prompt, with a completion.
        tagged: rows with media whose text says ``<image>`` or the like, beside the slots.
        repeated, contradicting: rows whose prompt and media stood in an earlier row; of these, with another answer.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self.rows = 0
        self.formats: Counter[str] = Counter()
        self.problems = Problems()
        self.raw_columns: dict[str, None] = {}
        self.columns = Columns()
        self.media: dict[Kind, MediaTally] = {kind: MediaTally(kind) for kind in KINDS}
        self.text_only = self.templated = self.tagged = self.completions = 0
        self.roles: Counter[str] = Counter()
        self.turns = Spread()
        self.answers: Counter[str] = Counter()
        self.answered = self.unanswered = 0
        self.repeated = self.contradicting = 0
        self.tokens: TokenTally | None = None
        self.shown: list[Row] = []
        self._without_answer: list[tuple[int, str]] = []
        self._prompts: dict[int, int] = {}

    def add(self, row: Row) -> None:
        """Take in a row, whose media have been looked at."""
        sample, columns = row.sample, row.canonical
        if sample is not None and columns is not None:
            self._add_prompt(row, sample)
            self.columns.add(row.number, columns)
            self._add_answer(row.number, columns)
            self._add_repeat(columns)
            if self.tokens is not None and not row.problems:
                self.tokens.add(row)
        for what, fix in row.problems:
            self.problems.add(row.number, what, fix)
        if len(self.shown) < self.options.shown:
            self.shown.append(row)

    def _add_prompt(self, row: Row, sample: Sample) -> None:
        counts = Counter(medium.kind for medium in sample.media)
        for kind, tally in self.media.items():
            tally.add_row(counts[kind])
        for facts in filter(None, row.facts):
            self.media[facts.kind].add(facts)
        self.text_only += not sample.media
        if isinstance(sample.prompt, str):
            self.templated += 1
        else:
            self.turns.add(len(sample.prompt))
            self.roles.update(str(message.get("role")) for message in sample.prompt)
            texts = "".join(part["text"] for part in all_parts(sample.prompt) if part["type"] == "text")
            self.tagged += any(f"<{kind}>" in texts for kind in counts)

    def _add_answer(self, number: int, columns: dict[str, Any]) -> None:
        answer = columns.get("answer")
        self.completions += not is_empty(columns.get("completion"))
        if not is_empty(answer):
            self.answered += 1
            text = shortened(answer, 200)
            if text in self.answers or len(self.answers) < _ANSWERS:
                self.answers[text] += 1
        elif is_empty(columns.get("completion")):
            self.unanswered += 1
            if len(self._without_answer) < _LISTED:
                text = 'The row has no "answer"' if answer is None else f'The "answer" is empty ({answer!r})'
                self._without_answer.append((number, text))

    def _add_repeat(self, columns: dict[str, Any]) -> None:
        key = fingerprint([columns.get(name) for name in ("prompt", *MEDIA_COLUMNS)])
        answer = fingerprint(columns.get("answer"))
        if key in self._prompts:
            self.repeated += 1
            self.contradicting += self._prompts[key] != answer
        elif len(self._prompts) < _REPEATS:
            self._prompts[key] = answer

    def recognised_by(self) -> dict[str, str]:
        """By what each format that was found is recognised, in words."""
        return {format.name: format.recognised_by for format in FORMATS if format.name in self.formats}

    def close(self) -> None:
        """Judge what only all rows together tell: columns of several types, and rows without an answer."""
        for column, usual, kind in mixed_columns(self.columns):
            said = mixed_text(column.name, kind, usual)
            self.problems.add_rows(column.first[kind], column.types[kind], *said)
            self._say_of_shown(column.first[kind], said)
        if self.answered > self.unanswered:
            for number, text in self._without_answer:
                said = (text, "Fill it in, or remove the row.")
                self.problems.add(number, *said)
                self._say_of_shown([number], said)

    def _say_of_shown(self, numbers: list[int], said: tuple[str, str]) -> None:
        for row in self.shown:
            row.problems += [said] * (row.number in numbers)


def mixed_columns(columns: Columns) -> Iterator[tuple[Column, str, str]]:
    """(column, its usual type, another that it holds), of those that are written as they are."""
    # Media and the contents of messages are brought into one form.
    return (m for m in columns.mixed(without=MEDIA_COLUMNS) if not m[0].name.startswith(("prompt[", "prompt.")))


def mixed_text(name: str, kind: str, usual: str) -> tuple[str, str]:
    """(what is wrong, what to do) in the rows whose value is of another type than in most rows."""
    what = f'Column "{name}" holds {kind} here and {usual} elsewhere, which one table cannot'
    return what, f"Write {usual} in every row."


def inspect(name: str, options: Options, tokens: "TokenTally | None" = None) -> Inspection:
    """Look at every row and every medium of a data file.

    Args:
        name: a .jsonl, .json, .parquet or .csv file, a folder, or a dataset name.
        tokens: counts prompt tokens of the rows that are in order.

    Raises:
        ConfigError: an unknown format or tag, or a column that no row has.
        DataFormatError: the file cannot be read at all; whatever a row has is in ``problems`` instead.
        UnsupportedError: there are videos or sounds, and PyAV is not installed.
    """
    found = Inspection(name, options)
    found.tokens = tokens
    for row in with_media(_read(found), options, root_of(name, options)):
        found.add(row)
    if not found.rows:
        raise DataFormatError(f"{name} has no rows. Give at least one.")
    if options.columns:
        check_columns(options.columns, found.raw_columns, name)
    found.close()
    return found


def _read(found: Inspection) -> Iterator[Row]:
    options = found.options
    root = root_of(found.name, options)
    rows: Iterable[tuple[int, Any]] = islice(raw_rows(found.name, options.split), options.limit)
    for number, raw in counted(rows, f"Looking at {found.name}"):
        found.rows += 1
        if isinstance(raw, dict):
            names = list(raw)[:_FIRST_COLUMNS]
            found.raw_columns |= dict.fromkeys(name.encode(errors="backslashreplace").decode() for name in names)
        row = read_row(number, raw, f"{found.name} row {number}", root, options)
        if row.format:
            found.formats[row.format] += 1
        yield row
