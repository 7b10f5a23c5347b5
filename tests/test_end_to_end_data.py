"""Another project's rows with videos, its published options, a judge over HTTP: trained, killed, continued, judged."""

import hashlib
import json
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mediafiles
import pytest
import tiny
from test_end_to_end import called, jsonl, started
from test_end_to_end_media import without_time, written

FAILS = 4  # one text in so many is never answered


def verdict(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0]


class Judge(BaseHTTPRequestHandler):
    """Scores each text by its hash, and drops the ball on some: always the same ones."""

    asked: list[str] = []

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        Judge.asked += texts
        failed = any(verdict(text) % FAILS == 0 for text in texts)
        body = b"overloaded" if failed else json.dumps({"scores": [verdict(text) / 255 for text in texts]}).encode()
        self.send_response(503 if failed else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/score/evaluation"
    server.shutdown()


CONFIG = """
preset: qwen-video
model: model
data: {{train: train.json, eval: held-out.json}}
media: {{min_frames: 2, max_frames: 4, max_pixels: 4000}}
lora: {{r: 4, vision: true}}
rewards:
  - {{name: accuracy, weight: 0.5}}
  - {{name: format, weight: 0.3}}
  - {{name: actions, weight: 0.7}}
  - name: api
    weight: 0.5
    kwargs: {{url: "{url}", batch_size: 1, retries: 0, cache: false, breaker_failures: 1000}}
train:
  learning_rate: 1e-3
  lr_scheduler_type: constant
  max_steps: 4
  save_steps: 1
  max_completion_length: 6
  per_device_train_batch_size: 8
  max_reward_failures: 1.0
  seed: 3
"""


def conversation(number: int) -> dict:
    """A row as Qwen-VL video projects write them."""
    actions = " ".join(f"({action}) did" for action in sorted({1, 2 + number % 2, 5}))
    return {
        "id": f"clip-{number}",
        "conversations": [
            {"from": "human", "value": f"<video>\nWhich actions? count {number}"},
            {"from": "gpt", "value": f"<think>look</think><answer>{actions}</answer>"},
        ],
        "video": f"{number}.mp4",
        "meta": {"frame_cnts": [8, 12], "min_frames": 2, "max_frames": 4, "dynamic_sample": True},
    }


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge: str) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.save("qwen2_5_vl", tmp_path / "model", layers=1)
    rows = [conversation(number) for number in range(8)]
    for number in range(8):
        mediafiles.write_video(tmp_path / f"{number}.mp4", frames=20, fps=10, size=(64, 48))
    (tmp_path / "train.json").write_text(json.dumps(rows[:6]))
    (tmp_path / "held-out.json").write_text(json.dumps(rows[6:]))
    (tmp_path / "run.yaml").write_text(CONFIG.format(url=judge))
    return tmp_path


@pytest.mark.slow
def test_conversations_preset_judge_killed_continued_evaluated(workplace: Path):
    # covers Q1, Q2, Q3, Q4, Q5, Q7, Q8, Q9, Q10, A4, O9
    called(0, "data", "inspect", "train.json")
    called(0, "train", "run.yaml", "--output", "whole")
    cut = workplace / "cut"
    process = started(workplace, "train", "run.yaml", "--output", "cut")
    while process.poll() is None and not (cut / "checkpoint-1" / "manifest.json").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (cut / "result.json").exists()
    _, error = called(0, "train", "run.yaml", "--output", "cut")
    assert "Continuing from" in error

    whole = workplace / "whole"
    assert without_time(cut) == without_time(whole), "the same numbers as if nothing had happened"
    name = "adapter_model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    metrics, samples = jsonl(cut / "metrics.jsonl"), jsonl(cut / "samples.jsonl")
    shares = [record["rewards/api/failed"] for record in metrics if "rewards/api/failed" in record]
    assert 0 < sum(shares) / len(shares) < 0.6, "about a quarter"
    failed = [sample for sample in samples if sample["failed"]]
    assert failed and all(sample["advantage"] == 0 and "503" in sample["failed"] for sample in failed)
    assert all(sample["answer"].startswith("(1) did") for sample in samples), "the body of the answer tag"
    figures = json.loads((cut / "evaluation.json").read_text())
    assert {"before", "after", "control"} <= set(figures) and figures["after"]["rows"] == 2
    assert set(figures["after"]["rewards"]) == {"accuracy", "format", "actions", "api"}

    called(0, "eval", "cut", "--data", "held-out.json", "--baseline", "base", "--control", "blank", "--samples", "2")
    again = json.loads((cut / "eval-held-out" / "evaluation.json").read_text())
    assert again["control"]["kind"] == "blank" and set(again["after"]["pass@k"]) == {"1", "2"}
    for state in ("before", "after", "control"):
        assert again[state]["accuracy"] == figures[state]["accuracy"], "the command measures what the run measured"
        for name in ("accuracy", "format", "actions"):
            assert again[state]["rewards"][name] == pytest.approx(figures[state]["rewards"][name]), (state, name)
    (cut / "report.html").unlink()
    called(0, "report", "cut")
    page = (cut / "report.html").read_text()
    assert "data:image" in page or "<video" in page, "the clips are in it"
    assert all(name in page for name in ("actions", "HTTP 503", "held-out"))
    card = (cut / "README.md").read_text()
    assert "actions" in card and str(workplace) not in card
    written(workplace, [conversation(0) | {"video": None}], "bad.jsonl")
    assert "placeholder" in called(1, "data", "inspect", "bad.jsonl")[0]
