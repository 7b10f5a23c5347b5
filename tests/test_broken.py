"""Broken configs and datasets through the command line: one sentence, exit code 2, and nothing written."""

import json
import logging
import re
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner, Result

from vlm_grpo.cli import app

REWARDS = """
def pattern(completions, completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]

def short(completions, **columns):
    return [1.0]

def boom(completions, **columns):
    return 1 / 0
"""
BASE = {
    "model": "model",
    "data": "rows.jsonl",
    "reward": "rewards.py:pattern",
    "output": "runs/new",
    "lora": "true",
    "per_device_train_batch_size": "4",
    "num_generations": "2",
    "max_completion_length": "2",
    "max_steps": "1",
}

SFT: dict[str, str | None] = {"command": "sft", "reward": None, "num_generations": None, "max_completion_length": None}


def jsonl(path: str, rows: list) -> None:
    Path(path).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


def row(**changes) -> dict:
    return {"prompt": tiny.prompt("count red"), "image": "a.png", "answer": "1", **changes}


def part(**content) -> dict:
    return {"prompt": [{"role": "user", "content": [content]}]}


def command(**changes: str | None) -> Result:
    """``BASE`` with changes: None leaves an option out, an empty text gives it without a value."""
    options = {**BASE, **changes}
    args = [options.pop("command", None) or "train"]
    for key, value in options.items():
        if value is not None:
            args += [f"--{key}", value] if value else [f"--{key}"]
    return CliRunner().invoke(app, args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, rows, rewards, two finished runs (GRPO and sft), and a folder of somebody else's."""
    folder = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny.save("qwen2_5_vl", "model")
        tiny.image(1).save("a.png")
        whole = Path("a.png").read_bytes()
        Path("torn.png").write_bytes(whole[: len(whole) // 2])
        Path("empty.png").touch()
        Path("rewards.py").write_text(REWARDS)
        jsonl("rows.jsonl", [row(prompt=tiny.prompt(f"count {word}")) for word in tiny.WORDS[:4]])
        Path("other").mkdir()
        Path("other/thesis.tex").write_text("years of work")
        Path("unfinished").mkdir()
        Path("unfinished/config.json").write_text("{")
        for result in (
            command(output="runs/done"),
            command(output="runs/sft", completion_column="answer", **SFT),
        ):
            assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.chdir(folder)
    caplog.set_level(logging.ERROR)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content, every folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# What is wrong: (what is changed, the rows of data "bad.jsonl" if any, the sentence)
CASES: dict[str, tuple[dict[str, str | None], list | None, str]] = {
    # --- config
    "no model": ({"model": None}, None, "a model is needed"),
    "no data": ({"data": None}, None, "no training rows"),
    "no reward": ({"reward": None}, None, "no reward"),
    "no config file": ({"config": "nope.yaml"}, None, "nope.yaml: the config file cannot be read"),
    "unknown option": ({"learning_rat": "1"}, None, 'Did you mean "learning_rate"?'),
    "text for a number": ({"learning_rate": "fast"}, None, "learning_rate='fast': needs a number"),
    "loss type": ({"loss_type": "ppo"}, None, 'loss_type="ppo" is none of its'),
    "one generation": ({"num_generations": "1"}, None, "num_generations=1"),
    "split groups": ({"num_generations": "3"}, None, "num_generations=3 does not divide the 4 completions"),
    "zero batch": ({"per_device_train_batch_size": "0"}, None, "per_device_train_batch_size=0: needs 1 or more"),
    "zero temperature": ({"temperature": "0"}, None, "temperature=0: needs more than 0"),
    "top_p": ({"top_p": "3"}, None, "top_p=3: needs more than 0, at most 1"),
    "negative rate": ({"learning_rate": "-1"}, None, "learning_rate=-1: needs 0 or more"),
    "seed": ({"seed": "-5"}, None, "seed=-5: needs 0 or more"),
    "vllm": ({"use_vllm": "true"}, None, "use_vllm=True is not available here"),
    "half precision here": ({"fp16": "true", "use_cpu": "true"}, None, "fp16=True needs a GPU"),
    "tracker": ({"report_to": "nonesuch"}, None, 'train.report_to: "nonesuch" is not installed'),
    "evaluation of nothing": ({"eval_strategy": "steps"}, None, "train.eval_strategy=steps needs held-out rows"),
    "accelerator file": ({"accelerator_config": "nope.json"}, None, "No such file"),
    "optimizer": ({"optim": "galore_adamw"}, None, "train: .*install"),
    "sync without beta": ({"sync_ref_model": "true"}, None, "train: You passed `sync_ref_model=True` while `beta=0.0`"),
    "router": ({"router_aux_loss_coef": "0.1"}, None, "train: .*router_aux_loss_coef"),
    "eval groups": (
        {"eval_strategy": "steps", "eval_steps": "1", "eval-data": "rows.jsonl", "num_generations_eval": "3"},
        None,
        "must be divisible by the number of generations used for evaluation",
    ),
    # --- model and adapters
    "no such model": ({"model": "./nomodel"}, None, "the folder './nomodel' does not exist"),
    "unknown name": ({"model": "nobody/nothing"}, None, "cannot be fetched from the Hugging Face Hub"),
    "torn model": ({"model": "unfinished"}, None, "unfinished"),
    "lora on nothing": ({"lora": None, "lora.targets": "[nope]"}, None, "'nope' matches no module"),
    "lora off": ({"lora": None, "lora.language": "false"}, None, "nothing would be trained"),
    "4-bit without adapters": ({"lora": None, "load-in-4bit": ""}, None, "load_in_4bit without lora: 4-bit weights"),
    "adapters nowhere": ({"lora": "true", "language": "full"}, None, 'language="full" beside lora: an adapter'),
    "unsloth here": ({"backend": "unsloth"}, None, 'backend="unsloth": '),
    # --- rewards
    "no such reward": ({"reward": "acuracy"}, None, 'Did you mean "accuracy"?'),
    "no such function": ({"reward": "rewards.py:patern"}, None, 'Did you mean "pattern"?'),
    "no such file": ({"reward": "nope.py:f"}, None, 'the file "nope.py" does not exist'),
    "weight": ({"reward": "accuracy=nan"}, None, "input should be a finite number"),
    "a reward that raises": ({"reward": "rewards.py:boom"}, None, "failed with ZeroDivisionError"),
    "a reward too short": ({"reward": "rewards.py:short"}, None, "returned 1 values for 4 completions"),
    "no answers": ({"reward": "accuracy"}, [{"prompt": "a", "label": "x"}] * 4, 'The reward "accuracy"'),
    # --- data
    "no data file": ({"data": "nope.jsonl"}, None, '"nope.jsonl" does not exist'),
    "no held-out file": ({"eval-data": "nope.jsonl"}, None, '"nope.jsonl" does not exist'),
    "not JSON": ({}, [row(), "{broken"], "bad.jsonl row 2: not valid JSON"),
    "too few rows": ({}, [row()], "has 1 rows, but one generation batch takes 2 prompts"),
    "no prompt": ({}, [row(), {"answer": "1"}], 'bad.jsonl row 2: the row fits no format: it has "answer"'),
    "unknown part": ({}, [part(type="scent")] * 4, "bad.jsonl row 1: a message has a part of type 'scent'"),
    "slots": ({}, [row(prompt=tiny.prompt(images=2))] * 4, "2 image slots but .* holds 1"),
    "missing picture": ({}, [row(), row(image="nope.png")], "bad.jsonl row 2: the image .* does not exist"),
    "empty picture": ({}, [row(), row(image="empty.png")], r'row 2: the image ".*empty.png" is empty .0 bytes'),
    "torn picture": ({}, [row(), row(image="torn.png")], r'row 2: the image ".*torn.png" cannot be read .*truncated'),
    "a text as picture": ({}, [row(), row(image="rewards.py")], r'row 2: the image ".*rewards.py" cannot be read'),
    "a token in the text": ({}, [row(prompt=tiny.prompt("a <|image_pad|>"))] * 4, "holds the image token"),
    "mixed types": ({}, [row(), row(answer=1)], 'the column "answer" mixes int and str'),
    # --- run folders
    "a finished run, changed": (
        {"output": "runs/done", "learning_rate": "1e-3"},
        None,
        "was started with other options",
    ),
    "a finished run, afresh": ({"output": "runs/done", "fresh": "", "model": "./nomodel"}, None, "does not exist"),
    "a run of another command": ({"output": "runs/sft"}, None, 'holds a "sft" run, not a "train" run'),
    "somebody else's folder": ({"output": "other"}, None, "holds other files and no run"),
    "a file as folder": ({"output": "rewards.py"}, None, "rewards.py is a file"),
    "a file as parent": ({"output": "rewards.py/x"}, None, "rewards.py/x cannot be made"),
    "no checkpoint": ({"resume_from_checkpoint": "model"}, None, '"model" is no checkpoint'),
    # --- sft
    "sft: no column": ({**SFT, "completion_column": "text"}, None, 'The dataset has no column "text" to learn'),
    "sft: empty": (
        {**SFT, "completion_column": "answer"},
        [row(), row(answer="")] * 2,
        'A row has no text in "answer"',
    ),
    "sft: a reward": ({**SFT, "reward": "accuracy"}, None, "--reward has no use"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_exit_code_2_and_nothing_written(case: str, folder: Path):
    changes, bad, sentence = CASES[case]
    if bad is not None:
        jsonl("bad.jsonl", bad)
        changes = {"data": "bad.jsonl", **changes}
    before = tree(folder)
    result = command(**changes)
    assert result.exit_code == 2, (result.output, result.exception)
    assert tree(folder) == before
    *progress, message = result.stderr.strip().splitlines()
    assert re.search(sentence, message), message
    assert "Traceback" not in result.output and message.endswith((".", "?", ")"))
    # Some rows are first looked at in the first step, when the run has said what loaded the model and that it begins.
    assert all(re.fullmatch(r"Backend: .*\.|Flow check: .*\.|(train|sft): \d+ steps?", line) for line in progress), (
        progress
    )


def test_there_are_more_than_fifteen():
    assert len(CASES) > 15


def test_a_corrected_run_starts_after_a_broken_one(folder: Path):
    """The first try leaves nothing behind that would refuse the second one's options."""
    assert command(output="runs/again", reward="rewards.py:boom").exit_code == 2
    result = command(output="runs/again", learning_rate="1e-3")
    assert result.exit_code == 0, result.output
    assert not list(folder.glob("runs/again.old*"))


def test_changed_rows_are_refused(folder: Path):
    jsonl("mine.jsonl", [row(), row(), row(), row()])
    assert command(output="runs/mine", data="mine.jsonl", max_steps="1").exit_code == 0
    Path("runs/mine/result.json").unlink()
    jsonl("mine.jsonl", [row(), row(), row()])
    result = command(output="runs/mine", data="mine.jsonl", max_steps="1")
    assert result.exit_code == 2 and "was started with another content of" in result.stderr


def test_a_failure_after_the_first_step_keeps_the_run(folder: Path):
    Path("late.py").write_text(
        "steps = []\n"
        "def late(completions, completion_ids, **columns):\n"
        "    steps.append(1)\n"
        "    assert len(steps) < 3, 'too late'\n"
        "    return [float(sum(ids) % 7) for ids in completion_ids]\n"
    )
    options = {"output": "runs/late", "reward": "late.py:late", "max_steps": "4", "save_steps": "1"}
    result = command(**options)
    assert result.exit_code == 2 and "too late" in result.stderr
    assert Path("runs/late/config.yaml").is_file() and Path("runs/late/checkpoint-2").is_dir()
    Path("late.py").write_text(Path("late.py").read_text().replace("< 3", "< 99"))
    result = command(**options)
    assert result.exit_code == 0, result.output
    assert "late.py has changed since the run began" in result.stderr
    steps = [json.loads(line)["step"] for line in Path("runs/late/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
