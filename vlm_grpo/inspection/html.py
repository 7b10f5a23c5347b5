"""The first rows of a data file as the model will see them: one HTML file, with pictures and players inside."""

import os
import re
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..config import MediaOptions
from ..data import MEDIA_COLUMNS
from ..errors import ConfigError, VLMGRPOError
from ..media import KINDS, Medium
from ..media.preview import playable, preview_image, preview_picture, preview_samples, preview_video
from ..report import spectrogram
from .bar import counted
from .figures import shortened
from .looking import Inspection
from .media_facts import Facts
from .rows import Row, root_of, short_label
from .summary import answers, counts, media_figures, number, rows_text, token_figures, traps

_RATE = 16000  # what most models hear at
_SECONDS = 30.0
_PAGE_BYTES = 48_000_000  # beyond which a browser is slow to open the page
_VALUE = 2000  # characters of a column
_PROBLEMS = 200
_SMALL = 96  # pixels of a picture that is shown enlarged


def write_html(found: Inspection, out: Path) -> None:
    """Write the page beside its name, then rename it: a kill leaves no half page.

    Args:
        found: an inspection whose options asked for ``shown`` rows.
        out: the file.

    Raises:
        ConfigError: the file cannot be written.
    """
    if out.is_dir():
        raise ConfigError(f"--html {out}: that is a folder. Give the name of a file, such as {out / 'rows.html'}.")
    text = render(found)
    beside = out.with_name(f".{out.name}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, out)
    except OSError as error:
        raise ConfigError(f"--html {out}: the page cannot be written ({error.strerror}). Give another path.") from error


def render(found: Inspection) -> str:
    """The page as text."""
    rows = _Rows(found)
    return _template().render(
        name=found.name,
        counts=list(counts(found)),
        media=list(media_figures(found)),
        tokens=list(token_figures(found)),
        model=found.tokens.name if found.tokens else None,
        columns=[_column(found, column) for column in found.columns],
        answers=answers(found),
        notes=list(traps(found)),
        problems=[(rows_text(p.rows, p.count), p.what, p.fix) for p in list(found.problems)[:_PROBLEMS]],
        hidden=max(0, len(list(found.problems)) - _PROBLEMS),
        bad=found.problems.bad_rows,
        total=found.rows,
        rows=[rows.view(row) for row in counted(found.shown, "Drawing the page")],
    )


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((files(__name__.rpartition(".")[0]) / "page.html.jinja").read_text(encoding="utf-8"))


def _column(found: Inspection, column: Any) -> dict[str, Any]:
    return {
        "name": column.name,
        "type": found.columns.type_text(column),
        "mixed": len(column.types) > 1,
        "filled": f"{column.filled / found.columns.rows:.0%}",
        "distinct": f"{len(column.distinct):,}{'+' * column.distinct.more}",
        "example": column.example,
    }


class _Rows:
    """Turns rows into what the template shows, until the page is full of media."""

    def __init__(self, found: Inspection) -> None:
        self._found, self._options = found, found.options.media
        self._root = root_of(found.name, found.options)
        self._bytes = 0

    def view(self, row: Row) -> dict[str, Any]:
        sample, columns = row.sample, row.canonical or {}
        view: dict[str, Any] = {
            "number": row.number,
            "format": row.format,
            "problems": row.problems,
            "tokens": row.tokens,
            "messages": [],
            "answer": _value(columns.get("answer")),
            "completion": _completion(columns.get("completion")),
            "others": [],
            "template": [],
        }
        if sample is None:
            return view
        shown = ("prompt", "answer", "completion", *MEDIA_COLUMNS)
        view["others"] = [(name, _value(value)) for name, value in columns.items() if name not in shown]
        facts = {id(medium): fact for medium, fact in zip(sample.media, row.facts, strict=True)}
        if isinstance(sample.prompt, str):
            parts = [{"text": sample.prompt}, *(self._medium(medium, facts) for medium in sample.media)]
            view["messages"] = [{"role": "templated text", "parts": parts}]
        else:
            view["messages"] = [
                {"role": str(message.get("role")), "parts": [self._part(part, facts) for part in message["content"]]}
                for message in sample.prompt
            ]
        if self._found.tokens is not None and row.tokens is not None:
            view["template"] = _in_pieces(self._found.tokens.text(sample), self._found.tokens.processor)
        return view

    def _part(self, part: dict[str, Any], facts: dict[int, Facts | None]) -> dict[str, Any]:
        return self._medium(part[part["type"]], facts) if part["type"] in KINDS else {"text": part["text"]}

    def _medium(self, medium: Medium, facts: dict[int, Facts | None]) -> dict[str, Any]:
        view: dict[str, Any] = {"kind": medium.kind, "label": short_label(medium, self._root)}
        view |= dict.fromkeys(("error", "player", "taken", "cut"))
        known = facts.get(id(medium))
        view["facts"] = _facts_text(known)
        view["small"] = known is not None and 0 < max(known.width, known.height) < _SMALL
        show: dict[str, Callable[[Medium, MediaOptions], dict[str, Any]]]
        show = {"image": _image, "video": _video, "audio": _audio}
        if self._bytes > _PAGE_BYTES:
            return view | {"error": f"not shown: the page holds {_PAGE_BYTES // 1_000_000} MB of media already"}
        try:
            view |= show[medium.kind](medium, self._options)
        except VLMGRPOError as error:
            return view | {"error": str(error)}
        self._bytes += sum(len(value) for value in view.values() if isinstance(value, str))
        return view


def _image(medium: Medium, options: MediaOptions) -> dict[str, Any]:
    return {"picture": preview_image(medium, options=options).uri}


def _video(medium: Medium, options: MediaOptions) -> dict[str, Any]:
    video = medium.open_video(options)
    player = playable(medium)
    times = [index / video.fps for index in video.indices]
    said = f"{len(times)} of {video.total} frames: at {', '.join(f'{time:.1f}' for time in times)} s"
    return {"strip": preview_video(video).uri, "player": player.uri if player else None, "taken": said}


def _audio(medium: Medium, options: MediaOptions) -> dict[str, Any]:
    samples = medium.open_audio(_RATE, options)
    seconds = len(samples) / _RATE
    picture = preview_picture(spectrogram(samples[: round(_SECONDS * _RATE)], _RATE))
    cut = f"the first {_SECONDS:g} of {seconds:.1f} s" if seconds > _SECONDS else None
    return {"spectrogram": picture.uri, "player": preview_samples(samples, _RATE, _SECONDS).uri, "cut": cut}


def _facts_text(facts: Facts | None) -> str:
    if facts is None:
        return ""
    parts = [f"{facts.width}×{facts.height} pixels"] if facts.width else []
    parts += [f"{number(facts.seconds)} s"] if facts.seconds else []
    parts += [f"{number(facts.fps)} frames a second"] if facts.fps else []
    parts += [f"{facts.rate:,} samples a second"] if facts.rate else []
    parts += [f"{facts.channels} channels"] if facts.channels > 1 else []
    return ", ".join(parts)


def _value(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return value if len(value) <= _VALUE else value[:_VALUE] + "…"
    return shortened(value, _VALUE)


def _completion(value: Any) -> str | None:
    """The text of assistant messages."""
    if not isinstance(value, (list, tuple)):
        return _value(value)
    texts = []
    for message in value:
        content = message.get("content") if isinstance(message, dict) else message
        parts = content if isinstance(content, (list, tuple)) else [content]
        texts += [str(part.get("text") or "") if isinstance(part, dict) else str(part or "") for part in parts]
    return _value("\n".join(texts)) if texts else None


def _in_pieces(text: str, processor: Any) -> list[tuple[bool, str]]:
    """(whether it is a special token, text) of a templated prompt."""
    tokenizer = getattr(processor, "tokenizer", processor)
    special = sorted(filter(None, getattr(tokenizer, "all_special_tokens", [])), key=len, reverse=True)
    if not special:
        return [(False, text)]
    pieces = re.split(f"({'|'.join(map(re.escape, special))})", text)
    return [(piece in special, piece) for piece in pieces if piece]
