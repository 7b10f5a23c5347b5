"""Pairs of answers without a ``prompt`` of their own: TRL's implicit prompt, and RLAIF-V's question.

Both leave two answers in ``chosen`` and ``rejected``, where ``data.pairs`` finds them in rows of any format.
"""

from collections.abc import Mapping
from typing import Any

from ..sample import shorten
from .base import Format, Read, Reading, kept, listed, text_of
from .turns import read_turns, split_answer, with_slots


def _implicit(row: dict[str, Any], reading: Reading) -> Read:
    return Read(implicit(row, reading))


def implicit(row: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """``prompt``, and the texts ``chosen`` and ``rejected``, of two conversations that begin alike.

    Raises:
        DataFormatError: no conversations, another beginning, or one that does not end with the assistant's answer.
    """
    begun: dict[str, list[dict[str, Any]]] = {}
    answers: dict[str, str] = {}
    for name in ("chosen", "rejected"):
        if isinstance(listed(row[name]), str):
            raise reading.refuse(f'"{name}" is {shorten(row[name])}, and the row has no "prompt". Add one.')
        turns = read_turns(row[name], name, reading)
        begun[name], completion, text = split_answer(turns, reading)
        if completion is None:
            raise reading.refuse(f'"{name}" does not end with the assistant\'s answer. Add it.')
        answers[name] = text or ""
    if begun["chosen"] != begun["rejected"]:
        raise reading.refuse(
            '"chosen" and "rejected" are conversations that differ before the last answer. Let only that differ, or '
            'give what comes before it as "prompt".'
        )
    return {"prompt": with_slots(begun["chosen"], reading), **answers}


def is_conversation(value: Any) -> bool:
    """Whether a ``chosen`` or ``rejected`` begins before the answer: it holds a turn of the user."""
    value = listed(value)
    asked = ("user", "human")
    return isinstance(value, (list, tuple)) and any(
        isinstance(turn, Mapping) and (turn.get("role") in asked or turn.get("from") in asked) for turn in value
    )


def _question(row: dict[str, Any], reading: Reading) -> Read:
    messages = [{"role": "user", "content": text_of(row, "question", reading, needed=True)}]
    system = text_of(row, "system", reading)
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Read(kept(row, {"prompt": with_slots(messages, reading)}))


RLAIF_V = Format(
    "rlaif-v",
    'has "question", "chosen" and "rejected"',
    {"image": "1.png", "question": "What is in the bowl?", "chosen": "Two apples.", "rejected": "A dog."},
    (("question",), ("chosen",), ("rejected",)),
    _question,
)
PREFERENCE = Format(
    "preference",
    'has "chosen" and "rejected", two conversations that differ in the last answer',
    {
        "images": ["1.png"],
        "chosen": [
            {"role": "user", "content": "<image>What is in the bowl?"},
            {"role": "assistant", "content": "Two apples."},
        ],
        "rejected": [
            {"role": "user", "content": "<image>What is in the bowl?"},
            {"role": "assistant", "content": "A dog."},
        ],
    },
    (("chosen",), ("rejected",)),
    _implicit,
)
