"""``vlm-grpo eval``, and what a run evaluates itself: one tiny run, trained once, measured in every way."""

import gc
import json
import logging
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file
from typer.testing import CliRunner

from vlm_grpo import RunConfig, evaluating, load_data, run
from vlm_grpo.cli import app
from vlm_grpo.errors import ConfigError, MediaError, RewardError
from vlm_grpo.evaluating import evaluate_run, job
from vlm_grpo.evaluating.plan import Plan, Request

REWARDS = """
import random

import numpy as np
import torch

def odd(completion_ids, **columns):
    return [float(sum(ids) % 2) for ids in completion_ids]

def noisy(completion_ids, **columns):
    return [random.random() + float(np.random.rand()) + float(torch.rand(1)) for _ in completion_ids]

async def spread(completion_ids, **columns):
    return [len(set(ids)) / 8 for ids in completion_ids]
"""
ROWS = 8


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, eight rows with pictures and two without, rewards, and a finished run that was evaluated."""
    folder = tmp_path_factory.mktemp("place")
    tiny.save("qwen2_5_vl", folder / "model", layers=1)
    lines = []
    for i in range(ROWS):
        names = [f"{i}.png"] if i % 4 else []
        for name in names:
            tiny.image(i, (56, 56)).save(folder / name)
        row = {"prompt": tiny.prompt(f"count {i}", len(names)), "answer": "no" if i % 2 else "yes", "kind": "ab"[i % 2]}
        lines.append(json.dumps(row | ({"images": names} if names else {})) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "rewards.py").write_text(REWARDS)
    run.train(config(folder))
    return folder


def config(folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": str(folder / "model"),
            "lora": {"r": 4, "alpha": 64},
            "data": {"train": str(folder / "rows.jsonl"), "eval": str(folder / "rows.jsonl")},
            "rewards": [f"{folder / 'rewards.py'}:odd", {"name": f"{folder / 'rewards.py'}:spread", "weight": 0.5}],
            "output": str(folder / "run"),
            "train": {
                "max_steps": 1,
                "num_generations": 2,
                "num_generations_eval": 1,
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 8,
                "max_completion_length": 6,
                "learning_rate": 0.1,
                "eval_strategy": "steps",
                "eval_steps": 1,
                "flow_check": False,
                "gradient_check": False,
                "save_steps": 1,
            },
        }
    )


@pytest.fixture
def own(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same run, in a folder that a test may write to."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(place / "run", tmp_path / "run"))


# ---- in training -----------------------------------------------------------------------------------------------------


def test_a_run_measures_before_and_after_by_every_reward(place: Path):  # covers O8, L9
    found = json.loads((place / "run" / "evaluation.json").read_text())
    assert set(found) == {"before", "after", "control", "change"}
    rows = written(place / "run" / "evaluation.jsonl")
    for state in ("before", "after", "control"):
        of = [row for row in rows if row["state"] == state]
        assert [row["row"] for row in of] == list(range(1, ROWS + 1)) and found[state]["rows"] == ROWS
        odd, spread = ([row["rewards"][name] for row in of] for name in ("odd", "spread"))
        assert found[state]["rewards"] == pytest.approx({"odd": sum(odd) / ROWS, "spread": sum(spread) / ROWS})
        assert found[state]["reward"] == pytest.approx((sum(odd) + 0.5 * sum(spread)) / ROWS)
        assert found[state]["accuracy"] == sum(odd) / ROWS == sum(row["correct"] for row in of) / ROWS
        assert found[state]["yes_no"]["yes_ratio"] > 0 and found[state]["uar"] == 0.5, "a model that knows no 'no'"
    assert found["control"]["kind"] == "blank" and found["control"]["change"]["rows"] == ROWS
    change = found["change"]
    assert change["difference"] == pytest.approx(found["after"]["accuracy"] - found["before"]["accuracy"])
    assert change["rows"] == ROWS and change["ci95"][0] <= change["difference"] <= change["ci95"][1]
    assert rows[1]["prompt"] == f"[{place / '1.png'}] count 1" and rows[1]["media"] == [str(place / "1.png")]
    result = json.loads((place / "run" / "result.json").read_text())
    assert result["evaluation"] == found


def test_trls_evaluation_reports_each_reward(place: Path):  # covers Q8
    logs = [record for record in written(place / "run" / "metrics.jsonl") if "eval_loss" in record]
    assert len(logs) == 1 and {"eval_rewards/odd/mean", "eval_rewards/spread/mean", "eval_reward"} <= set(logs[0])
    parts = logs[0]["eval_rewards/odd/mean"] + 0.5 * logs[0]["eval_rewards/spread/mean"]
    assert logs[0]["eval_reward"] == pytest.approx(parts)
    steps = [record for record in written(place / "run" / "metrics.jsonl") if "reward" in record]
    assert {"loss", "rewards/odd/mean", "rewards/spread/mean", "reward", "entropy"} <= set(steps[0])


def test_rewards_that_draw_at_random_train_the_same_with_and_without_evaluation(place: Path, tmp_path: Path):
    """Between training's random numbers no evaluation takes any: neither the held-out rows' nor TRL's own."""

    def trained(output: str, **less: Any) -> dict[str, Any]:
        asked = config(place).model_dump() | {"output": str(tmp_path / output)}
        asked["rewards"] = [f"{place / 'rewards.py'}:noisy"]
        asked["train"] = {**asked["train"], "max_steps": 2, "save_steps": 9, "max_completion_length": 3, **less}
        asked["data"]["eval"] = None if less else asked["data"]["eval"]
        run.train(RunConfig.model_validate(asked))
        return load_file(tmp_path / output / "adapter_model.safetensors")

    without, evaluated = trained("without", eval_strategy="no", eval_steps=None), trained("evaluated")
    assert without.keys() == evaluated.keys()
    assert all(bool((without[name] == evaluated[name]).all()) for name in without)


