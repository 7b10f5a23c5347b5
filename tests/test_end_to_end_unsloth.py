"""The real Unsloth through the command line: trained, killed, continued, exported and asked."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from real_unsloth import environment, run_cli
from test_end_to_end import jsonl

REWARD = """
def brief(completions, completion_ids, **columns):
    return [float(sum(ids) % 3) for ids in completion_ids]
"""
TRAIN = (
    *("train", "--backend", "unsloth", "--model", "model", "--data", "train.jsonl", "--reward", "reward.py:brief"),
    *("--lora.r", "4", "--vision", "lora", "--group_sharing", "true", "--beta", "0.1", "--dtype", "float32"),
    *("--per_device_train_batch_size", "4", "--num_generations", "2", "--gradient_accumulation_steps", "2"),
    *("--max_completion_length", "5", "--learning_rate", "3e-3", "--lr_scheduler_type", "constant", "--seed", "1"),
    *("--gradient_checkpointing", "unsloth", "--max-steps", "4", "--save_steps", "1", "--max_seq_length", "512"),
)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    tiny.save("qwen2_5_vl", tmp_path / "model", layers=1)
    rows = []
    for i in range(8):
        tiny.image(i, (56 + 28 * (i % 2), 56)).save(tmp_path / f"{i}.png")
        content = [{"type": "image"}, {"type": "text", "text": f"count {i}"}]
        rows.append({"prompt": [{"role": "user", "content": content}], "image": f"{i}.png"})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def called(folder: Path, *arguments: str) -> str:
    done = run_cli(list(arguments), folder)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def killed_after(step: int, folder: Path, *arguments: str) -> None:
    """Kill the command as soon as the checkpoint of ``step`` is whole."""
    command = [sys.executable, "-m", "vlm_grpo", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(OMP_NUM_THREADS="1"), stderr=subprocess.PIPE, text=True
    )
    output = folder / arguments[arguments.index("--output") + 1]
    deadline = time.monotonic() + 240
    while not (output / f"checkpoint-{step}" / "manifest.json").is_file():
        assert process.poll() is None, process.stderr.read()[-3000:]  # pyright: ignore[reportOptionalMemberAccess]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_unsloth_trains_is_killed_continues_exports_and_answers(workplace: Path):  # covers U2 U5 U11 Q10
    called(workplace, *TRAIN, "--output", "whole")
    killed_after(2, workplace, *TRAIN, "--output", "broken")
    called(workplace, *TRAIN, "--output", "broken")
    whole, broken = (jsonl(workplace / name / "metrics.jsonl") for name in ("whole", "broken"))
    assert [record["step"] for record in broken] == [record["step"] for record in whole]
    for one, other in zip(whole, broken, strict=True):
        for figure in ("loss", "reward", "kl", "grad_norm"):
            assert one.get(figure) == other.get(figure), (one["step"], figure)
        assert one.get("group/prompt_tokens_saved", 1) > 0

    report = called(workplace, "export", "broken", "--to", "merged_16bit", "--output", "merged")
    assert "PEFT" in report or "Unsloth" in report, report
    question = ("--image", "0.png", "--prompt", "count 0", "--max-new-tokens", "6")
    trained = called(workplace, "chat", "broken", *question)
    assert trained.strip()
    both = called(workplace, "chat", "broken", *question, "--compare-base")
    assert trained.strip() in both


@pytest.mark.slow
def test_unsloth_trains_the_model_itself_and_continues(workplace: Path):  # covers U5 Q6 Q10
    options = [*TRAIN, "--vision", "off", "--output", "whole"]
    for name in ("--lora.r", "--vision"):  # those of TRAIN
        del options[options.index(name) : options.index(name) + 2]
    called(workplace, *options)
    expected = jsonl(workplace / "whole" / "metrics.jsonl")
    (workplace / "whole" / "result.json").unlink()
    shutil.rmtree(workplace / "whole" / "checkpoint-4")  # two are kept, of steps 3 and 4
    called(workplace, *options)
    for one, other in zip(expected, jsonl(workplace / "whole" / "metrics.jsonl"), strict=True):
        for figure in ("loss", "reward", "kl", "grad_norm"):
            assert one.get(figure) == other.get(figure), (one["step"], figure)
