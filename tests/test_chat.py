"""Chat shows the pictures once, keeps the conversation, and answers as greedy decoding does."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from vlm_grpo import chat as chats
from vlm_grpo.data import to_sample
from vlm_grpo.encode import encode
from vlm_grpo.errors import MediaError
from vlm_grpo.evaluate import greedy


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    model, processor = tiny.build("qwen2_5_vl", seed=3)
    monkeypatch.setattr(chats, "load_model", lambda run: (model, processor))
    return model, processor


def picture(folder: Path, seed: int) -> str:
    path = folder / f"{seed}.png"
    tiny.image(seed).save(path)
    return str(path)


def question(text: str, *images: str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}],
    }


def test_one_question_is_answered_about_the_picture(loaded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first, second = picture(tmp_path, 1), picture(tmp_path, 2)
    answers = [chats.chat("runs/x", [path], "what color is this", 8) for path in (first, second)]
    expected = [
        greedy(*loaded, [encode(loaded[1], to_sample({"prompt": [question("what color is this", path)]}))], 8)[0]
        for path in (first, second)
    ]
    assert answers == expected
    assert answers[0] != answers[1], "the picture matters"
    assert capsys.readouterr().out == f"{answers[0]}\n{answers[1]}\n"


def test_a_conversation_keeps_its_turns(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # covers U11
    path = picture(tmp_path, 1)
    asked = iter(["what is this", "and the color", ""])
    monkeypatch.setattr(chats.Prompt, "ask", lambda *args, **options: next(asked))
    seen: list[Any] = []
    monkeypatch.setattr(chats, "to_sample", lambda row: seen.append([*row["prompt"]]) or to_sample(row))
    answer = chats.chat("runs/x", [path], None, 4)
    assert [len(messages) for messages in seen] == [1, 3]
    assert seen[1][0] == question("what is this", path), "the picture is shown with the first question only"
    assert [message["role"] for message in seen[1]] == ["user", "assistant", "user"]
    assert answer == greedy(*loaded, [encode(loaded[1], to_sample({"prompt": seen[1]}))], 4)[0]


def test_the_end_of_input_ends_the_conversation(loaded: Any, monkeypatch: pytest.MonkeyPatch):
    def end(*args: Any, **options: Any) -> str:
        raise EOFError

    monkeypatch.setattr(chats.Prompt, "ask", end)
    assert chats.chat("runs/x", []) == ""


def test_a_missing_picture_is_one_sentence(loaded: Any, tmp_path: Path):
    with pytest.raises(MediaError, match="absent.png"):
        chats.chat("runs/x", [str(tmp_path / "absent.png")], "what is this")


def test_a_run_answers_from_the_weights_it_was_trained_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.yaml").write_text("# vlm-grpo train\nmodel: m\nload_in_4bit: true\nbackend: hf\n")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(chats, "load_model", lambda run, **how: seen.update(how) or tiny.build("qwen2_5_vl"))
    chats.chat(str(tmp_path), [], "what color is this", 2)
    assert seen == {"load_in_4bit": True, "dtype": "auto", "backend": "hf"}
