"""An inspection in words and numbers: what a page, an HTML file and a line of JSON all say."""

from collections.abc import Iterator
from typing import Any

from .figures import Spread
from .looking import Inspection

_DOMINATES = 0.6  # share of one answer
_FEW = 10  # answers, of which shares say nothing
_TOP = 10
_ORDER = " (least · median · most)"


def counts(found: Inspection) -> Iterator[tuple[str, str]]:
    """(name, value) of what the rows are made of."""
    several = len(found.formats) > 1
    formats = ", ".join(
        f"{name} ({count:,} {plural('row', count)})" if several else name for name, count in found.formats.most_common()
    )
    yield "format", formats or "none that is known"
    for name, text in found.recognised_by().items():
        yield "recognised by" if len(found.formats) == 1 else f"{name}, by", text
    yield "rows", f"{found.rows:,}, {found.problems.bad_rows:,} with problems"
    kinds = [
        f"{tally.rows:,} with {tally.count:,} {plural(kind, tally.count)}"
        for kind, tally in found.media.items()
        if tally.count
    ]
    yield "media", ", ".join([*kinds, f"{found.text_only:,} of text only"])
    if found.turns.count:
        yield "messages a prompt", f"{spread_text(found.turns)}{_ORDER * (found.turns.least < found.turns.most)}"
        yield "roles", ", ".join(f"{role} {count:,}" for role, count in found.roles.most_common())
    if found.templated:
        yield (
            "templated texts",
            f"{found.templated:,} prompts are a text, to which the chat template was applied already",
        )
    if found.completions:
        yield "completions", f"{found.completions:,} rows have one, for supervised training"
    if found.raw_columns and set(found.raw_columns) != {column.name for column in found.columns}:
        yield "columns in the file", ", ".join(found.raw_columns)


def media_figures(found: Inspection) -> Iterator[tuple[str, str, str]]:
    """(kind, what, least · median · most) of all media."""
    for kind, tally in found.media.items():
        for what, spread in tally.figures():
            yield kind, what, spread_text(spread)
        for what, known in (("samples a second", tally.rates), ("channels", tally.channels)):
            if known:
                yield kind, what, ", ".join(f"{value:,} ({count:,} of them)" for value, count in known.most_common(4))


def token_figures(found: Inspection) -> Iterator[tuple[str, str]]:
    """(name, value) of the expanded prompts."""
    tokens = found.tokens
    if tokens is None or not tokens.prompt.count:
        return
    yield "prompt", spread_text(tokens.prompt, p95=True)
    yield "of which media", spread_text(tokens.media, p95=True)
    if tokens.limit is not None:
        yield f"over {tokens.limit:,}", f"{tokens.over:,} {plural('row', tokens.over)}"


def answers(found: Inspection) -> list[tuple[str, int, float]]:
    """(answer, rows, share) of the most frequent ones; none where (almost) every row has its own."""
    if not found.answers or (len(found.answers) > _TOP and found.answers.most_common(1)[0][1] == 1):
        return []
    return [(text, count, count / found.answered) for text, count in found.answers.most_common(_TOP)]


def traps(found: Inspection) -> Iterator[str]:
    """What is no fault of any row and spoils a training all the same, a sentence each."""
    top = answers(found)
    if top and found.answered >= _FEW and len(found.answers) == 1:
        yield f"Every answer is {quoted(top[0][0])}: nothing is learnt but to say so. Add rows with other answers."
    elif top and found.answered >= _FEW and top[0][2] >= _DOMINATES:
        yield (
            f"{top[0][2]:.0%} of the answers are {quoted(top[0][0])}: a model that always says so is right that often. "
            "Balance the answers, or compare every accuracy with that share."
        )
    if found.tagged:
        yield (
            f"In {found.tagged:,} {plural('row', found.tagged)} with media the text says <image> "
            'or the like too, which a model reads as text. Write the part {"type": "image"} in its place, '
            'or call the column "messages" in place of "prompt".'
        )
    if found.repeated:
        other = f", {found.contradicting:,} of them with another answer" if found.contradicting else ""
        yield (
            f"{found.repeated:,} {plural('row', found.repeated)} repeat{'s' * (found.repeated == 1)} the prompt and "
            f"media of an earlier row{other}. Remove them, and keep none of them in held-out rows."
        )
    if not found.answered and not found.completions and found.columns.rows:
        yield 'No row has an "answer", which accuracy rewards compare with. Name the column that holds it by --columns.'
    elif found.answered and found.unanswered >= found.answered:
        yield f'{found.unanswered:,} rows have no "answer": rewards that compare with one cannot judge them.'


def as_dict(found: Inspection) -> dict[str, Any]:
    """Everything, for ``--json``."""
    columns = [
        {
            "name": column.name,
            "type": found.columns.type_text(column),
            "filled": column.filled / found.columns.rows,
            "distinct": len(column.distinct),
            "distinct_is_more": column.distinct.more,
            "example": column.example,
        }
        for column in found.columns
    ]
    return {
        "file": found.name,
        "rows": found.rows,
        "formats": dict(found.formats.most_common()),
        "columns": columns,
        "media": {kind: tally.as_dict() for kind, tally in found.media.items() if tally.count},
        "text_only": found.text_only,
        "roles": dict(found.roles.most_common()),
        "messages": found.turns.as_dict(),
        "tokens": None if found.tokens is None else found.tokens.as_dict(),
        "answers": [{"answer": text, "rows": count, "share": share} for text, count, share in answers(found)],
        "repeated": found.repeated,
        "contradicting": found.contradicting,
        "notes": list(traps(found)),
        "bad_rows": found.problems.bad_rows,
        "problems": [vars(problem) for problem in found.problems],
        "problems_unlisted": found.problems.unlisted,
    }


def spread_text(spread: Spread, p95: bool = False) -> str:
    """``224 · 448 · 1,024``: least, median, (95%,) most; one number where all are the same."""
    if spread.least == spread.most:
        return f"{number(spread.least)} each"
    middle = [spread.quantile(0.5), *([spread.quantile(0.95)] if p95 else [])]
    return " · ".join(map(number, (spread.least, *middle, spread.most)))


def number(value: float) -> str:
    """``1,234``, ``2.5``, ``0.04``."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2g}"


def rows_text(rows: list[int], count: int, shown: int = 8) -> str:
    """``3, 7 and 12 more``."""
    text = ", ".join(map(str, rows[:shown]))
    return f"{text} and {count - shown:,} more" if count > min(shown, len(rows)) else text


def plural(word: str, count: int) -> str:
    """``image`` or ``images``; an ``audio`` is a sound."""
    word = "sound" if word == "audio" else word
    return word if count == 1 else f"{word}s"


def quoted(text: str) -> str:
    """A value of a row inside of a sentence."""
    return f'"{text if len(text) <= 40 else text[:39] + "…"}"'
