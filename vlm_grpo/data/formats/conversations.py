"""``conversations`` (LLaVA, Qwen-VL, R1-Omni, LLaVA-RLHF) and ``messages`` (OpenAI, ms-swift, LLaMA-Factory)."""

from dataclasses import replace
from typing import Any

from .base import Format, Read, Reading, answered, kept, text_of
from .caption_types import right_answer
from .turns import read_turns, split_answer, with_slots, without_own_sound

# Texts that ms-swift fills from its "objects" column; read as they stand they would reach the model.
_OBJECTS = ("<bbox>", "<ref-object>")


def _reader(column: str) -> Any:
    def read(row: dict[str, Any], reading: Reading) -> Read:
        turns = read_turns(row[column], column, reading)
        system = text_of(row, "system", reading)
        if system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": system}, *turns]
        _no_objects(row, turns, reading)
        return _read(row, turns, reading, (column,))

    return read


def _first_turn(row: dict[str, Any], reading: Reading) -> Read:
    """Reinforcement rows of LLaVA-RLHF: the policy answers the first user turn, whatever was said after it.

    The answer is the row's own, else what the type says, else the turn that followed.
    """
    right = right_answer(row, reading)
    turns = read_turns(row["conversations"], "conversations", reading)
    asked = next(number for number, turn in enumerate(turns, 1) if turn["role"] == "user")
    # Later turns are in neither prompt nor completion: the column stays.
    used = () if len(turns) > asked + 1 else ("conversations",)
    read = _read(row, turns[: asked + 1], reading, used)
    if right is None or row.get("answer") is not None:
        return read
    return replace(read, columns={**read.columns, "answer": right})


def _read(row: dict[str, Any], turns: list[dict[str, Any]], reading: Reading, used: tuple[str, ...]) -> Read:
    prompt, completion, text = split_answer(turns, reading)
    prompt, heard = without_own_sound(prompt, reading)
    written: dict[str, Any] = {"prompt": with_slots(prompt, reading), "completion": completion}
    if heard:
        written["audio_in_video"] = True
    return Read({**kept(row, written), **answered(row, text)}, used)


def _no_objects(row: dict[str, Any], turns: list[dict[str, Any]], reading: Reading) -> None:
    if row.get("objects") is None:
        return
    for tag in _OBJECTS:
        if any(isinstance(turn["content"], str) and tag in turn["content"] for turn in turns):
            raise reading.refuse(
                f'a turn has {tag}, which stands for something in the column "objects". '
                f"Write the text itself in its place, such as [20, 40, 120, 90]."
            )


LLAVA_RLHF = Format(
    "llava-rlhf",
    'has "conversations" and "caption_type"; the prompt is the first user turn',
    {
        "image": "1.jpg",
        "conversations": [{"from": "human", "value": "<image>\nIs there a dog?"}, {"from": "gpt", "value": "Yes."}],
        "caption_type": 7,
        "length_bonus": 1.0,
    },
    (("conversations",), ("caption_type",)),
    _first_turn,
)
CONVERSATIONS = Format(
    "conversations",
    'has "conversations"; the prompt is everything before the last gpt turn',
    {
        "video": "a.mp4",
        "conversations": [
            {"from": "human", "value": "<video>\nWhich actions?"},
            {"from": "gpt", "value": "<answer>(1) (3)</answer>"},
        ],
    },
    (("conversations",),),
    _reader("conversations"),
)
MESSAGES = Format(
    "messages",
    'has "messages"; the prompt is everything before the last assistant message',
    {
        "messages": [
            {"role": "user", "content": "<audio>Transcribe."},
            {"role": "assistant", "content": "good morning"},
        ],
        "audios": ["a.wav"],
    },
    (("messages",),),
    _reader("messages"),
)
