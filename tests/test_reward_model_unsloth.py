"""The real Unsloth trains a reward model, and a policy that is judged on one base: what transformers says of both."""

import math

import judges
import pytest
import tiny
from real_unsloth import REPLACE_TRL, run_cli, run_script
from test_reward_train import JUDGE, PAIRS, jsonl, preferences

from vlm_grpo.rewards.judge import JudgeReward

STEPS = 4
OPTIONS = (
    *("--backend", "unsloth", "--dtype", "float32", "--max_seq_length", "512", "--vision", "lora", "--lora.r", "4"),
    *("--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant"),
    *("--max-steps", "12", "--judge.prompt", "judge.jinja", "--judge.stem", "answer"),
)
GRPO = (
    REPLACE_TRL
    + """
import json
import os

import tiny
import torch
from datasets import Dataset
from test_adapters import flags
from test_rewards_judge import Written

import recorder
from vlm_grpo import load_model
from vlm_grpo.models.adapters import parameters_by_role
from vlm_grpo.models.modes import _FLAGS
from vlm_grpo.rewards.judge import JudgeReward
from vlm_grpo.rewards import standing

def never(*args, **kwargs):
    raise AssertionError("the base is there already")

standing.load_model = never
rows = [{"prompt": tiny.prompt("what color is this"), "images": [f"train-{n}.png"]} for n in range(4)]

def others(model):
    return {n: v.detach().clone() for n, v in model.state_dict().items() if ".default." not in n}

def state(model):
    modules = {n: {f: id(vars(m).get(f)) for f in _FLAGS} for n, m in model.named_modules()}
    environment = {n: v for n, v in os.environ.items() if n.startswith("UNSLOTH_")}
    return modules, flags(model), model.active_adapters, torch.get_rng_state().tolist(), environment

found = {}
for kind in (True, "unsloth"):
    model, processor = load_model(
        "warm", backend="unsloth", dtype="float32", max_seq_length=512, gradient_checkpointing=kind
    )
    judge = JudgeReward("run", name="judge")
    options = {"max_steps": STEPS, "beta": 0.1, "gradient_checkpointing": kind, "learning_rate": 1e-2}
    args = recorder.config(f"out-{kind}", flow_check=True, **options)
    data = Dataset.from_list(rows)
    trainer = Written(model, [judge], args, data, None, processor)
    assert judge.on_policy and set(model.peft_config) == {"default", "ref", "reward"}
    before = others(model)
    policy = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    after = others(model)
    os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] = "1"  # as Unsloth's own trainer leaves it
    model.train()
    standing_as = state(model)
    row = trainer.called[-1][0][0].original
    completion = trainer.called[-1][1][0]
    again = judge([row["prompt"]], [completion], images=[row["images"]])
    left_alone = state(model) == standing_as
    del os.environ["UNSLOTH_RETURN_HIDDEN_STATES"]
    calls = [
        {"image": row.original["images"][0], "text": text[0]["content"], "score": score}
        for inputs, texts, scores in trainer.called
        for row, text, score in zip(inputs, texts, scores, strict=True)
    ]
    logs = [log for log in trainer.state.log_history if "kl" in log]
    found[str(kind)] = {
        "moved": [n for n, v in before.items() if not v.equal(after[n])],
        "still": [n for n, v in policy.items() if v.equal(model.get_parameter(n))],
        "trained": sorted({n.split(".")[-2] for n in policy}),
        "flags": {n for n, p in model.named_parameters() if p.requires_grad} == policy.keys(),
        "left_alone": left_alone,
        "again": [again, trainer.called[-1][2][0]],
        "calls": calls,
        "kl": [log["kl"] for log in logs],
        "counts": parameters_by_role(model),
    }
print(json.dumps(found))
"""
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A base, pairs over it and a reward model that Unsloth has trained on them, and a policy that was trained."""
    folder = tmp_path_factory.mktemp("unsloth")
    base = tiny.save("qwen2_5_vl", folder / "model", layers=1)
    for name, count in (("train", 8), ("eval", 4)):
        preferences(folder, name, count, {})
    (folder / "judge.jinja").write_text(JUDGE)
    policy, processor = judges.policy(base, vision=True)
    policy.save_pretrained(folder / "warm")
    processor.save_pretrained(folder / "warm")
    done = run_cli(["reward", "train", *PAIRS, *OPTIONS, "--gradient_checkpointing", "unsloth"], folder)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return folder


def scored(folder, images, texts, asked="what color is this"):
    """By plain transformers, in this process."""
    judge = JudgeReward(folder / "run")
    prompts = [tiny.prompt(asked) for _ in images]
    return judge(prompts, texts, images=[[str(folder / image)] for image in images])


@pytest.mark.slow
def test_unsloth_trains_a_reward_model_that_transformers_reads(workplace):  # covers A3 L1 L3
    run = workplace / "run"
    losses = [record["loss"] for record in jsonl(run / "metrics.jsonl")]
    assert len(losses) == 12 and losses[-1] < 0.5 * losses[0] and all(map(math.isfinite, losses))
    files = {path.name for path in run.iterdir()}
    assert {"adapter_model.safetensors", "head.safetensors", "judge_prompt.jinja", "reward_model.json"} <= files
    assert {"README.md", "report.html", "result.json"} <= files and "config.json" not in files
    after = [row for row in jsonl(run / "evaluation.jsonl") if row["state"] == "after"]
    images = [f"eval-{row['row'] - 1}.png" for row in after]
    for name in ("chosen", "rejected"):
        expected = scored(workplace, images, [row[name] for row in after], "\nwhat color is this")
        assert [row[f"{name}_score"] for row in after] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_judge_on_the_base_of_an_unsloth_policy(workplace):  # covers A3 L5 O3 O4, hold 2
    found = run_script(f"STEPS = {STEPS}\n" + GRPO, workplace, OMP_NUM_THREADS="1")
    assert len(found) == 2
    base = sum(p.numel() for p in tiny.build("qwen2_5_vl", layers=1)[0].parameters())
    for kind, seen in found.items():
        assert seen["moved"] == [] and seen["flags"] and seen["left_alone"], kind
        assert seen["trained"] == ["default"] and not [n for n in seen["still"] if "lora_B" in n], kind
        assert seen["counts"]["base"] == base and seen["counts"]["ref"] == seen["counts"]["default"] > 0
        assert seen["kl"][0] == pytest.approx(0, abs=1e-6) and seen["kl"][-1] > 1e-6
        calls = seen["calls"]
        assert len(calls) >= 8 * STEPS / 2 and len({round(call["score"], 3) for call in calls}) > 4
        expected = scored(workplace, [call["image"] for call in calls], [call["text"] for call in calls])
        assert [call["score"] for call in calls] == pytest.approx(expected, abs=1e-4), kind
        again, first = seen["again"]
        assert again == pytest.approx([first], abs=1e-4)
