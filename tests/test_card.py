"""The card of a run folder: what it was trained on, how, with what result; nothing of this machine, and no claim."""

import json

import pytest
import tiny

from vlm_grpo import RunConfig, run
from vlm_grpo.card import CARD, held_out, rewards_line, write_run_card


def folder_of(path, **files):
    path.mkdir(exist_ok=True)
    for name, value in files.items():
        text = "".join(json.dumps(line) + "\n" for line in value) if isinstance(value, list) else json.dumps(value)
        (path / name.replace("__", ".")).write_text(text)
    return path


def config(tmp_path, **options) -> RunConfig:
    for name in ("train.jsonl", "held-out.jsonl", "judge.py"):
        (tmp_path / name).write_text("")
    values = {
        "model": "Qwen/Qwen2.5-VL-3B-Instruct",
        "lora": {"r": 8},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "held-out.jsonl")},
        "rewards": ["accuracy", {"name": f"{tmp_path / 'judge.py'}:fair", "weight": 0.5}],
        "media": {"max_pixels": 50176, "on_bad": "drop"},
        "train": {"seed": 7, "learning_rate": 1e-5, "num_generations": 4, "beta": 0.04, "logging_steps": 1},
        "output": str(tmp_path / "birds"),
    }
    return RunConfig.model_validate({**values, **options})


def state(accuracy: float, low: float, high: float, fair: float | None) -> dict:
    return {"accuracy": accuracy, "ci95": [low, high], "rows": 450, "rewards": {"accuracy": accuracy, "fair": fair}}


EVALUATION = {
    "before": state(0.6889, 0.6446, 0.7299, 0.25),
    "after": state(0.9778, 0.9596, 0.9879, 0.75),
    "control": state(0.1, 0.0756, 0.1312, None),
    "change": {"difference": 0.2889, "ci95": [0.2467, 0.3311], "p": 8.6e-35, "rows": 449},
}


# covers O9
def test_the_card_tells_data_rewards_options_results_and_versions(tmp_path):
    setup = config(tmp_path)
    rewards = [{"step": n, "reward": 0.25 if n <= 10 else 0.875} for n in range(1, 31)]
    left = {str(tmp_path / "train.jsonl"): 3, "too long": 2}
    result = {"steps": 30, "seconds": 255.6, "stopped": "time limit", "left_out": left}
    files = {"result__json": result, "evaluation__json": EVALUATION, "metrics__jsonl": rewards}
    folder = folder_of(tmp_path / "birds", adapter_config__json={}, **files)
    (folder / CARD).write_text(f"license: of another library, base_model: {tmp_path}")
    write_run_card(folder, setup, "train", 1247, 450)
    card = (folder / CARD).read_text()
    assert card.startswith(
        "---\nlibrary_name: peft\nbase_model: Qwen/Qwen2.5-VL-3B-Instruct\ntags:\n- vlm-grpo\n- grpo\n- lora\n---\n"
    )
    for expected in (
        "# birds, from Qwen/Qwen2.5-VL-3B-Instruct",
        "- training: train.jsonl (1247 rows, 3 more left out for their media)",
        "- held out: held-out.jsonl (450 rows)",
        "- left out when their turn came: 2 times (too long)",
        "- media: max_pixels 50176",
        "| accuracy | 1 |",
        "| judge.py:fair | 0.5 |",
        "- algorithm: GRPO (",
        "rank 8)",
        "- steps: 30, in 4:15 (stopped: time limit)",
        "- mean reward: 0.25 in the first 10 logs, 0.875 in the last 10",
        "| `seed` | 7 |",
        "| `learning_rate` | 1e-05 |",
        "| before training | 68.9% | 64.5% to 73.0% | 450 | 0.689 | 0.25 |",
        "| after training | 97.8% | 96.0% to 98.8% | 450 | 0.978 | 0.75 |",
        "| after training, media blanked | 10.0% | 7.6% to 13.1% | 450 | 0.1 |  |",
        "Change by training: +28.9 points (95% interval +24.7 to +33.1, p = 8.6e-35, 449 rows).",
        "- trl 1.15",
        'load_model("birds")',
        "`vlm-grpo chat birds`",
        "an adapter over Qwen/Qwen2.5-VL-3B-Instruct",
    ):
        assert expected in card, expected
    assert "logging_steps" not in card, "no plumbing"
    assert "licen" not in card and str(tmp_path) not in card, "no claim, and no folder of this machine"


