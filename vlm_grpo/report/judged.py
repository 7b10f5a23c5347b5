"""A run that learns from a judge: whether what the judge gives and what is true go together."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import Any, NamedTuple

from .curves import judged_drawing
from .drawing import Drawing
from .facts import interval, state_of, states_of
from .records import finite, number, read_jsonl, series
from .weights import Rewards

_FEWEST = 6  # values that a trend is told from
_CLEAR = 2.0  # standard errors between the begin and the end of a run that goes somewhere


class Judged(NamedTuple):
    """What a page says of a judge and the truth.

    Attributes:
        judge, truth: names of the two rewards.
        drawing: both over the steps.
        sentences: what is seen in it.
        warning: that the score rose while the truth fell; empty where it did not.
        states: held-out rows: whose answers, the judge's mean score, the truth, and its 95% interval.
        paid: whether the truth is a part of the reward.
    """

    judge: str
    truth: str
    drawing: Drawing | None
    sentences: list[str]
    warning: str
    states: list[tuple[str, str, str, str]]
    paid: bool


class Agreement(NamedTuple):
    """How a score and the truth go together over completions.

    Attributes:
        rank: rank correlation (Spearman), -1 to 1; None where one of them is always the same.
        rows: how many completions.
        pairs: of one prompt a right and a wrong completion; how many there are.
        above: in what share of them the right one has the higher score; ties count half.
    """

    rank: float | None
    rows: int
    pairs: int
    above: float | None


def judged(run: Path, records: list[dict[str, Any]], evaluation: dict[str, Any], rewards: Rewards) -> Judged | None:
    """What a run with a judge and a truth shows of the two; None of any other run.

    Args:
        run: the run folder, with samples.jsonl.
        records: the lines of metrics.jsonl.
        evaluation: evaluation.json.
        rewards: of the run.
    """
    if not rewards.judge:
        return None
    path = run / "samples.jsonl"
    found = agreement(list(read_jsonl(path)) if path.is_file() else [], rewards)
    states = [_held_out(title, state, rewards) for title, state in states_of(evaluation).items()]
    warning, course = _course(records, evaluation, rewards)
    return Judged(
        rewards.judge,
        rewards.truth,
        judged_drawing(records, rewards),
        [sentence for sentence in (course, *_agreeing(found)) if sentence],
        warning,
        states if any(score for _, score, *_ in states) else [],
        rewards.weights[rewards.truth] != 0,
    )


def agreement(samples: Sequence[dict[str, Any]], rewards: Rewards) -> Agreement:
    """Compare the judge with the truth on the completions of samples.jsonl that have both."""
    known: list[tuple[str, float, float]] = []
    for record in samples:
        given = record.get("rewards")
        given = given if isinstance(given, dict) else {}
        score, truth = finite(given.get(rewards.judge)), finite(given.get(rewards.truth))
        if score is not None and truth is not None:
            known.append((repr([record.get("step"), record.get("prompt"), record.get("media")]), score, truth))
    groups: dict[str, list[tuple[float, float]]] = {}
    for group, score, truth in known:
        groups.setdefault(group, []).append((score, truth))
    wins = [
        1.0 if better > worse else 0.5 if better == worse else 0.0
        for lines in groups.values()
        for better, right in lines
        for worse, wrong in lines
        if right > wrong
    ]
    rank = rank_correlation([score for _, score, _ in known], [truth for *_, truth in known])
    return Agreement(rank, len(known), len(wins), fmean(wins) if wins else None)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, -1 to 1; None of fewer than three values, or where one side is always the same."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    from scipy.stats import spearmanr

    found: Any = spearmanr(first, second)
    return float(found.statistic)


def _agreeing(found: Agreement) -> list[str]:
    out = []
    if found.rank is not None:
        out.append(
            f"Over {found.rows:,} completions in samples.jsonl the rank correlation of score and truth is "
            f"{found.rank:+.2f}."
        )
    elif found.rows:
        out.append(f"Over {found.rows:,} completions in samples.jsonl score and truth have no correlation to tell.")
    if found.above is not None:
        out.append(
            f"Of a right and a wrong completion of one prompt the right one has the higher score in "
            f"{found.above:.0%} of {found.pairs:,} pairs (50% is chance)."
        )
    return out


def _held_out(title: str, state: dict[str, Any], rewards: Rewards) -> tuple[str, str, str, str]:
    found = state_of(title, state)
    if found.accuracy is None or found.low is None or found.high is None or not _is_truth(state, rewards.truth):
        return title, _score(state, rewards.judge), _score(state, rewards.truth), ""
    within = f"{100 * found.low:.1f}–{100 * found.high:.1f}%"
    return title, _score(state, rewards.judge), f"{found.accuracy:.1%}", within


def _is_truth(state: dict[str, Any], truth: str) -> bool:
    """Whether the accuracy is the truth's own: which reward said what is right is the run's choice."""
    given = state.get("rewards")
    mean, accuracy = finite(given.get(truth)) if isinstance(given, dict) else None, finite(state.get("accuracy"))
    return mean is not None and accuracy is not None and math.isclose(mean, accuracy, abs_tol=1e-6)


def _score(state: dict[str, Any], judge: str) -> str:
    rewards = state.get("rewards")
    value = finite(rewards.get(judge)) if isinstance(rewards, dict) else None
    return "" if value is None else number(value)


def _course(records: list[dict[str, Any]], evaluation: dict[str, Any], rewards: Rewards) -> tuple[str, str]:
    """(warning, sentence): where score and truth went while the run learned."""
    score, truth = (series(records, f"rewards/{name}/mean")[1] for name in (rewards.judge, rewards.truth))
    up, down = _trend(score), _trend(truth)
    rose, fell = _moved(evaluation, rewards)
    if up is None or down is None:
        return (_hacked("On held-out rows", rose, fell), "") if rose and fell else ("", "")
    said = f"the judge's score went from {_ends(score)}, the true {rewards.truth} from {_ends(truth)}"
    means = "(means of the first and the last third of the run)"
    if up > 0 > down:
        return _hacked("While it trained", _ends(score), _ends(truth)), ""
    if rose and fell:
        return _hacked("On held-out rows", rose, fell), ""
    words = {(1, 1): "Both rose", (-1, -1): "Both fell", (1, 0): "The score rose and the truth did not clearly move"}
    words |= {
        (-1, 1): "The score fell while the truth rose",
        (0, 1): "The truth rose and the score did not clearly move",
    }
    words |= {(0, -1): "The truth fell and the score did not clearly move"}
    return "", f"{words.get((up, down), 'No clear movement')}: {said} {means}."


def _hacked(where: str, score: str, truth: str) -> str:
    return (
        f"{where} the judge's score rose ({score}) and the truth fell ({truth}): the model learns to please the "
        "judge and not to be right (reward hacking). Sort the completions below by their score and read the wrong "
        "ones at the top; then stop earlier, raise beta, or train the judge on such completions."
    )


def _trend(values: list[float]) -> int | None:
    """1 where the last third lies clearly above the first, -1 below, 0 neither; None of too few values."""
    if len(values) < _FEWEST:
        return None
    first, last = _thirds(values)
    difference = fmean(last) - fmean(first)
    error = math.sqrt(variance(first) / len(first) + variance(last) / len(last))
    return 0 if abs(difference) <= _CLEAR * error else 1 if difference > 0 else -1


def _thirds(values: list[float]) -> tuple[list[float], list[float]]:
    third = len(values) // 3
    return values[:third], values[-third:]


def _ends(values: list[float]) -> str:
    first, last = (fmean(part) for part in _thirds(values))
    return f"{first:.3g} to {last:.3g}"


def _moved(evaluation: dict[str, Any], rewards: Rewards) -> tuple[str, str]:
    """How the score rose and how the truth clearly fell on held-out rows; empty where they did not."""
    before, after, change = (evaluation.get(key) for key in ("before", "after", "change"))
    if not isinstance(before, dict) or not isinstance(after, dict) or not isinstance(change, dict):
        return "", ""
    first, last = _score(before, rewards.judge), _score(after, rewards.judge)
    rose = f"{first} to {last}" if first and last and float(last) > float(first) else ""
    _, high = interval(change.get("ci95"))
    if high is None or high >= 0 or not all(_is_truth(state, rewards.truth) for state in (before, after)):
        return rose, ""
    return rose, f"{before['accuracy']:.1%} to {after['accuracy']:.1%}"