def test_a_warm_start_on_texts_shows_itself_to_rewards_and_has_no_media_to_blank(place: Path, tmp_path: Path):
    row = {"prompt": tiny.prompt("count 1", 0), "completion": "one", "answer": "one"}
    (tmp_path / "texts.jsonl").write_text(4 * (json.dumps(row) + "\n"))
    asked = config(place).model_dump() | {"output": str(tmp_path / "sft"), "rewards": ["overlong"]}
    asked["data"] |= {"train": str(tmp_path / "texts.jsonl"), "eval": str(tmp_path / "texts.jsonl")}
    asked["train"] = {"max_steps": 1, "gradient_check": False}
    found = run.sft(RunConfig.model_validate(asked)).evaluation
    assert list(found) == ["before", "after", "change"] and -1 <= found["before"]["rewards"]["overlong"] <= 0
    assert "## Rewards" not in (tmp_path / "sft" / "README.md").read_text(), "they took no part in the training"


def test_a_run_killed_before_its_last_figures_keeps_those_of_the_beginning(place: Path, own: Path):
    """Killed between its last checkpoint and its results. What it knew of the beginning is made recognisable here."""
    found = json.loads((own / "evaluation.json").read_text())
    rows = [row for row in written(own / "evaluation.jsonl") if row["state"] == "before"]
    known = {**found["before"], "accuracy": 1.0}
    marked = "".join(json.dumps({**row, "correct": True}) + "\n" for row in rows)
    (own / "evaluation.jsonl").write_text(marked)
    (own / "evaluation.json").write_text(json.dumps({"before": known}))
    (own / "result.json").unlink()
    (own / "README.md").unlink(missing_ok=True)
    result = run.train(config(place).model_copy(update={"output": str(own)}))
    assert result.evaluation["before"] == known and result.evaluation["after"] == found["after"]
    assert result.evaluation["change"]["difference"] == pytest.approx(found["after"]["accuracy"] - 1)
    assert [row for row in written(own / "evaluation.jsonl") if row["state"] == "before"] == written_text(marked)


