"""Is the answer right?"""

from typing import Any

from ..errors import RewardError
from .text import answer_body, completion_text, normalized, written


def accuracy(completions: list[Any], column: str = "answer", **columns: Any) -> list[float | None]:
    """1.0 where the completion's answer equals the row's, else 0.0.

    The answer is the body of the first ``<answer>`` tag, or the whole completion; case, white space and outer
    punctuation do not count. An empty answer is never right.

    Args:
        completions: strings or message lists.
        column: the dataset column with the right answers; None in it means that the row cannot be scored.

    Raises:
        RewardError: the dataset has no such column.
    """
    if column not in columns:
        known = [
            key
            for key, value in columns.items()
            if isinstance(value, list) and key not in ("prompts", "completion_ids")
        ]
        raise RewardError(
            f'there is no column "{column}" (the rows have: {", ".join(known) or "none"}). Name the right one.'
        )
    return [
        None if answer is None else _is_right(completion_text(completion), written(answer))
        for completion, answer in zip(completions, columns[column], strict=True)
    ]


def _is_right(completion: str, answer: str) -> float:
    given = normalized(answer_body(completion))
    return float(bool(given) and given == normalized(answer_body(answer)))