def test_a_local_base_and_a_whole_model_without_held_out_rows(tmp_path):
    (tmp_path / "warm").mkdir()
    data = {"train": str(tmp_path / "train.jsonl")}
    setup = config(tmp_path, model=str(tmp_path / "warm"), lora=None, data=data, rewards=[])
    folder = folder_of(tmp_path / "birds", result__json={"steps": 5, "seconds": 9.0, "stopped": None})
    write_run_card(folder, setup, "sft", 12, 0)
    card = (folder / CARD).read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- vlm-grpo\n- sft\n---\n")
    assert "# birds, from warm" in card and "supervised fine-tuning (all weights)" in card
    assert "Held-out" not in card and "## Rewards" not in card and "adapter" not in card and str(tmp_path) not in card


def test_figures_of_an_older_run_have_no_rewards_and_no_change():
    found = {"before": {"accuracy": 0.5, "ci95": [0.4, 0.6], "rows": 10}}
    assert held_out(found)[1].splitlines()[-1] == "| before training | 50.0% | 40.0% to 60.0% | 10 |"
    assert held_out({}) == []
    nothing = {"accuracy": 0.0, "ci95": [0.0, 1.0], "rows": 3, "unscored": 3}
    change = {"difference": 0.0, "ci95": [-1.0, 1.0], "p": 1.0, "rows": 0}
    assert (
        held_out({"after": nothing, "change": change})[1].splitlines()[-1] == "| after training | no verdicts |  | 3 |"
    )


JUDGED = {"margin": 1.25, "mean_reward": -0.5, "length_correlation": 0.75, "longer_wins": 0.4, "rows": 40}


# covers L3 O9
def test_the_card_of_a_reward_model_says_what_it_judges_and_how_it_is_asked(tmp_path):
    held_out_pairs = {
        "before": {"accuracy": 0.5, "ci95": [0.35, 0.65], **JUDGED, "length_correlation": None},
        "after": {"accuracy": 0.95, "ci95": [0.84, 0.99], **JUDGED},
        "control": {"accuracy": 0.5, "ci95": [0.35, 0.65], "kind": "blank", **JUDGED},
        "change": {"difference": 0.45, "ci95": [0.3, 0.6], "p": 1e-4, "rows": 40},
    }
    about = {"version": 1, "base_model": str(tmp_path / "base"), "stem": "Score:", "captions": True}
    result = {"steps": 30, "seconds": 255.6, "stopped": None}
    files = {"result__json": result, "evaluation__json": held_out_pairs, "reward_model__json": about}
    folder = folder_of(tmp_path / "bird-judge", adapter_config__json={}, **files)
    (folder / "judge_prompt.jinja").write_text(
        "Judge it.\n```\n{% for caption in captions %}- {{ caption }}{% endfor %}\n"
    )
    write_run_card(folder, config(tmp_path, rewards=[]), "reward-train", 900, 40)
    card = (folder / CARD).read_text()
    assert "tags:\n- vlm-grpo\n- reward-model\n- lora\n---" in card
    for expected in (
        "# bird-judge, from Qwen/Qwen2.5-VL-3B-Instruct",
        "Trained by pairwise reward modelling",
        "the judge prompt below, with captions of the media, which a policy never sees, and gives one number",
        "- training: train.jsonl (900 pairs)",
        "- held out: held-out.jsonl (40 pairs)",
        "| before training | 50.0% | 35.0% to 65.0% | 40 | 1.25 | -0.5 |  |",
        "| after training | 95.0% | 84.0% to 99.0% | 40 | 1.25 | -0.5 | 0.75 |",
        "| after training, media blanked | 50.0% | 35.0% to 65.0% | 40 |",
        "Change by training: +45.0 points (95% interval +30.0 to +60.0, p = 0.0001, 40 pairs).",
        "- It looks at the media: 50.0% (35.0–65.0%) right with the media blanked",
        "- It likes long responses: score and length correlate by +0.75. In these pairs the longer response is the "
        "chosen one in 40%.",
        "\n````jinja\nJudge it.\n```\n{% for caption in captions %}- {{ caption }}{% endfor %}\n````\n",
        "The judge's turn begins with: `Score:`",
        "rewards: [{model: bird-judge}]",
        'judge = JudgeReward("bird-judge")',
        "an adapter and a head over Qwen/Qwen2.5-VL-3B-Instruct",
    ):
        assert expected in card, expected
    assert "load_model" not in card and "## Rewards" not in card and str(tmp_path) not in card and "licen" not in card


