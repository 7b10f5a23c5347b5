"""What a page says of a reward model: how it judges held-out pairs, by what, and the pairs themselves."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .drawing import Drawing, as_svg, page_look, strip
from .embed import Embedder
from .facts import Outcome, as_text, change_of, interval, state_of, states_of
from .records import finite, number, read_jsonl
from .style import HUES, MUTED, VARIABLES
from .tables import Cell, Column, Row, Table, evenly, number_cell, shortened, text_cell

_LITTLE, _STRONG = 0.3, 0.5  # rank correlations of score and length: below nothing to say, above a judge likes it
_FIGURES = {
    "margin": "mean margin (score of chosen − rejected)",
    "mean_reward": "mean score",
    "reward_std": "spread of the scores (standard deviation)",
    "length_correlation": "rank correlation of score and length",
    "prefers_longer": "share of pairs whose longer response has the higher score",
    "ties": "pairs of equal scores",
    "left_out": "pairs left out",
}
_MOST_PAIRS, _BINS = 100, 28
_TITLES = {"before": "before training", "after": "after training"}


class Verdict(NamedTuple):
    """A sentence on a reward model, and whether it is one to worry about."""

    text: str
    bad: bool = False


class Pairs:
    """The held-out pairs of evaluation.jsonl, by state and row.

    Args:
        path: the file; one that is not there holds none.
        controls: what was done to the media, by the states that are controls.
    """

    def __init__(self, path: Path, controls: dict[str, str]) -> None:
        self.titles = _TITLES | controls
        self.rows: dict[str, dict[str, dict[str, Any]]] = {}
        for record in read_jsonl(path) if path.is_file() else ():
            state = str(record.get("state"))
            if state in self.titles:
                self.rows.setdefault(json.dumps(record.get("row")), {})[state] = record
        self.states = [state for state in self.titles if any(state in row for row in self.rows.values())]

    @property
    def judged(self) -> str:
        """The state whose verdicts count: after training where there is one."""
        return next((state for state in ("after", "before") if state in self.states), "")

    def scores(self, state: str) -> tuple[list[float], list[float]]:
        """Of the chosen responses and of the rejected ones."""
        found = [row[state] for row in self.rows.values() if state in row]
        sides = ([finite(record.get(f"{side}_score")) for record in found] for side in ("chosen", "rejected"))
        chosen, rejected = ([score for score in scores if score is not None] for scores in sides)
        return chosen, rejected


# ---- figures ----------------------------------------------------------------------------------------------------


def pair_outcome(evaluation: dict[str, Any]) -> Outcome | None:
    """The figures of a reward model's evaluation.json; None where it has none."""
    found = states_of(evaluation)
    if not found:
        return None
    further = [
        (title, [_figure(state.get(name)) for state in found.values()])
        for name, title in _FIGURES.items()
        if any(finite(state.get(name)) is not None for state in found.values())
    ]
    change = evaluation.get("change")
    said = change_of(change if isinstance(change, dict) else {}, "Training changed the accuracy", "pairs")
    return Outcome([state_of(title, state) for title, state in found.items()], said, further, [])


def _figure(value: Any) -> str:
    found = finite(value)
    return "–" if found is None else f"{value:,}" if isinstance(value, int) else number(round(found, 3))


def verdicts(evaluation: dict[str, Any], captions: bool) -> list[Verdict]:
    """What the figures mean, a sentence each.

    Args:
        evaluation: evaluation.json of a reward model.
        captions: whether the judge reads captions, which are there when the media are blanked.
    """
    after = evaluation.get("after")
    if not isinstance(after, dict) or finite(after.get("accuracy")) is None:
        return []
    return [*_chance(after), *_media(after, evaluation.get("control"), captions), *_length(after)]


def _share(state: dict[str, Any]) -> str:
    low, high = interval(state.get("ci95"))
    within = "" if low is None or high is None else f" ({100 * low:.1f}–{100 * high:.1f}%)"
    return f"{100 * float(state['accuracy']):.1f}%{within}"


def _chance(after: dict[str, Any]) -> list[Verdict]:
    low, high = interval(after.get("ci95"))
    if low is None or high is None or low > 0.5:
        return []
    how = "worse than" if high < 0.5 else "no better than"
    return [Verdict(f"It judges {how} chance: {_share(after)} of the pairs right, where a guess has half.", True)]


