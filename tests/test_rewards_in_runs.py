"""Every built-in reward by its name in a config, through a real run, a trial and a scoring server."""

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from test_end_to_end import called, jsonl, started
from test_rewards_model import saved_judge

from vlm_grpo import load_rewards
from vlm_grpo.config import MediaOptions, load_config
from vlm_grpo.rewards import BUILT_IN, introduce

LENGTH = 6  # tokens of a completion
_TRAIN = {"max_completion_length": LENGTH, "learning_rate": 1e-3, "report_to": "none"}
OWN = """
import asyncio

async def waits(completions, answer, **columns):
    await asyncio.sleep(0.01)
    return [float(len(right)) for right in answer]

def lengths(completions, texts, **columns):
    assert len(texts) == len(completions)
    return [float(len(text)) for text in texts]
"""
REWARDS: list[dict[str, Any]] = [
    {"name": "accuracy", "kwargs": {"method": "auto"}},
    {"name": "format", "weight": 0.5},
    {"name": "actions", "columns": {"answer": "acts"}},
    {"name": "counting", "kwargs": {"column": "count", "partial": False}},
    {"name": "asr", "kwargs": {"column": "transcript"}},
    {"name": "grounding", "kwargs": {"column": "boxes", "scale": "resized", "truth_scale": "pixels"}},
    {"name": "ocr", "scale": 2, "shift": -1, "clip": [-0.5, 0.5]},
    {"name": "length", "kwargs": {"variant": "llava-rlhf"}},
    {"name": "overlong"},
    {"name": "length_bonus"},
    {"name": "caption_type", "columns": {"caption_type": "kind"}},
    {"name": "repetition", "kwargs": {"unit": "words", "ngram": 1}},
    {"name": "own.py:waits", "timeout": 5},
    {"name": "own.py:lengths", "columns": {"texts": "transcript"}},
]


def row(number: int) -> dict[str, Any]:
    """A row that every reward can score; some of its columns have the names of rewards' options."""
    turns = [
        {"from": "human", "value": f"<image>\ncount {number}"},
        {"from": "gpt", "value": f"<think>look</think><answer>{number}</answer>"},
    ]
    facts = {"acts": f"(1) ({number + 2})", "count": number, "transcript": " ".join(tiny.WORDS[: number + 2])}
    same = {"tags": f"t{number}", "method": "photo", "strict": "no", "partial": number}
    box = {"boxes": [[4, 4, 30, 20 + number]], "length_bonus": 1.0 + number, "kind": 4 + number}
    return {"conversations": turns, "image": f"{number}.png", **facts, **same, **box}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model for all runs here."""
    folder = tmp_path_factory.mktemp("shared")
    tiny.save("qwen2_5_vl", folder / "model", layers=1)
    for number in range(4):
        tiny.image(number).save(folder / f"{number}.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(4)))
    (folder / "own.py").write_text(OWN)
    return folder


@pytest.fixture
def workplace(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in shared.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(folder: Path, shared: Path, rewards: list[dict[str, Any]], **data: Any) -> None:
    text = {
        "model": str(shared / "model"),
        "data": {"train": "rows.jsonl", **data},
        "output": "run",
        "rewards": rewards,
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2, **_TRAIN},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(text))


def test_every_built_in_reward_in_one_run(workplace: Path, shared: Path):
    # covers A4, A5, A6, A8, O3, Q5
    serving = [{"name": "accuracy"}, {"name": "repetition", "kwargs": {"unit": "characters", "ngram": 1}}]
    (workplace / "served.yaml").write_text(yaml.safe_dump({"rewards": serving}))
    server = started(workplace, "reward", "serve", "served.yaml", "--port", "0")
    try:
        model = saved_judge(workplace / "judge")
        url = re.search(r"http://\S+", server.stdout.readline())[0]
        api = {"url": url, "send_columns": ["completion", "answer"], "cache": "scores.sqlite"}
        rewards = [*REWARDS, {"name": "model", "kwargs": {"model": model}}, {"name": "api", "kwargs": api}]
        assert {spec["name"] for spec in rewards} >= set(BUILT_IN), "a new reward belongs into this run"
        config(workplace, shared, rewards)
        out, error = called(0, "train", "run.yaml")
        assert "2 steps in" in out and "has no tokenizer" not in error
        called(0, "reward", "test", "run.yaml", "--json")
    finally:
        server.terminate()
        server.communicate(timeout=20)
    samples = jsonl(workplace / "run" / "samples.jsonl")
    assert len(samples) == 8 and len({sample["answer"] for sample in samples}) > 1
    expected = alone(rewards, [row(int(sample["answer"])) for sample in samples], samples, shared)
    for number, sample in enumerate(samples):
        own, right = sample["rewards"], row(int(sample["answer"]))
        assert own.pop("length_bonus") == own["length"], "one rule by two names"
        tokens = own.pop("length") / (-10 * right["length_bonus"]) * LENGTH
        assert tokens == pytest.approx(round(tokens)) and 1 <= tokens <= LENGTH, "of its own row's bonus"
        assert own.pop("overlong") == (-1.0 if round(tokens) == LENGTH else 0.0), "the run's limit, a fifth of it is 1"
        assert own == pytest.approx({name: values[number] for name, values in expected.items()}), sample


def alone(rewards: list[dict], rows: list[dict], samples: list[dict], shared: Path) -> dict[str, list[Any]]:
    """The same rewards outside of any trainer, one row a call."""
    from transformers import AutoProcessor

    specs = [spec for spec in rewards if spec["name"] not in ("length", "overlong", "length_bonus")]
    functions, _ = load_rewards(load_config(direct={"model": "none", "rewards": specs}).rewards)
    introduce(functions, processor=AutoProcessor.from_pretrained(shared / "model"), media=MediaOptions())
    found: dict[str, list[Any]] = {}
    for right, sample in zip(rows, samples, strict=True):
        prompt = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"\ncount {right['count']}"}]}
        ]
        columns = {**right, "answer": str(right["count"])}
        columns["image"] = str(Path(columns["image"]).resolve())
        for function in functions:
            completions = [[{"role": "assistant", "content": sample["completion"]}]]
            values = function(
                completions=completions, prompts=[prompt], **{name: [value] for name, value in columns.items()}
            )
            values = asyncio.run(values) if asyncio.iscoroutine(values) else values
            found.setdefault(function.__name__, []).append(values[0])
    return found