def test_the_card_of_a_reward_model_without_held_out_pairs_or_captions_claims_neither(tmp_path):
    folder = folder_of(tmp_path / "bird-judge", reward_model__json={"captions": False})
    write_run_card(folder, config(tmp_path, rewards=[]), "reward-train", None, 0)
    card = (folder / CARD).read_text()
    assert "captions" not in card and "Held-out" not in card and "## Judge prompt" not in card
    assert "train.jsonl (a stream)" in card


def test_a_judge_is_named_and_what_has_weight_0_is_no_reward(tmp_path):
    asked = {"name": "model", "kwargs": {"model": str(tmp_path / "bird-judge")}}
    setup = config(tmp_path, rewards=[asked, {"name": "accuracy", "weight": 0.0}])
    scores = {"accuracy": 0.5, "ci95": [0.4, 0.6], "rows": 9, "rewards": {"model": 1.5, "accuracy": 0.5}}
    folder = folder_of(tmp_path / "birds", evaluation__json={"after": scores})
    write_run_card(folder, setup, "train", 12, 9)
    card = (folder / CARD).read_text()
    assert "| model (bird-judge) | 1 |" in card and "| accuracy | 0 (only watched) |" in card
    assert "| rows | reward model | watched accuracy |" in card and str(tmp_path) not in card
    assert rewards_line(setup) == "- rewards: model (bird-judge) x 1; only watched: accuracy"


@pytest.mark.slow
def test_a_run_leaves_its_own_card(tmp_path):
    """Not the one that PEFT or TRL write, which names the base model's folder and claims a licence."""
    lines = [json.dumps({"prompt": tiny.prompt(f"count {word}", images=0), "answer": "red"}) for word in tiny.WORDS[:6]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "own.py").write_text(
        "def pattern(completions, completion_ids, **columns):\n    return [sum(ids) % 7 / 7 for ids in completion_ids]"
    )
    options = {
        "model": tiny.save("qwen2_5_vl", tmp_path / "model"),
        "lora": {"r": 4, "alpha": 8},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "rewards": [f"{tmp_path / 'own.py'}:pattern"],
        "output": str(tmp_path / "run"),
        "train": {"max_steps": 2, "save_steps": 1, "num_generations": 2, "per_device_train_batch_size": 4},
    }
    options["train"] |= {"max_completion_length": 4, "flow_check": False}
    run.train(RunConfig.model_validate(options))
    card = (tmp_path / "run" / CARD).read_text()
    assert card.startswith("---\nlibrary_name: peft\ntags:\n- vlm-grpo\n") and "own.py:pattern | 1" in card
    assert "# run, from model" in card and "(6 rows)" in card and "- steps: 2, in" in card
    assert str(tmp_path) not in card and "licen" not in card