def _media(after: dict[str, Any], control: Any, captions: bool) -> list[Verdict]:
    """Whether it looks: its accuracy without the media lies below its accuracy with them."""
    if not isinstance(control, dict) or finite(control.get("accuracy")) is None or control.get("kind") not in _BLANKED:
        return []
    (low, most), (least, high) = interval(after.get("ci95")), interval(control.get("ci95"))
    if low is None or most is None or least is None or high is None:
        return []
    figures = f"{_share(control)} right with the media blanked, {_share(after)} with them"
    if least > most:
        return [Verdict(f"It judges better without the media: {figures}. Look at the pairs.", True)]
    if high >= low:
        why = "The captions, which it still reads, may tell it enough" if captions else "The texts tell it enough"
        return [Verdict(f"Nothing shows that it needs the media: {figures}, and the intervals overlap. {why}.", True)]
    left = " Without them it guesses." if least <= 0.5 <= high else ""
    return [Verdict(f"It looks at the media: {figures}.{left}")]


_BLANKED = ("blank", None)


def _length(after: dict[str, Any]) -> list[Verdict]:
    """Whether the score follows the length, and whether the pairs themselves teach that."""
    found, wins = finite(after.get("length_correlation")), finite(after.get("longer_wins"))
    if found is None:
        return []
    if abs(found) < _LITTLE:
        return [Verdict(f"Its score has little to do with the length of a response (rank correlation {found:+.2f}).")]
    likes = abs(found) > _STRONG
    verb, size = "likes" if likes else "leans to", "long" if found > 0 else "short"
    words = f"It {verb} {size} responses: score and length correlate by {found:+.2f}."
    if wins is not None:
        words += f" In these pairs the longer response is the chosen one in {wins:.0%}."
    return [Verdict(words, likes)]


# ---- pictures ---------------------------------------------------------------------------------------------------


