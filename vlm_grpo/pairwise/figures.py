"""Judged pairs as ``evaluation.json`` and ``evaluation.jsonl`` hold them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..evaluate.statistics import paired_change, wilson
from ..report.judged import rank_correlation
from .judging import JudgedPair, PairEvaluation

STRONG = 0.5  # a correlation of this size is said


def figures(evaluation: PairEvaluation) -> dict[str, Any]:
    """The figures of one state.

    Returns:
        ``accuracy`` (a tie counts as half right), ``ci95`` (Wilson), ``rows``, ``margin`` (mean), ``mean_reward`` and
        ``reward_std`` over all scores, ``length_correlation``: Spearman's of score and number of characters, over all
        responses (None where either is constant), ``prefers_longer``: the share of pairs whose longer response has the
        higher score, and ``longer_wins``: the accuracy of a judge that would only count characters; where there is
        something to say also ``ties`` and ``left_out``.
    """
    rows = evaluation.rows
    margins = [row.margin for row in rows]
    scores = [score for row in rows for score in (row.chosen_score, row.rejected_score)]
    lengths = [len(text) for row in rows for text in (row.chosen, row.rejected)]
    ties = sum(row.correct is None for row in rows)
    right = sum(row.correct is True for row in rows) + 0.5 * ties
    mean = math.fsum(scores) / len(scores) if scores else 0.0
    found = {
        "accuracy": right / max(1, len(rows)),
        "ci95": list(wilson(right, len(rows))),
        "rows": len(rows),
        "margin": math.fsum(margins) / max(1, len(rows)),
        "mean_reward": mean,
        "reward_std": math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / max(1, len(scores))),
        "length_correlation": rank_correlation(scores, lengths),
        "prefers_longer": _prefers_longer(rows),
        "longer_wins": longer_wins((row.chosen, row.rejected) for row in rows),
    }
    return found | {name: count for name, count in (("ties", ties), ("left_out", evaluation.left_out)) if count}


def longer_wins(pairs: Iterable[tuple[str, str]]) -> float | None:
    """The share of (chosen, rejected) texts whose chosen one has more characters; as many of both count as half.

    >>> longer_wins([("long", "a"), ("a", "long"), ("one", "two"), ("long", "a")])
    0.625
    """
    points = [0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in pairs]
    return math.fsum(points) / len(points) if points else None


def _prefers_longer(rows: Sequence[JudgedPair]) -> float | None:
    """Of the pairs of different lengths and scores, the share whose longer response has the higher score."""
    told = [row for row in rows if len(row.chosen) != len(row.rejected) and row.margin != 0]
    longer = [(len(row.chosen) > len(row.rejected)) == (row.margin > 0) for row in told]
    return sum(longer) / len(longer) if longer else None


def pair_change(before: Mapping[int, bool], after: Mapping[int, bool]) -> dict[str, Any]:
    """How many more pairs are right after than before, of those without a tie in both; see ``paired_change``."""
    both = sorted(before.keys() & after.keys())
    return paired_change([before[row] for row in both], [after[row] for row in both])


def verdicts(evaluation: PairEvaluation) -> dict[int, bool]:
    """By number of the pair, whether it is right; not of ties."""
    return {row.row: row.correct for row in evaluation.rows if row.correct is not None}


def record(state: str, row: JudgedPair, files: list[dict[str, str]]) -> dict[str, Any]:
    """A line of ``evaluation.jsonl``; ``correct`` is null of a tie."""
    return {
        "state": state,
        "row": row.row,
        "prompt": row.prompt,
        "chosen": row.chosen,
        "rejected": row.rejected,
        "chosen_score": row.chosen_score,
        "rejected_score": row.rejected_score,
        "margin": row.margin,
        "correct": row.correct,
        "captions": row.captions,
        "media": [medium.label for medium in row.media],
        "media_files": files,
    }
