"""A reward model trained on human preferences with captions, killed and continued; then it judges a GRPO run."""

import json
import signal
import time
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file
from test_end_to_end import called, jsonl, started
from test_end_to_end_media import without_time

REWARD_MODEL = """
model: model
data: {train: preferences.json, eval: held-out.json}
judge: {captions: image_to_caption.json, prompt: judge.jinja, stem: the answer}
lora: {r: 4, vision: true}
train: {learning_rate: 1e-2, max_steps: 6, save_steps: 2, per_device_train_batch_size: 4, lr_scheduler_type: constant}
"""
WARM = """
model: model
data: {train: answers.jsonl}
lora: {r: 4, vision: true}
train: {learning_rate: 1e-2, max_steps: 3, completion_column: answer, per_device_train_batch_size: 4}
"""
GRPO = """
model: warm
data: {train: answers.jsonl, eval: answers.jsonl}
rewards:
  - {model: judge, captions: image_to_caption.json}
  - accuracy=0
train:
  learning_rate: 1e-3
  lr_scheduler_type: constant
  max_steps: 10
  save_steps: 4
  beta: 0.1
  num_generations: 4
  per_device_train_batch_size: 8
  max_completion_length: 5
  seed: 3
"""
COLORS = ("red", "green", "blue", "yellow")


def preference(number: int) -> dict:
    """As LLaVA-Human-Preference has them: the last turn is the one that two answers are given to."""
    right, wrong = COLORS[number % 4], COLORS[(number + 1 + number // 4) % 4]
    outputs = [{"from": "llava", "value": f"it is {word}"} for word in (right, wrong)]
    swapped = number % 2 == 0
    return {
        "id": f"{number}",
        "image": f"{number}.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is this"},
            {"from": "gpt", "value": "a square"},
            {"from": "human", "value": "which color"},
        ],
        "output_1": outputs[swapped],
        "output_2": outputs[not swapped],
        "preference": 2 if swapped else 1,
    }


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.save("qwen2_5_vl", tmp_path / "model", layers=1)
    for number in range(12):
        tiny.image(number).save(tmp_path / f"{number}.png")
    rows = [preference(number) for number in range(12)]
    (tmp_path / "preferences.json").write_text(json.dumps(rows[:8]))
    (tmp_path / "held-out.json").write_text(json.dumps(rows[8:]))
    captions = {f"{number}.png": [f"a {COLORS[number % 4]} square", "an image"] for number in range(12)}
    (tmp_path / "image_to_caption.json").write_text(json.dumps(captions))
    (tmp_path / "judge.jinja").write_text("say {% for caption in captions %}{{ caption }} {% endfor %}how correct")
    answers = [
        {"prompt": tiny.prompt("which color"), "images": [f"{n}.png"], "answer": COLORS[n % 4]} for n in range(8)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    for name, text in (("judge.yaml", REWARD_MODEL), ("warm.yaml", WARM), ("grpo.yaml", GRPO)):
        (tmp_path / name).write_text(text)
    return tmp_path


def killed(folder: Path, checkpoint: str, *args: str) -> None:
    process = started(folder.parent, *args, "--output", folder.name)
    while process.poll() is None and not (folder / checkpoint / "manifest.json").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / "result.json").exists()


def weights(*folders: Path) -> list[bytes]:
    return [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]


@pytest.mark.slow
def test_preferences_to_reward_model_to_grpo_killed_and_continued(workplace: Path):
    # covers A3, A10, L1, L2, L3, L4, L5, L10, O3, O7, hold 2, hold 3
    called(0, "reward", "train", "judge.yaml", "--output", "whole")
    judge = workplace / "judge"
    killed(judge, "checkpoint-2", "reward", "train", "judge.yaml")
    _, error = called(0, "reward", "train", "judge.yaml", "--output", "judge")
    assert "Continuing from" in error
    assert without_time(judge) == without_time(workplace / "whole"), "the same numbers as if nothing had happened"
    for name in ("adapter_model.safetensors", "head.safetensors"):
        assert (judge / name).read_bytes() == (workplace / "whole" / name).read_bytes()
    figures = json.loads((judge / "evaluation.json").read_text())
    assert {"before", "after", "control"} <= set(figures) and figures["after"]["rows"] == 4
    assert {"accuracy", "margin", "loss"} <= set(without_time(judge)[0])
    pairs = [line for line in jsonl(judge / "evaluation.jsonl") if line["state"] == "after"]
    assert {caption for pair in pairs for caption in pair["captions"]} >= {"an image", "a red square"}
    assert not any("square" in pair["prompt"].rpartition("which color")[2] for pair in pairs), "for the judge alone"
    assert "rewards: [{model:" in (judge / "README.md").read_text()

    called(0, "sft", "warm.yaml", "--output", "warm")
    frozen = weights(judge) + [(judge / "head.safetensors").read_bytes()]
    out, _ = called(0, "train", "grpo.yaml", "--output", "policy")
    cut, policy = workplace / "cut", workplace / "policy"
    killed(cut, "checkpoint-4", "train", "grpo.yaml")
    called(0, "train", "grpo.yaml", "--output", "cut")
    assert without_time(cut) == without_time(policy), "score and truth as if nothing had happened"
    assert weights(cut) == weights(policy)
    metrics = without_time(policy)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[-1].get("kl", 1) > 0
    scores = [record["rewards/model/mean"] for record in metrics if "rewards/model/mean" in record]
    assert len(set(scores)) > 1, "answers that differ have scores that do"
    assert all(
        record["reward"] == pytest.approx(record["rewards/model/mean"]) for record in metrics if "reward" in record
    )

    last = policy / "checkpoint-10"
    begun = load_file(workplace / "warm" / "adapter_model.safetensors")
    reference = load_file(last / "ref" / "adapter_model.safetensors")
    trained = load_file(last / "adapter_model.safetensors")
    for name, value in begun.items():
        assert reference[name].equal(value), "the reference is the policy as it began"
    assert any(not trained[name].equal(value) for name, value in begun.items()), "which has learned since"
    assert weights(judge) + [(judge / "head.safetensors").read_bytes()] == frozen, "the reward model has not moved"
    assert not (last / "reward").exists(), "it lies in a folder of its own"
    assert not (policy / "ref").exists(), "the result is the policy"

    called(0, "eval", "policy", "--data", "answers.jsonl")
    again = json.loads((policy / "eval-answers" / "evaluation.json").read_text())
    during = json.loads((policy / "evaluation.json").read_text())
    for name in ("accuracy", "model"):
        assert again["after"]["rewards"][name] == pytest.approx(during["after"]["rewards"][name], abs=1e-5), name
    assert "judge" in (policy / "report.html").read_text()
    rows = [sample["rewards"] for sample in jsonl(policy / "samples.jsonl")]
    assert all(set(row) == {"model", "accuracy"} for row in rows)
    assert out.count("10 steps in") == 1
