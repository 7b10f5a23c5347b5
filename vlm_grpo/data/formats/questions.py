"""Rows of one question: EasyR1, VLM-R1, R1-AQA, visual question answering, instructions."""

from typing import Any

from ..sample import shorten
from .base import PATHS, Format, Read, Reading, answered, assistant, kept, listed, text_of
from .turns import with_slots

_QUESTION = ("question", "question_text")
_CHOICES = ("choices", "multi_choice")


def _problem(row: dict[str, Any], reading: Reading) -> Read:
    return _asked(row, text_of(row, "problem", reading, needed=True), row.get("solution"), reading)


def _question(row: dict[str, Any], reading: Reading) -> Read:
    name = next(name for name in _QUESTION if row.get(name) is not None)
    return _asked(row, text_of(row, name, reading, needed=True), row.get("solution"), reading)


def _choice(row: dict[str, Any], reading: Reading) -> Read:
    """As R1-AQA asks: the question, then the options; it also writes "audio" for "video" in a question, we do not.

    An answer may be the text of an option, or its index from 0.
    """
    name = next(name for name in _QUESTION if row.get(name) is not None)
    column = next(name for name in _CHOICES if row.get(name) is not None)
    choices = listed(row[column])
    if not isinstance(choices, (list, tuple)) or not choices or not all(isinstance(c, str) for c in choices):
        raise reading.refuse(f'"{column}" is {shorten(choices)}. Give a list of texts.')
    asked = text_of(row, name, reading, needed=True)
    text = f"{asked} Please choose the answer from the following options: {list(choices)}."
    answer = row.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool):
        return _asked(row, text, row.get("solution"), reading)
    if not 0 <= answer < len(choices):
        raise reading.refuse(
            f'"answer" is {answer}, but "{column}" has {len(choices)} items, the first of them number 0. Correct it.'
        )
    index = {"answer": choices[answer], "answer_index": answer}
    return Read({**_asked({**row, **index}, text, row.get("solution"), reading).columns, **index})


def _asked(row: dict[str, Any], text: str | None, solution: Any, reading: Reading) -> Read:
    """A user turn; the completion is what the row gives as the solution, or else as the answer."""
    messages = [{"role": "user", "content": text}]
    system = text_of(row, "system", reading)
    if system:
        messages.insert(0, {"role": "system", "content": system})
    written = kept(row, {"prompt": with_slots(messages, reading)})
    if row.get("completion") is None:
        said = row.get("answer") if solution is None else solution
        is_number = isinstance(said, (int, float)) and not isinstance(said, bool)
        written["completion"] = assistant(str(said) if is_number or isinstance(said, str) else None)
    return Read({**written, **answered(row, None)})


def _instruction(row: dict[str, Any], reading: Reading) -> Read:
    """Alpaca's and ms-swift's older rows: earlier rounds, then an instruction with its input below."""
    asked, replied = ("instruction", "output") if row.get("instruction") is not None else ("query", "response")
    turns = [text_of(row, asked, reading, needed=True), text_of(row, "input", reading) if asked != "query" else None]
    messages: list[dict[str, Any]] = []
    system = text_of(row, "system", reading)
    if system:
        messages.append({"role": "system", "content": system})
    for round_ in listed(row.get("history")) or []:
        if not isinstance(round_, (list, tuple)) or [type(item) for item in round_] != [str, str]:
            raise reading.refuse(f'"history" has {shorten(round_)}. Give pairs of texts: [asked, answered].')
        messages += [{"role": role, "content": item} for role, item in zip(("user", "assistant"), round_, strict=True)]
    messages.append({"role": "user", "content": "\n".join(turn for turn in turns if turn)})
    reply = text_of(row, replied, reading) or None
    written = {"prompt": with_slots(messages, reading), "completion": assistant(reply)}
    return Read({**kept(row, written), **answered(row, reply)})


VLM_R1 = Format(
    "vlm-r1",
    'has "problem" and "solution"; the answer is inside the solution\'s <answer> tags',
    {"image": "1.png", "problem": "<image>How many cubes?", "solution": "<answer> 3 </answer>"},
    (("problem",), ("solution",)),
    _problem,
)
EASYR1 = Format(
    "easyr1",
    'has "problem"',
    {"problem": "<image>Find x.", "answer": "4", "images": ["1.png"]},
    (("problem",),),
    _problem,
)
R1_AQA = Format(
    "r1-aqa",
    'has "question" (or "question_text") and "choices" (or "multi_choice")',
    {
        "audio_id": "1.wav",
        "question": "What is heard?",
        "choices": ["a motorboat", "a yacht"],
        "answer": "a motorboat",
    },
    (_QUESTION, _CHOICES),
    _choice,
    {**PATHS, "audio_id": "audio"},
)
VQA = Format(
    "vqa",
    'has "question" (or "question_text") and "answer" (or "solution")',
    {"image": "1.png", "question": "What colour is the car?", "answer": "red"},
    (_QUESTION, ("answer", "solution")),
    _question,
)
ALPACA = Format(
    "alpaca",
    'has "instruction" with perhaps "input", "output" and "history"; or "query", with perhaps "response"',
    {"instruction": "<image>Name the animal.", "input": "", "output": "A cat.", "images": ["1.jpg"]},
    (("instruction", "query"),),
    _instruction,
)
