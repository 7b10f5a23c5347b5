"""A whole run whose judge fails in every way: it completes, failures are masked and counted, the next run is spared."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import tiny
from faulty import HANG_UP, SLOW, serving
from test_end_to_end import called, jsonl

CONFIG = """
model: model
data: {{train: rows.jsonl}}
lora: {{r: 4}}
rewards:
  - name: format
  - name: api
    kwargs:
      {{url: "{url}", batch_size: 1, retries: 1, backoff: 0.01, retry_after_max: 0.05, timeout: 0.15,
       breaker_failures: 1000, cache: scores.sqlite}}
train:
  learning_rate: 1e-3
  lr_scheduler_type: constant
  max_steps: 5
  num_generations: 4
  per_device_train_batch_size: 8
  max_completion_length: 6
  max_reward_failures: 1.0
  seed: 5
"""


def fate(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0]


def unreliable(body: dict, _: int) -> object:
    """Always the same answer to the same text; half of them are no scores."""
    (text,) = body["messages"]
    scores = (200, {"scores": [fate(text) / 255]})
    faults = [
        SLOW,
        (500, {"error": "x"}),
        (429, {"error": "slow down"}, {"Retry-After": "0.02"}),
        (200, b"<html>not JSON"),
        (200, {"scores": [1.0, 2.0]}),
        HANG_UP,
    ]
    return faults[fate(text) % 12] if fate(text) % 12 < len(faults) else scores


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.save("qwen2_5_vl", tmp_path / "model", layers=1)
    rows = []
    for number in range(6):
        tiny.image(number).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": f"count {number}", "answer": str(number)})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.slow
def test_a_run_with_a_faulty_judge(workplace: Path):
    # covers A4
    with serving(unreliable) as judge:
        (workplace / "run.yaml").write_text(CONFIG.format(url=judge.url))
        out, error = called(0, "train", "run.yaml", "--output", "first")
        assert "5 steps in" in out
        first, asked = len(judge.requests), set(judge.texts)
        called(0, "train", "run.yaml", "--output", "second")
        second = judge.requests[first:]
    samples = jsonl(workplace / "first" / "samples.jsonl")
    reasons = Counter((sample["failed"] or "scored").removeprefix("api: ") for sample in samples)
    assert len(samples) == 40 and reasons["scored"] < 40
    for sample in samples:
        assert (sample["rewards"]["api"] is None) == (sample["failed"] is not None)
        assert sample["failed"] is None or sample["advantage"] == 0
    for reason in set(reasons) - {"scored"}:
        assert f'The reward "api" failed for a completion ({reason})' in error, "each kind is said once"
    metrics = [record for record in jsonl(workplace / "first" / "metrics.jsonl") if "loss" in record]
    shares = [record.get("rewards/api/failed", 0.0) for record in metrics]
    assert sum(shares) / 5 == pytest.approx(1 - reasons["scored"] / 40), "all of them are counted"
    again = {text for _, _, body in second for text in body["messages"]}
    assert again == {text for text in asked if fate(text) % 12 < 6}, "what had a score is not asked again"
    assert samples == jsonl(workplace / "second" / "samples.jsonl"), "and counts the same"
    print(f"\n{len(samples)} completions: {dict(reasons)}; {first} requests, {len(second)} in the second run")