def score_drawings(pairs: Pairs) -> list[Drawing]:
    """How the scores of chosen and rejected responses are spread, a drawing a state, all on one scale; and the margins.

    Scores of different prompts are hardly comparable; within a pair the margin decides.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for state in pairs.states:
        chosen, rejected = pairs.scores(state)
        found[state] = {"chosen": chosen, "rejected": rejected}
    found = {state: sides for state, sides in found.items() if all(sides.values())}
    every = [score for sides in found.values() for scores in sides.values() for score in scores]
    if not every or finite(max(every) - min(every)) is None:
        return []
    low, high = min(every), max(every)
    pad = (high - low) / _BINS or 0.5
    edges = [low - pad + (high - low + 2 * pad) * place / _BINS for place in range(_BINS + 1)]
    most = max(max(_counts(scores, edges)) for sides in found.values() for scores in sides.values())
    drawings = []
    for place, (state, sides) in enumerate(found.items()):
        means = {side: sum(scores) / len(scores) for side, scores in sides.items()}
        story = ", ".join(f"{side} {number(round(mean, 4))} on average" for side, mean in means.items())
        svg = _histogram(sides, edges, most, f"scores-{place}", "score (dashed: mean)", list(means.values()))
        lines = [(side, VARIABLES[hue]) for side, hue in zip(sides, HUES, strict=False)]
        drawings.append(Drawing(pairs.titles[state], story, svg, lines))
    return [*drawings, *_margin_drawing(pairs)]


def _margin_drawing(pairs: Pairs) -> list[Drawing]:
    """How far the two scores of a pair lie apart; pairs of equal scores are on neither side."""
    rows = [row[pairs.judged] for row in pairs.rows.values() if pairs.judged in row]
    margins = [margin for row in rows if (margin := finite(row.get("margin")))]
    if not margins:
        return []
    wide = max(abs(margin) for margin in margins)
    edges = [wide * (2 * place / _BINS - 1) for place in range(_BINS + 1)]  # one of them is 0
    sides = {"judged right": [m for m in margins if m > 0], "judged wrongly": [m for m in margins if m < 0]}
    most = max(max(_counts(side, edges)) for side in sides.values())
    svg = _histogram(sides, edges, most, "margins", "score of chosen − score of rejected", [0.0])
    lines = [(side, VARIABLES[hue]) for side, hue in zip(sides, HUES, strict=False)]
    story = ", ".join(f"{len(side):,} {name}" for name, side in sides.items())
    return [Drawing(f"margins {pairs.titles[pairs.judged]}", story, svg, lines)]


def _counts(scores: Sequence[float], edges: Sequence[float]) -> list[int]:
    width = edges[1] - edges[0]
    counts = [0] * (len(edges) - 1)
    for score in scores:
        counts[min(len(counts) - 1, max(0, int((score - edges[0]) / width)))] += 1
    return counts


def _histogram(
    sides: dict[str, list[float]], edges: list[float], most: int, name: str, label: str, marks: list[float]
) -> str:
    """Two kinds of numbers over one another; dashed marks have the colours of their kinds, a single one has none."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with rc_context(page_look()):
        figure = Figure(figsize=(4.1, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for hue, numbers in zip(HUES, sides.values(), strict=False):
            counts = _counts(numbers, edges)
            axes.stairs(counts, edges, fill=True, color=hue, alpha=0.22)
            axes.stairs(counts, edges, color=hue, linewidth=1.5)
        for hue, mark in zip(HUES if len(marks) > 1 else (MUTED,), marks, strict=False):
            axes.axvline(mark, color=hue, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_ylim(0, most * 1.05)
        axes.xaxis.set_major_formatter(FuncFormatter(number))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        strip(axes)
        axes.set_xlabel(label, fontsize=8)
        axes.set_ylabel("pairs", fontsize=8)
        return as_svg(figure, name)


# ---- the pairs --------------------------------------------------------------------------------------------------


def pairs_table(pairs: Pairs, embedder: Embedder) -> Table | None:
    """The held-out pairs, judged wrongly first: by margin from below; None where there is none.

    Args:
        pairs: of a run.
        embedder: of the page.
    """
    judged = pairs.judged
    rows = sorted((row for row in pairs.rows.values() if judged in row), key=lambda row: _margin_key(row[judged]))
    if not judged or not rows:
        return None
    chosen = _telling([row[judged] for row in rows])
    shown = [rows[place] for place in chosen]
    for row in shown:
        embedder.load(row[judged])
    with_media = any(row[judged].get("media") or row[judged].get("media_files") for row in shown)
    with_captions = any(row[judged].get("captions") for row in shown)
    others = [state for state in pairs.states if state != judged]
    columns = [Column("row", "number")] + ([Column("media", "media")] if with_media else [])
    columns += [Column("prompt", "long")] + ([Column("captions for the judge", "long")] if with_captions else [])
    columns += [Column("chosen", "long"), Column("score of chosen", "number")]
    columns += [Column("rejected", "long"), Column("score of rejected", "number"), Column("margin", "number")]
    columns += [Column(f"margin {_shortly(pairs.titles[state])}", "number") for state in others]
    out = []
    for place, row in enumerate(shown):
        record = row[judged]
        cells = [number_cell(record.get("row"))]
        cells += [Cell(media=tuple(embedder.place(record)))] if with_media else []
        cells += [text_cell(shortened(record))] + ([text_cell(_captions(record))] if with_captions else [])
        cells += [text_cell(record.get("chosen"), _mark(record), "(empty)"), number_cell(record.get("chosen_score"))]
        cells += [text_cell(record.get("rejected"), empty="(empty)"), number_cell(record.get("rejected_score"))]
        cells += [number_cell(record.get("margin"))]
        cells += [number_cell(row.get(state, {}).get("margin")) for state in others]
        out.append(Row(cells, place))
    note = "" if len(shown) == len(rows) else f"{len(shown):,} of {len(rows):,} shown. evaluation.jsonl has all."
    return Table("pairs", note, columns, out, sorted_by="margin")


def _shortly(title: str) -> str:
    return title.replace(" training", "") if title.startswith("before") else f"({title})"


def _mark(record: dict[str, Any]) -> str:
    right = record.get("correct")
    return {True: "right", False: "wrong"}[right] if isinstance(right, bool) else ""


def _margin_key(record: dict[str, Any]) -> tuple[bool, bool, float]:
    margin = finite(record.get("margin"))
    return margin is None, record.get("correct") is not False, margin if margin is not None else 0.0


def _captions(record: dict[str, Any]) -> str:
    given = record.get("captions")
    return "\n".join(str(caption) for caption in given) if isinstance(given, list) else as_text(given)


def _telling(records: list[dict[str, Any]]) -> list[int]:
    """Of many up to half that are judged wrongly, the worst first, and others evenly."""
    if len(records) <= _MOST_PAIRS:
        return list(range(len(records)))
    wrong = [place for place, record in enumerate(records) if record.get("correct") is False][: _MOST_PAIRS // 2]
    others = [place for place in range(len(records)) if place not in set(wrong)]
    return sorted([*wrong, *evenly(others, _MOST_PAIRS - len(wrong))])