def written_text(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_finds_what_the_run_found_and_more(place: Path, own: Path):
    """The base is the run's beginning, since its adapter began as nothing."""
    args = ["eval", str(own), "--baseline", "base", "--samples", "2", "--control", "blank", "--control", "shuffle"]
    result = CliRunner().invoke(app, [*args, "--by", "kind", "--save-rows", "rated.jsonl", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    folder = Path(printed.pop("folder"))
    assert folder == own / "eval-rows" and json.loads((folder / "evaluation.json").read_text()) == printed
    trained = json.loads((place / "run" / "evaluation.json").read_text())
    for state in ("before", "after", "control"):
        assert {key: printed[state][key] for key in trained[state]} == trained[state]
    assert printed["change"] == trained["change"]
    assert printed["control:shuffle"]["kind"] == "shuffle" and "pass@k" not in printed["control:shuffle"]
    assert {value: part["rows"] for value, part in printed["after"]["by"]["kind"].items()} == {"a": 4, "b": 4}

    rows = [row for row in written(folder / "evaluation.jsonl") if row["state"] == "after"]
    right = [[drawn["correct"] for drawn in row["drawn"]] for row in rows]
    assert all(len(verdicts) == 2 for verdicts in right)
    one, two = (sum(map(of, right)) / ROWS for of in (lambda pair: sum(pair) / 2, any))
    assert printed["after"]["pass@k"] == pytest.approx({"1": one, "2": two})
    rated = load_data("rated.jsonl")
    assert rated["pass_rate"] == [sum(pair) / 2 for pair in right] and rated["kind"] == list("abababab")
    assert rated[1]["images"] == [str(place / "1.png")]


def test_the_command_shows_a_table(own: Path):
    result = CliRunner().invoke(app, ["eval", str(own), "--control", "none", "--limit", "2", "--output", "figures"])
    assert result.exit_code == 0, result.output
    assert "Held-out rows, greedy answers" in result.stdout and "reward spread" in result.stdout
    assert "control" not in result.stdout and str(Path("figures").resolve()) in result.stdout.replace("\n", "")
    assert set(json.loads(Path("figures/evaluation.json").read_text())) == {"after", "settings"}


def test_two_models_are_never_in_memory_at_once(
    place: Path, own: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """And what one of them cannot use counts for neither."""
    caplog.set_level(logging.ERROR, "vlm_grpo")  # pytest keeps log records, and with them exceptions and their frames
    broken = place / "with-broken.jsonl"
    bad = {"prompt": tiny.prompt("count", 1), "images": ["broken.png"], "answer": "yes"}
    (place / "broken.png").write_bytes(b"junk")
    broken.write_text("".join([json.dumps(bad) + "\n", *(place / "rows.jsonl").read_text().splitlines(True)[:3]]))
    with pytest.raises(MediaError, match=r'row 1: the image ".*broken.png".*--on-bad-media drop'):
        evaluate_run(str(own), str(broken))

    loaded: list[Any] = []

    def load(name: str, **how: Any) -> Any:
        gc.collect()
        assert all(model() is None for model in loaded), "the first one is still there"
        model, processor = real(name, **how)
        loaded.append(weakref.ref(model))
        return model, processor

    real = job.load_model
    monkeypatch.setattr(job, "load_model", load)
    options = {"baseline": str(place / "model"), "on_bad_media": "drop", "controls": (), "output": "figures"}
    found = evaluate_run(str(own), str(broken), **options)
    assert len(loaded) == 2 and found.titles == {"before": "before: model", "after": "after: run"}
    for state in ("before", "after"):
        assert found.evaluation[state]["rows"] == 3 and found.evaluation[state]["left_out"] == 1
    assert found.evaluation["change"]["rows"] == 3
    assert [row["row"] for row in written(found.folder / "evaluation.jsonl")] == [2, 3, 4, 2, 3, 4]


def test_a_model_is_measured_by_the_rewards_given(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    rows = str(place / "rows.jsonl")
    given = (f"{place / 'rewards.py'}:spread", f"{place / 'rewards.py'}:odd=2")
    found = evaluate_run(str(place / "model"), rows, rewards=given, correct="odd", limit=3, max_new_tokens=2)
    figures = found.evaluation["after"]
    assert figures["accuracy"] == figures["rewards"]["odd"] and figures["rows"] == 3
    assert figures["reward"] == pytest.approx(figures["rewards"]["spread"] + 2 * figures["rewards"]["odd"])
    assert found.folder == tmp_path / "runs" / "eval-model-rows"
    assert Plan(Request(str(place / "model"), rows, rewards=("accuracy",))).folder.name == "eval-model-rows-2"


def test_rows_of_text_have_no_control(place: Path, tmp_path: Path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "count", "answer": "1"}) + "\n")
    request = Request(str(place / "run"), str(tmp_path / "text.jsonl"), controls=("blank",))
    assert Plan(request).controls == ()


@pytest.mark.parametrize(
    ("run_name", "options", "error", "message"),
    [
        ("model", {}, ConfigError, "eval: no reward. .*model is no run .* Give --reward accuracy"),
        ("model", {"rewards": ("acuracy",)}, RewardError, 'no reward "acuracy". Did you mean "accuracy"'),
        ("run", {"correct": "od"}, ConfigError, 'no reward "od". Did you mean "odd"'),
        ("run", {"samples": -1}, ConfigError, "samples=-1 needs 0 or more"),
        ("run", {"temperature": 0.0, "samples": 2}, ConfigError, "temperature=0.0 needs more than 0"),
        ("run", {"temperature": 0.5}, ConfigError, "a temperature is of drawn answers, and none are"),
        ("model", {"baseline": "base", "rewards": ("accuracy",)}, ConfigError, "has no adapter that could be switched"),
        ("run", {"baseline": "./nowhere"}, ConfigError, 'baseline: the folder "./nowhere" does not exist'),
        ("run", {"baseline": "nowhere/"}, ConfigError, 'baseline: the folder "nowhere/" does not exist'),
        ("run", {"by": ("images",)}, ConfigError, 'by: "images" holds media'),
        ("nowhere", {}, ConfigError, 'eval: the folder ".*nowhere" does not exist'),
        (".", {}, ConfigError, "holds neither config.json nor adapter_config.json"),
        ("run", {"by": ("knd",)}, ConfigError, 'has no column "knd". Did you mean "kind"'),
        ("run", {"controls": ("blnk",)}, ConfigError, '"blnk" is not known. Did you mean "blank".*, or none'),
        ("run", {"save_rows": "out.csv"}, ConfigError, "neither .jsonl nor .parquet"),
        ("run", {"save_rows": "no/out.jsonl"}, ConfigError, 'the folder "no" does not exist'),
        ("run", {"output": "run"}, ConfigError, "run holds an evaluation"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch, run_name: str, options: dict[str, Any], error: type, message: str
):
    monkeypatch.chdir(place)
    monkeypatch.setattr(job, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(error, match=message):
        evaluate_run(str(place / run_name), str(place / "rows.jsonl"), **options)


def test_a_command_line_that_cannot_work(place: Path):
    def refused(*args: str) -> str:
        result = CliRunner().invoke(app, ["eval", *args])
        assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.output
        return result.stderr

    assert "greater than or equal to 1" in refused(str(place / "run"), "--samples", "0")
    assert "give --data FILE" in refused(str(place / "model"), "--reward", "accuracy")


def test_the_public_names():
    assert set(evaluating.__all__) == {"Report", "Request", "evaluate_run"}
