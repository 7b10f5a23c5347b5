"""One life of a run through the real command line, and a training run that learns to look at the picture."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from datasets import Dataset
from PIL import Image
from typer.testing import CliRunner

from vlm_grpo import VLMGRPOConfig, VLMGRPOTrainer, load_model
from vlm_grpo.cli import app
from vlm_grpo.data import to_sample
from vlm_grpo.encode import encode
from vlm_grpo.evaluate import complete, evaluate

STEPS = 12
# Written as TRL documents rewards: messages in, every argument by name. None leaves a completion out.
REWARD = """
def brief(prompts, completions, completion_ids, answer, **columns):
    texts = [completion[0]["content"] for completion in completions]
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [None if right == "skip" else float(len(set(ids)) % 3) for ids, right in zip(completion_ids, answer)]
"""


def started(folder: Path, *args: str) -> subprocess.Popen:
    """The command in a process of its own, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "vlm_grpo", *args],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen, status: int) -> tuple[str, str]:
    """Its stdout and stderr, once it has ended as expected."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == status, f"{process.args} ended with {process.returncode}:\n{out}\n{error}"
    return out, error


def called(status: int, *args: str) -> tuple[str, str]:
    """The same within this process, for steps that no signal meets: a process of its own imports for seconds."""
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == status, result.output
    return result.stdout, result.stderr


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder, with its time."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a user has: a model, pictures, rows with none to two of them, a reward."""
    monkeypatch.chdir(tmp_path)
    tiny.save("qwen2_5_vl", tmp_path / "model", layers=1)
    rows = []
    for i in range(12):
        pictures = [f"{i}-{j}.png" for j in range(i % 3)]
        for j, name in enumerate(pictures):
            tiny.image(10 * i + j, (56 + 28 * j, 56)).save(tmp_path / name)
        answer = "skip" if i == 5 else tiny.WORDS[i]
        rows.append({"prompt": tiny.prompt(f"count {i}", len(pictures)), "images": pictures, "answer": answer})
    for name, part in (("train", rows), ("held-out", rows[:3])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


SFT = (
    *("sft", "--model", "model", "--data", "train.jsonl", "--output", "runs/sft", "--completion_column", "answer"),
    *("--max-steps", "4", "--per_device_train_batch_size", "6", "--learning_rate", "3e-3"),
)
TRAIN = (
    *("train", "--model", "runs/sft", "--data", "train.jsonl", "--eval-data", "held-out.jsonl", "--output", "runs/rl"),
    *("--reward", "reward.py:brief", "--lora.r", "4", "--lora.vision", "true", "--beta", "0.1"),
    *("--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length", "8"),
    *("--max-steps", str(STEPS), "--learning_rate", "1e-3", "--save_steps", "5"),
)


def test_the_life_of_a_run(workplace: Path):  # covers U1, U7, U11, L4, Q9, Q10
    run = workplace / "runs" / "rl"
    out, _ = called(0, *SFT)
    assert "4 steps in" in out and "runs/sft" in out
    losses = [record["loss"] for record in jsonl(workplace / "runs" / "sft" / "metrics.jsonl")]
    assert len(losses) == 4 and losses[-1] < losses[0]

    step = _stopped_by_sigterm(workplace, run)
    out, error = ended(started(workplace, *TRAIN), 0)
    assert f"runs/rl/checkpoint-{step}." in error and f"{STEPS} steps in" in out
    _check_results(run)
    _check_records(workplace, run)

    before = contents(run)
    question = ("--image", "1-0.png", "--prompt", "count 1", "--max-new-tokens", "4")
    again, chat = started(workplace, *TRAIN), started(workplace, "chat", "runs/rl", *question)
    assert f"runs/rl: this run is finished ({STEPS} steps)" in ended(again, 0)[1]
    assert ended(chat, 0)[0].strip() == _answer_in_python(workplace, run)
    _, error = called(2, *TRAIN, "--learning_rate", "2e-3")
    assert "train.learning_rate: 0.001 → 0.002" in error and "--fresh" in error and "Traceback" not in error
    assert contents(run) == before, "a finished run is left as it is"

    called(0, *TRAIN, "--learning_rate", "2e-3", "--max-steps", "1", "--fresh")
    assert contents(run.with_name("rl.old-1")) == before, "renamed, not deleted"
    assert [record["step"] for record in jsonl(run / "metrics.jsonl") if "loss" in record] == [1]


def _stopped_by_sigterm(workplace: Path, run: Path) -> int:
    """Start, wait for three steps, send SIGTERM; the step it saved."""
    process, metrics = started(workplace, *TRAIN), run / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = ended(process, 143)
    result = json.loads((run / "result.json").read_text())
    assert result["stopped"] == "SIGTERM" and 3 <= result["steps"] < STEPS
    assert f"Stopped by SIGTERM at step {result['steps']}; the same command again continues from there" in error
    assert (run / f"checkpoint-{result['steps']}" / "manifest.json").is_file()
    return result["steps"]


def _check_results(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["model"], config["train"]["beta"], config["lora"]["r"]) == ("runs/sft", 0.1, 4)
    names = {path.name for path in run.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names, "an adapter, not a copy of its base"

    evaluation = json.loads((run / "evaluation.json").read_text())
    assert set(evaluation) == {"before", "after", "control", "change"} and evaluation["after"]["rows"] == 3
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == STEPS and result["stopped"] is None and result["evaluation"] == evaluation
    with Image.open(run / "curves.png") as picture:
        picture.load()


def _check_records(workplace: Path, run: Path) -> None:
    metrics = [record for record in jsonl(run / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in metrics] == list(range(1, STEPS + 1)), "each step once, in order"
    seconds = [record["seconds"] for record in metrics]
    assert seconds == sorted(seconds)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[-1]["kl"] > 1e-6
    assert all(0 <= record["reward"] <= 2 for record in metrics)

    samples = jsonl(run / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [step for step in range(1, STEPS + 1) for _ in range(8)]
    counts = {row["prompt"][0]["content"][-1]["text"]: row for row in jsonl(workplace / "train.jsonl")}
    for sample in samples:
        row = next(row for text, row in counts.items() if sample["prompt"].endswith(text))
        assert sample["media"] == [str(workplace / name) for name in row["images"]]
        assert sample["answer"] == row["answer"]
        assert (sample["rewards"]["brief"] is None) == (sample["answer"] == "skip")
    assert {len(sample["media"]) for sample in samples} == {0, 1, 2}, "rows of all kinds were trained on"


def _answer_in_python(workplace: Path, run: Path) -> str:
    model, processor = load_model(run)
    row = {"prompt": tiny.prompt("count 1"), "image": str(workplace / "1-0.png")}
    return complete(model.eval(), processor, [encode(processor, to_sample(row))], 4)[0]


COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}


def colored(name: str, seed: int) -> Image.Image:
    """A grainy picture of one color."""
    grain = np.random.default_rng(seed).normal(0, 25, (56, 56, 3))
    return Image.fromarray((np.array(COLORS[name]) + grain).clip(0, 255).astype(np.uint8))


def rows_of(seeds: range) -> Dataset:
    """One row a color and seed; its side is what the reward asks for."""
    sides = list(enumerate(COLORS))
    return Dataset.from_list(
        [
            {"prompt": tiny.prompt("what color is this"), "image": colored(name, 10 * seed + side), "side": side}
            for side, name in sides
            for seed in seeds
        ]
    )


def on_its_side(completion_ids, side, **columns):
    """A quarter of all tokens is right, and which quarter only the picture says: guessing earns 0.25."""
    return [float(ids[0] % 4 == quarter) for ids, quarter in zip(completion_ids, side, strict=True)]


@pytest.mark.slow
def test_training_learns_to_look(tmp_path: Path):  # covers U1
    model, processor = tiny.build("qwen2_5_vl", layers=1, image_scale=4)
    args = VLMGRPOConfig(
        output_dir=str(tmp_path),
        max_steps=25,
        num_generations=8,
        per_device_train_batch_size=128,
        max_completion_length=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = VLMGRPOTrainer(model, on_its_side, args, rows_of(range(8)), processing_class=processor)
    trainer.train()
    rewards = [logs["reward"] for logs in trainer.state.log_history if "reward" in logs]
    assert len(rewards) == 25 and 0.15 < fmean(rewards[:5]) < 0.35, "it begins as a guess"
    assert fmean(rewards[-5:]) > 0.6 and fmean(rewards[-5:]) > 2 * fmean(rewards[:5])

    unseen, options = rows_of(range(100, 115)), {"score": on_its_side, "max_new_tokens": 1}
    seeing, blind = (evaluate(model, processor, unseen, blank=blank, **options) for blank in (False, True))
    assert seeing.accuracy > 0.6 and seeing.ci95[0] > 2 * blind.accuracy
    assert blind.accuracy == 0.25, "without the picture there is one answer for all"
