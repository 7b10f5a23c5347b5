"""PPO through the command line: LLaVA-RLHF's questions, killed in a rollout's epochs and continued; transcripts."""

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import judges
import mediafiles
import pytest
import tiny
import yaml
from PIL import Image
from safetensors.torch import load_file
from test_end_to_end import called, jsonl, started
from test_end_to_end_media import without_time
from test_end_to_end_reward_model import killed
from test_ppo_rows import question, transcript

STEPS = 12
RATE = 1e-3
# A rollout is of two mini-batches and two epochs, so of four steps: every checkpoint but the last lies within one.
TRAIN: dict[str, Any] = {
    "num_iterations": 2,
    "steps_per_generation": 2,
    "per_device_train_batch_size": 2,
    "max_completion_length": 5,
    "max_steps": STEPS,
    "save_steps": 3,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "kl_coef": 0.2,
    "kl_target": 6.0,
    "kl_horizon": 40,
    "normalize_scores": True,
    "missing_eos_penalty": 1.0,
    "seed": 3,
}
SERVED = {"rewards": [{"name": "repetition", "kwargs": {"unit": "characters", "ngram": 1}}, {"name": "accuracy"}]}
ANSWERS = {1: "two", 2: "A", 3: "B", 4: "C", 5: "D", 6: "no", 7: "yes"}  # of a question's type; of a general one, its
UPDATE = ("loss", "loss/policy", "loss/value", "approx_kl", "clipfrac", "vf_clipfrac", "entropy", "grad_norm")
ROLLOUT = ("score", "values", "returns", "advantages", "explained_variance", "kl", "kl_coef", "reward")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return judges.base("qwen2_5_vl", tmp_path_factory.mktemp("base") / "model", layers=1)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Questions of every type, with a picture each."""
    monkeypatch.chdir(tmp_path)
    for number in range(8):
        tiny.image(number).save(tmp_path / f"{number}.png")
    rows = [question(n, "two", caption_type=n % 7 + 1, length_bonus=n / 4) for n in range(8)]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    return tmp_path


def written(model: str, rewards: list[Any], **train: Any) -> None:
    config = {
        "algorithm": "ppo",
        "model": model,
        "data": {"train": "questions.json"},
        "lora": {"r": 4, "vision": True},
        "rewards": rewards,
        "train": {**TRAIN, **train},
    }
    Path("ppo.yaml").write_text(yaml.safe_dump(config))


def test_a_yaml_trains_by_ppo(workplace: Path, base: str):  # covers L6, L7, A10
    written(base, ["caption_type", "length_bonus=0.5"], max_steps=2)
    out, _ = called(0, "train", "ppo.yaml", "--output", "run", "--dry-run")
    assert re.search(r"algorithm\s+│ ppo", out) and re.search(r"train.kl_coef\s+│ 0.2", out)
    assert not (workplace / "run").exists()
    out, error = called(0, "train", "ppo.yaml", "--output", "run")
    assert "2 steps in" in out and "Flow check: image reaches the loss" in error
    first, second = jsonl(workplace / "run" / "metrics.jsonl")
    assert set(UPDATE) <= set(first) & set(second) and set(ROLLOUT) <= set(first) - set(second)
    assert (first["kl"], first["kl_coef"], first["values"], first["clipfrac"]) == (
        pytest.approx(0, abs=1e-5),
        0.2,
        0,
        0,
    )
    samples = jsonl(workplace / "run" / "samples.jsonl")
    assert len(samples) == 4 and {sample["step"] for sample in samples} == {1}
    for sample in samples:
        paid = sample["rewards"]["caption_type"] + 0.5 * sample["rewards"]["length_bonus"]
        assert round(paid - sample["score"], 5) in (0.0, 1.0), "less the penalty of a missing end"
        assert {"kl", "value", "advantage"} <= set(sample)
    assert fmean(sample["score"] for sample in samples) == pytest.approx(first["score"])
    card = (workplace / "run" / "README.md").read_text()
    assert "Trained by PPO" in card and "| `kl_coef` | 0.2 |" in card and "| `kl_target` | 6.0 |" in card
    assert "`beta`" not in card and "`scale_rewards`" not in card, "what PPO has no use for"


@pytest.mark.slow
def test_rewards_of_all_kinds_killed_within_a_rollout_and_continued(workplace: Path, base: str):
    # covers A2, A3, A4, A10, L5, L6, L7, L10, Q10
    judges.reward_run(base, workplace / "judge")
    (workplace / "served.yaml").write_text(yaml.safe_dump(SERVED))
    server = started(workplace, "reward", "serve", "served.yaml", "--port", "0")
    try:
        found = re.search(r"http://\S+", server.stdout.readline())
        api = {"name": "api", "kwargs": {"url": found[0], "send_columns": ["completion", "answer"]}}
        written(base, [{"model": "judge"}, "caption_type", "length_bonus=0.1", api])
        out, _ = called(0, "train", "ppo.yaml", "--output", "whole")
        assert f"{STEPS} steps in" in out
        cut, whole = workplace / "cut", workplace / "whole"
        killed(cut, "checkpoint-3", "train", "ppo.yaml")
        _, error = called(0, "train", "ppo.yaml", "--output", "cut")
    finally:
        server.terminate()
        server.communicate(timeout=20)
    begun = re.search(r"Continuing from \S+checkpoint-(\d+)\.", error)
    assert begun and int(begun[1]) % 4, "in the middle of a rollout's epochs"
    _check_the_same(cut, whole)
    _check_logs(whole)
    _check_values(whole, workplace / "judge")
    _check_pages(whole)
    _check_use(workplace)


def _check_the_same(cut: Path, whole: Path) -> None:
    def same(folder: Path) -> list[dict]:
        """What was encoded before the interruption is encoded again after it; nothing else differs."""
        return [{k: v for k, v in r.items() if k != "group/encodes_saved"} for r in without_time(folder)]

    assert same(cut) == same(whole), "the same numbers as if nothing had happened"
    for name in ("samples.jsonl", "adapter_model.safetensors", "value/adapter_model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert (cut / "value" / "head.safetensors").read_bytes() == (whole / "value" / "head.safetensors").read_bytes()


def _check_logs(run: Path) -> None:
    metrics, samples = jsonl(run / "metrics.jsonl"), jsonl(run / "samples.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
    rollouts = [record for record in metrics if "score" in record]
    assert [record["step"] for record in rollouts] == [1, 5, 9]
    assert all(set(UPDATE) <= set(record) for record in metrics)
    assert all(set(ROLLOUT) <= set(record) for record in rollouts)
    assert rollouts[0]["kl"] == pytest.approx(0, abs=1e-5) and rollouts[0]["values"] == 0
    assert rollouts[2]["kl"] != 0 and rollouts[2]["values"] != 0
    # Four completions of a horizon of 40, and the KL is far below its target: by 0.2 * 4 / 40 less each time.
    assert [record["kl_coef"] for record in rollouts] == pytest.approx([0.2, 0.2 * 0.98, 0.2 * 0.98**2])
    assert len(samples) == 12 and {sample["step"] for sample in samples} == {1, 5, 9}
    types = {f"question {n}": n % 7 + 1 for n in range(8)}
    for record in rollouts:
        own = [sample for sample in samples if sample["step"] == record["step"]]
        for name, of_sample in (("score", "score"), ("kl", "kl")):
            assert fmean(sample[of_sample] for sample in own) == pytest.approx(record[name], abs=1e-5), name
    for sample in samples:
        rewards = sample["rewards"]
        assert set(rewards) == {"model", "caption_type", "length_bonus", "api"}
        assert all(isinstance(value, float) for value in rewards.values())
        paid = rewards["model"] + rewards["caption_type"] + 0.1 * rewards["length_bonus"] + rewards["api"]
        assert round(paid - sample["score"], 4) in (0.0, 1.0), "less the penalty of a missing end"
        assert isinstance(sample["value"], float) and isinstance(sample["advantage"], float)
        asked = next(kind for text, kind in types.items() if sample["prompt"].endswith(text))
        assert sample["answer"] == ANSWERS[asked]


def _check_values(run: Path, judge: Path) -> None:
    """The values began as the reward model, by which nothing else was trained."""
    assert json.loads((run / "value" / "adapter_config.json").read_text())["r"] == 2, "the judge's rank"
    assert json.loads((run / "adapter_config.json").read_text())["r"] == 4
    began, values = (load_file(folder / "adapter_model.safetensors") for folder in (judge, run / "value"))
    assert began.keys() == values.keys()
    moved = max(float((began[name] - values[name]).abs().max()) for name in began)
    assert 0 < moved < 1.5 * RATE * STEPS, "from the judge's weights, each about a learning rate a step"
    head = load_file(run / "value" / "head.safetensors")
    assert all(value.any() for value in head.values()), "from zeros"
    last = run / f"checkpoint-{STEPS}"
    assert (last / "value" / "head.safetensors").read_bytes() == (run / "value" / "head.safetensors").read_bytes()
    assert (last / "ref" / "adapter_model.safetensors").is_file() and not (run / "ref").exists()


def _check_pages(run: Path) -> None:
    with Image.open(run / "curves.png") as picture:
        picture.load()
    page = (run / "report.html").read_text()
    for title in ("values and returns (mean over tokens)", "KL to the reference (nats a completion)", "kl_coef"):
        assert title in page
    assert "share of the returns&#39; variance explained" in page and "nats a token)" in page
    assert "KL penalty (kl_coef)" in page and "beta (KL)" not in page and "reward scaling" not in page
    card = (run / "README.md").read_text()
    assert "Trained by PPO" in card and "\n- ppo\n" in card and "judge" in card and "| `kl_coef` | 0.2 |" in card


def _check_use(workplace: Path) -> None:
    """What comes out of a run is a policy like any other."""
    asked = ("--image", "1.png", "--prompt", "question 1", "--max-new-tokens", "4")
    assert called(0, "chat", "whole", *asked)[0].strip()
    called(0, "export", "whole", "--to", "merged_16bit", "--output", "merged")  # which compares the two
    assert called(0, "chat", "merged", *asked)[0].strip() and not (workplace / "merged" / "value").exists()
    # One reward of the run's: the server of another is gone.
    called(0, "eval", "whole", "--data", "questions.json", "--reward", "caption_type")
    figures = json.loads((workplace / "whole" / "eval-questions" / "evaluation.json").read_text())
    assert figures["after"]["rows"] == 8 and "control" in figures


@pytest.mark.slow
def test_the_audio_preset_trains_on_transcripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # covers A7, A8, A9
    monkeypatch.chdir(tmp_path)
    tiny.save("qwen2_audio", tmp_path / "model", layers=1)
    rows = []
    for number, text in enumerate(("one", "two cat", "three dog a", "red")):
        mediafiles.write_wav(tmp_path / f"{number}.wav", mediafiles.sine(16000, 0.2, 200.0 + 150 * number))
        rows.append(transcript(text, f"{number}.wav", language="en"))
    (tmp_path / "speech.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = (
        *("ppo", "--preset", "qwen2-audio-ppo", "--model", "model", "--data", "speech.jsonl", "--output", "run"),
        *("--lora.r", "2", "--per_device_train_batch_size", "2", "--max_completion_length", "4", "--max-steps", "5"),
    )
    out, error = called(0, *command)
    assert "5 steps in" in out and "Flow check: audio reaches the loss" in error
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["algorithm"], config["train"]["num_iterations"], config["train"]["kl_target"]) == ("ppo", 4, 6.0)
    metrics = jsonl(tmp_path / "run" / "metrics.jsonl")
    rollouts = [record for record in metrics if "score" in record]
    assert [record["step"] for record in rollouts] == [1, 5], "four epochs of a rollout"
    # Two completions of a horizon of 10,000, and a KL of 0: 0.2 * (1 - 0.2 * 2 / 10000)
    assert [record["kl_coef"] for record in rollouts] == pytest.approx([0.2, 0.199992], abs=1e-9)
    samples = jsonl(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 4
    assert all(-10 <= sample["rewards"]["asr"] <= 9 for sample in samples)
    assert all(sample["score"] == pytest.approx(sample["rewards"]["asr"]) for sample in samples)
    assert {Path(label).suffix for sample in samples for label in sample["media"]} == {".wav"}
    assert not any("cat" in sample["prompt"] for sample in samples), "the reference is no part of the prompt"
    assert "audio" in called(0, *command[:-2], "--max-steps", "5", "--dry-run")[0]


def refused(*args: str, **config: Any) -> str:
    """What is said of a command, with a config file if it has one."""
    if config:
        Path("given.yaml").write_text(yaml.safe_dump(config))
        args = (args[0], "given.yaml", *args[1:])
    out, error = called(2, *args)
    assert "Traceback" not in error and not Path("run").exists()
    return " ".join((out + error).split())


def test_misuses_are_refused_in_a_sentence(workplace: Path, base: str):
    rest = ("--model", base, "--data", "questions.json", "--output", "run")
    rewarded = (*rest, "--reward", "caption_type")
    said = refused("train", *rewarded, "--kl_coef", "0.1")
    assert "train.kl_coef is an option of PPO. Give algorithm: ppo with it, or leave it out." in said
    said = refused("sft", *rest, "--kl_coef", "0.1")
    assert "train.kl_coef is an option of ppo, and sft has no use for it. Leave it out." in said
    assert "algorithm: input should be 'grpo' or 'ppo' (given 'pppo')" in refused("train", *rewarded, algorithm="pppo")
    assert "algorithm=ppo has no use, since only train has several. Leave it out." in refused(
        "sft", *rest, algorithm="ppo"
    )
    for command in (("ppo", *rewarded), ("train", *rewarded, "--algorithm", "ppo")):
        said = refused(*command, "--beta", "0.1")
        assert "beta=0.1: that is the KL in GRPO's loss. PPO's is in the rewards: give kl_coef" in said
    assert 'Did you mean "kl_coef"?' in refused("ppo", *rewarded, "--kl_cof", "0.1")
    for other in (("--algorithm", "grpo"), ("--set", "algorithm=grpo")):
        said = refused("ppo", *rewarded, *other)
        assert "ppo: algorithm=grpo contradicts the command. Use train, or leave it out." in said
