"""Does the completion think first and answer then?"""

from typing import Any

from .text import completion_text


def think_answer_format(completions: list[Any], **columns: Any) -> list[float]:
    """+0.3 for a ``<think>…</think>``, +0.3 for an ``<answer>…</answer>``, +0.4 if the first think ends before it."""
    return [_score(completion_text(completion)) for completion in completions]


def _score(text: str) -> float:
    thought, answer = _span(text, "think"), _span(text, "answer")
    in_order = thought is not None and answer is not None and thought[1] <= answer[0]
    return round(0.3 * (thought is not None) + 0.3 * (answer is not None) + 0.4 * in_order, 1)


def _span(text: str, tag: str) -> tuple[int, int] | None:
    """Start and end of the first ``<tag>…</tag>``; found without backtracking, so a hostile text stays linear."""
    start = text.find(f"<{tag}>")
    end = text.find(f"</{tag}>", start)
    return None if start < 0 or end < 0 else (start, end + len(tag) + 3)
