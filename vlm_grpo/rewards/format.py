"""Does the completion think first and answer then?"""

import reprlib
from collections.abc import Sequence
from typing import Any

from ..errors import RewardError
from .options import check_switch
from .text import completion_text, span


def think_answer_format(
    completions: list[Any], *, strict: bool = False, tags: Sequence[str] = ("think", "answer"), **columns: Any
) -> list[float]:
    """How well completions keep to ``<think>…</think> <answer>…</answer>``.

    Graded, 0 to 1: +0.3 for a thought, +0.3 for an answer, +0.4 if the first thought ends before the first answer
    starts; whatever else stands around them. Strict, 0 or 1: the completion is the tags in their order and nothing
    else but white space around them, each tag once, each with something visible in it.

    A tag is written exactly so: ``<Think>`` and ``<think a="1">`` are text. The first opening and the first closing
    tag behind it make the thought, so an unclosed tag is none, and of nested or repeated ones the first closing counts
    (graded) or the completion has 0 (strict).

    Args:
        completions: strings or message lists.
        strict: all or nothing.
        tags: their names, in order; two for the graded form, one or more for the strict one.

    Raises:
        RewardError: a wrong option.
    """
    check_switch("strict", strict)
    _check_tags(tags, strict)
    score = _strict if strict else _graded
    return [score(completion_text(completion), tags) for completion in completions]


def _graded(text: str, tags: Sequence[str]) -> float:
    thought, answer = (span(text, tag) for tag in tags)
    in_order = thought is not None and answer is not None and thought[1] <= answer[0]
    return round(0.3 * (thought is not None) + 0.3 * (answer is not None) + 0.4 * in_order, 1)


def _strict(text: str, tags: Sequence[str]) -> float:
    if any(text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1 for tag in tags):
        return 0.0
    end = 0
    for tag in tags:
        found = span(text, tag)
        if found is None or found[0] < end or text[end : found[0]].strip():
            return 0.0
        body = text[found[0] + len(tag) + 2 : found[1] - len(tag) - 3]
        if not any(character.isprintable() and not character.isspace() for character in body):
            return 0.0  # zero-width characters look as empty as they are
        end = found[1]
    return float(not text[end:].strip())


def _check_tags(tags: Any, strict: bool) -> None:
    named = isinstance(tags, list | tuple) and all(isinstance(tag, str) for tag in tags)
    if (
        not named
        or not all(tag.replace("-", "").replace("_", "").isalnum() for tag in tags)
        or len({*tags}) < len(tags)
    ):
        raise RewardError(
            f'tags={reprlib.repr(tags)} is not a list of different tag names. Write them as ["think", "answer"]; if it '
            'is the column "tags" of the dataset, rename that.'
        )
    if len(tags) < 1 or (len(tags) != 2 and not strict):
        raise RewardError(
            f"tags={reprlib.repr(tags)}: the graded form needs two tags. Name two, or set strict=true; if it is the "
            'column "tags" of the dataset, rename that.'
        )
