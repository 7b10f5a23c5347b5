"""An evaluation as ``evaluation.json`` and ``evaluation.jsonl`` hold it: figures, and a line a row and state."""

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from ..rewards import Failed
from ..rewards.answers import yes_or_no
from ..rewards.text import answer_body, normalized, written
from .evaluation import Answered, Evaluation
from .statistics import ks, paired_change, pass_at_k, war_uar, wilson, yes_no

_MOST_CLASSES = 50  # the largest sets of emotions, actions and sounds; beyond, answers are no classes
_LONGEST_LABEL = 40  # characters

Labels = Literal["auto", "yes", "no"]


def figures(evaluation: Evaluation, by: Sequence[str] = (), labels: Labels = "auto") -> dict[str, Any]:
    """The figures of one state.

    Args:
        evaluation: with the columns of ``by`` kept.
        by: columns to break the accuracy down by.
        labels: whether the right answers are classes, with a recall each; ``auto`` looks whether they are few.

    Returns:
        ``accuracy``, ``ci95`` (Wilson), ``rows``, ``rewards`` (means of the rows that a reward applies to) and
        ``reward`` (of their weighted sum; None without any); where there is something to say also ``unscored`` (rows
        without a verdict), ``left_out``, ``failed`` (by reward), ``pass@k``, ``war``, ``uar``, ``yes_no``, ``by``.
    """
    rows = evaluation.rows
    names = list(rows[0].rewards) if rows else []
    found: dict[str, Any] = {
        "accuracy": evaluation.accuracy,
        "ci95": list(evaluation.ci95),
        "rows": len(rows),
        "reward": _mean([row.total for row in rows]),
        "rewards": {name: _mean([row.rewards[name] for row in rows]) for name in names},
    }
    failed = {name: sum(isinstance(row.rewards[name], Failed) for row in rows) for name in names}
    extra = {
        "left_out": evaluation.left_out,
        "unscored": len(rows) - len(evaluation.verdicts),
        "failed": {name: count for name, count in failed.items() if count},
        "pass@k": _pass_at(rows),
        **_of_labels(rows, labels),
        "by": {column: _broken_down(rows, column) for column in by},
    }
    return found | {name: value for name, value in extra.items() if value or isinstance(value, float)}


def change(before: dict[int, bool], after: dict[int, bool], seed: int = 0) -> dict[str, Any]:
    """How much more is right after than before, on the rows that have a verdict in both; see ``paired_change``.

    Args:
        before, after: verdicts by number of the row (``Evaluation.verdicts``).
    """
    both = sorted(before.keys() & after.keys())
    return paired_change([before[row] for row in both], [after[row] for row in both], seed)


def write_rows(path: Path, state: str, evaluation: Evaluation) -> None:
    """Put the rows of one state into ``evaluation.jsonl``, in place of older ones of it."""
    write_records(path, state, [_record(state, row) for row in evaluation.rows])


def write_records(path: Path, state: str, records: list[dict[str, Any]]) -> None:
    """Put lines of one state into ``evaluation.jsonl``, in place of older ones of it.

    A reader sees the old file or the new one.
    """
    kept = [line for line in _lines(path) if json.loads(line)["state"] != state]
    new = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    beside = path.with_name(f".{path.name}.new")
    beside.write_text("".join([*kept, *new]), encoding="utf-8")
    os.replace(beside, path)


def read_verdicts(path: Path, state: str) -> dict[int, bool]:
    """The verdicts of one state in ``evaluation.jsonl`` by number of the row; none where there is no such file."""
    records = [json.loads(line) for line in _lines(path)]
    return {r["row"]: r["correct"] for r in records if r["state"] == state and r["correct"] is not None}


def _lines(path: Path) -> list[str]:
    # Not splitlines: an answer may hold U+2028 and its like.
    with path.open(encoding="utf-8", newline="\n") if path.is_file() else nullcontext(()) as file:
        return list(file)


def _record(state: str, row: Answered) -> dict[str, Any]:
    """One line; a reward that failed is null there, with its reason under ``failed``."""
    failed = {name: value.reason for name, value in row.rewards.items() if isinstance(value, Failed)}
    drawn = [{"completion": text, "correct": right} for text, right in zip(row.drawn, row.drawn_correct, strict=True)]
    return {
        "state": state,
        "row": row.row,
        "prompt": row.prompt,
        "completion": row.completion,
        "answer": None if row.truth is None else _plain(row.truth),
        "correct": row.correct,
        "rewards": {name: None if isinstance(value, Failed) else value for name, value in row.rewards.items()},
        "media": row.media,
        **({"failed": failed} if failed else {}),
        **({"pass_rate": row.pass_rate, "drawn": drawn} if drawn else {}),
    }


def _plain(value: Any) -> Any:
    """A cell as JSON: what has no form there as text, and NaN and infinity as null."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def _mean(values: Sequence[Any]) -> float | None:
    numbers = [value for value in values if isinstance(value, (int, float))]
    return math.fsum(numbers) / len(numbers) if numbers else None


def _pass_at(rows: list[Answered]) -> dict[str, float]:
    """By k, the mean over the rows that have so many verdicts."""
    samples = max((len(row.drawn) for row in rows), default=0)
    counts = [(sum(r is not None for r in row.drawn_correct), sum(map(bool, row.drawn_correct))) for row in rows]
    found = {str(k): _mean([pass_at_k(n, right, k) for n, right in counts if n >= k]) for k in ks(samples)}
    return {k: value for k, value in found.items() if value is not None}


def _of_labels(rows: list[Answered], labels: Labels) -> dict[str, Any]:
    """WAR and UAR where the right answers are classes, and POPE's figures where they are yes and no."""
    known = [(label(written(row.truth)), row.completion) for row in rows if isinstance(row.truth, (str, int, float))]
    truths = [truth for truth, _ in known]
    if labels == "no" or not truths or (labels == "auto" and not _are_classes(truths)):
        return {}
    found: dict[str, Any] = {}
    if set(truths) <= {"yes", "no"}:
        given = [yes_or_no(completion) for _, completion in known]
        found["yes_no"] = yes_no(truths, given)
        predictions = [answer or "" for answer in given]
    else:
        predictions = [label(completion) for _, completion in known]
    found["war"], found["uar"] = war_uar(truths, predictions)
    return found


def label(text: str) -> str:
    """The label that a text gives: the body of ``<answer>`` or all of it, as rewards compare texts."""
    return normalized(answer_body(text))


def _are_classes(truths: list[str]) -> bool:
    """Whether right answers recur as classes do: few, short, and twice as many rows at least."""
    distinct = Counter(truths)
    few = 2 <= len(distinct) <= min(_MOST_CLASSES, len(truths) // 2)
    return set(distinct) <= {"yes", "no"} or (few and all(0 < len(text) <= _LONGEST_LABEL for text in distinct))


def _broken_down(rows: list[Answered], column: str) -> dict[str, dict[str, Any]]:
    """By value of a column, the accuracy of its rows; the most frequent first."""
    parts: dict[str, list[bool]] = {}
    for row in rows:
        if row.correct is not None:
            value = row.columns[column]
            parts.setdefault("" if value is None else written(value), []).append(row.correct)
    ordered = sorted(parts.items(), key=lambda part: (-len(part[1]), part[0]))
    return {
        value: {"accuracy": sum(right) / len(right), "ci95": list(wilson(sum(right), len(right))), "rows": len(right)}
        for value, right in ordered
    }
