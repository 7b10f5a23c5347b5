"""The rows of a run through the command line: streamed, of other projects' formats, chosen by how hard they are."""

import json
from pathlib import Path

import pytest
import tiny
from test_end_to_end import called

TRAIN = (
    *("train", "--model", "model", "--reward", "reward.py:brief", "--lora.r", "4", "--learning_rate", "1e-3"),
    *("--num_generations", "2", "--max_completion_length", "4", "--output", "run", "--max-steps", "2"),
)
REWARD = """
def brief(completions, completion_ids, answer, **columns):
    assert all(isinstance(text, str) for text in answer)
    return [float(sum(ids) % 3) for ids in completion_ids]
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.save("qwen2_5_vl", tmp_path / "model", layers=1)
    (tmp_path / "reward.py").write_text(REWARD)
    for number in range(6):
        tiny.image(number).save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder: Path, rows: list[dict]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_stream_of_easyr1_rows(workplace: Path):
    # covers U1
    rows = [{"problem": f"<image>count {n}", "images": [f"{n}.png"], "answer": str(n)} for n in range(6)]
    write(workplace, rows)
    out, _ = called(0, *TRAIN, "--data", "rows.jsonl", "--set", "data.streaming=true")
    assert "2 steps in" in out
    assert "(a stream)" in (workplace / "run" / "README.md").read_text()
    samples = [json.loads(line) for line in (workplace / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["answer"] for sample in samples} <= {str(n) for n in range(6)}
    without = TRAIN[: TRAIN.index("--max-steps")]
    _, error = called(2, *without, "--data", "rows.jsonl", "--set", "data.streaming=true", "--output", "other")
    assert "a stream does not say how many rows" in error and not (workplace / "other").exists()


def test_columns_of_other_names_and_rows_of_the_right_difficulty(workplace: Path):
    rows = [{"text": f"count {n}", "picture": f"{n}.png", "truth": str(n), "pass_rate": n / 5} for n in range(6)]
    write(workplace, rows)
    mapping = ("--set", "data.columns={problem: text, image: picture, answer: truth}")
    chosen = ("--set", "data.min_pass_rate=0.1", "--set", "data.max_pass_rate=0.9")
    out, error = called(0, *TRAIN, "--data", "rows.jsonl", *mapping, *chosen, "--dry-run")
    assert any("training rows" in line and " 4 " in line for line in out.splitlines()), out
    assert "2" in error and "pass_rate" in error, "the rows left out are counted"
    _, error = called(2, *TRAIN, "--data", "rows.jsonl")
    assert "row 1" in error and "fits no format" in error
