"""``vlm-grpo reward train``: one run on a LLaVA-Human-Preference-shaped file, its figures, and what is refused."""

import io
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from vlm_grpo.cli import app
from vlm_grpo.config import load_config, require
from vlm_grpo.errors import ConfigError, DataFormatError
from vlm_grpo.gathering import RunRows
from vlm_grpo.pairwise import (
    HeldOutPairs,
    JudgedPair,
    PairEvaluation,
    figures,
    longer_wins,
    page,
    pair_change,
    sentences,
)
from vlm_grpo.rewarding import make_pairs, read_judging, with_adapter

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30)}
JUDGE = "which is {{ response }} ?{% for caption in captions %} {{ caption }}{% endfor %}"


def preferences(folder: Path, name: str, count: int, captions: dict[str, list[str]]) -> None:
    """Rows as LLaVA-Human-Preference has them: a picture, a conversation whose last turn is judged, two outputs."""
    draw = random.Random(name)
    rows = []
    for number in range(count):
        right, wrong = draw.sample(list(COLOURS), 2)
        file = f"{name}-{number}.png"
        Image.new("RGB", (56, 56), tuple(draw.randint(-20, 20) + v for v in COLOURS[right])).save(folder / file)
        captions[file] = [f"{right} cat", f"{right} {right}"]
        preferred = draw.choice([1, 2])
        outputs = [right, wrong] if preferred == 1 else [wrong, right]
        asked = {"from": "human", "value": "<image>\nwhat color is this"}
        row: dict[str, Any] = {"id": number, "image": file, "conversations": [asked, {"from": "gpt", "value": "two"}]}
        row |= {f"output_{n}": {"from": "gpt", "value": text} for n, text in enumerate(outputs, 1)}
        rows.append({**row, "preference": preferred})
    (folder / f"{name}.json").write_text(json.dumps(rows))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a user has: a model, pairs with pictures, captions, a judge's prompt."""
    monkeypatch.chdir(tmp_path)
    tiny.save("qwen2_5_vl", tmp_path / "model", layers=1)
    captions: dict[str, list[str]] = {}
    preferences(tmp_path, "train", 8, captions)
    preferences(tmp_path, "eval", 4, captions)
    (tmp_path / "image_to_caption.json").write_text(json.dumps(captions))
    (tmp_path / "judge.jinja").write_text(JUDGE)
    return tmp_path


def called(status: int, *args: str) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


PAIRS = ("--model", "model", "--data", "train.json", "--eval-data", "eval.json", "--output", "run")
JUDGED = ("--judge.captions", "image_to_caption.json", "--judge.prompt", "judge.jinja", "--judge.stem", "answer")
STEPS = ("--max-steps", "2", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2")


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_from_a_preference_file_to_a_reward_model(workplace):
    # covers L1, L2, L3, A3
    said = called(0, "reward", "train", *PAIRS, *JUDGED, *STEPS)
    run = workplace / "run"
    assert "training one with the defaults (rank 16, alpha 16" in said
    assert "Held-out pairs" in said and "With its media blanked, the captions kept, the accuracy is" in said
    assert "2 steps in" in said and f"rewards: [{{model: {run}}}]" in said
    files = {path.name for path in run.iterdir()}
    assert {"adapter_model.safetensors", "head.safetensors", "judge_prompt.jinja", "processor_config.json"} <= files
    assert {"README.md", "report.html", "result.json", "curves.png"} <= files and "config.json" not in files
    assert (run / "config.yaml").read_text().startswith("# vlm-grpo reward-train\n")
    facts = json.loads((run / "reward_model.json").read_text())
    assert facts["base_model"] == str(workplace / "model") and facts["captions"] is True and facts["stem"] == "answer"
    logged = jsonl(run / "metrics.jsonl")
    names = {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "grad_norm", "learning_rate"}
    assert len(logged) == 2 and all(names <= set(record) for record in logged)

    found = json.loads((run / "evaluation.json").read_text())
    for state in ("before", "after", "control"):
        figure = found[state]
        assert figure["rows"] == 4 and len(figure["ci95"]) == 2 and 0 <= figure["accuracy"] <= 1
        assert {"margin", "mean_reward", "reward_std", "length_correlation"} <= set(figure)
    assert found["control"]["kind"] == "blank" and found["change"]["rows"] == found["control"]["change"]["rows"] == 4
    rows = jsonl(run / "evaluation.jsonl")
    assert [row["state"] for row in rows] == ["before"] * 4 + ["after"] * 4 + ["control"] * 4
    for row in rows:
        assert row["margin"] == pytest.approx(row["chosen_score"] - row["rejected_score"])
        assert row["correct"] is (row["margin"] > 0)
        assert row["prompt"] == f"[{row['media'][0]}] \nwhat color is this" and "cat" not in row["prompt"]
        colour = row["chosen"]
        assert sorted(row["captions"]) == sorted([f"{colour} cat", f"{colour} {colour}"]), "of this row's picture"
        assert row["media_files"][0]["kind"] == "image" and (run / row["media_files"][0]["file"]).is_file()
    blank = {row["row"]: row["chosen_score"] for row in rows if row["state"] == "control"}
    assert all(row["chosen_score"] != blank[row["row"]] for row in rows if row["state"] == "after")

    assert "this run is finished (2 steps)" in called(0, "reward", "train", *PAIRS, *JUDGED, *STEPS)
    for refused in (["train", "--model", "run", "--data", "train.json", "--reward", "length"], ["chat", "run"]):
        assert "run is a reward model, which scores answers and writes none" in called(2, *refused)
    assert "which scores answers and writes none" in called(2, "eval", "run", "--data", "eval.json")
    assert "which scores answers and writes none" in called(2, "export", "run", "--to", "lora")
    again = ["reward", "train", "--model", "run", *PAIRS[2:6], "--output", "other"]
    assert "The same reward train command again continues its run." in called(2, *again)
    captions = workplace / "image_to_caption.json"
    captions.write_text(captions.read_text().replace("red cat", "red dog"))
    assert "was started with another content of" in called(2, "reward", "train", *PAIRS, *JUDGED, *STEPS)


def test_a_plan_writes_nothing(workplace):
    said = called(0, "reward", "train", *PAIRS, *JUDGED, "--dry-run", "--language", "lora")
    assert "vlm-grpo reward train (dry run: nothing is written)" in said and not (workplace / "run").exists()
    assert "trains │ language by LoRA" in said
    assert "judge.captions" in said and "center_rewards_coefficient" in said


# ---- what is refused or said before anything is loaded ---------------------------------------------------------------


def test_what_a_reward_model_has_no_use_for(workplace):
    said = called(2, "reward", "train", *PAIRS, "--reward", "accuracy")
    assert "reward train: --reward has no use, since the pairs say what is better. Leave it out." in said
    said = called(2, "reward", "train", *PAIRS, "--language", "full")
    assert 'reward train: language="full" is not available: a reward model is an adapter' in said
    said = called(2, "train", "--model", "model", "--data", "train.json", "--reward", "length", *JUDGED)
    assert "train: judge has no use, since no reward model is trained. Leave it out." in said
    assert "no option" in called(2, "reward", "train", *PAIRS, "--center_reward_coefficient", "1")
    said = called(2, "reward", "train", *PAIRS, "--num_generations", "4")
    assert "train.num_generations is an option of train, and reward train has no use for it. Leave it out." in said
    for option in ("--captions", "--judge_captions"):
        assert "Did you mean judge.captions?" in called(2, "reward", "train", *PAIRS, option, "image_to_caption.json")


def judged(**options: Any) -> Any:
    return load_config(None, None, {"model": "m", "data.train": "t", **{f"judge.{n}": v for n, v in options.items()}})


def test_a_judge_that_cannot_be(workplace):
    with pytest.raises(ConfigError, match="judge.stem is empty: the score is read behind its last token"):
        read_judging(judged(stem="  "))
    with pytest.raises(ConfigError, match="judge.captions=image_to_caption.json: the judge's prompt has no place"):
        read_judging(judged(prompt="is {{ response }} good", captions="image_to_caption.json"))
    with pytest.raises(ConfigError, match='unknown key "judge.captoins". Did you mean "captions"'):
        judged(captoins="x.json")
    with pytest.raises(ConfigError, match="reward train: no training rows"):
        require(load_config(None, None, {"model": "m"}), "reward-train")


def rows_of(pairs: list[tuple[str, str]], **columns: Any) -> RunRows:
    from datasets import Dataset

    rows = [{"prompt": tiny.prompt(images=0), "chosen": a, "rejected": b, **columns} for a, b in pairs]
    return RunRows(Dataset.from_list(rows))


def test_pairs_by_which_a_judge_would_learn_length_are_said(caplog):
    config = judged()
    with caplog.at_level("WARNING", "vlm_grpo"):
        make_pairs(rows_of([("long answer", "no")] * 9 + [("a", "bb")]), config, read_judging(config))
        assert not caplog.text, "nine of ten are not more than 90%"
        make_pairs(rows_of([("long answer", "no")] * 10 + [("a", "bb")]), config, read_judging(config))
    assert "t: in 91% of the pairs the chosen response is the longer one: a judge would learn length" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", "vlm_grpo"):
        make_pairs(rows_of([("no", "long answer")] * 4), config, read_judging(config))
    assert "in 100% of the pairs the chosen response is the shorter one" in caplog.text


def test_captions_of_other_files_are_refused_and_of_some_said(workplace, caplog):
    (workplace / "other.json").write_text(json.dumps({"elsewhere.png": ["red cat"]}))
    said = called(2, "reward", "train", *PAIRS, "--judge.captions", "other.json")
    assert "No row has a caption: other.json" in said and "train-0.png" in said and not (workplace / "run").exists()
    captions = json.loads((workplace / "image_to_caption.json").read_text())
    del captions["train-3.png"]
    (workplace / "some.json").write_text(json.dumps(captions))
    config = load_config(None, None, {"model": "m", "data.train": "train.json", "judge.captions": "some.json"})
    from vlm_grpo.data import load_data

    with caplog.at_level("WARNING", "vlm_grpo"):
        make_pairs(RunRows(load_data("train.json")), config, read_judging(config))
    assert "train.json: 1 of 8 rows has no caption" in caplog.text
    with pytest.raises(DataFormatError, match="cannot be read"):
        read_judging(judged(captions="none.json"))


def test_an_adapter_is_added_where_none_is_asked_for(workplace):
    assert with_adapter(judged()).lora is not None
    own = load_config(None, None, {"model": "m", "lora.r": 4})
    assert with_adapter(own) is own
    vision = load_config(None, None, {"model": "m", "vision": "lora"})
    assert with_adapter(vision) is vision


def test_held_out_pairs_of_which_none_can_be_used_stop_it_before_training(monkeypatch):
    held_out = HeldOutPairs([], SimpleNamespace(per_device_eval_batch_size=2))
    monkeypatch.setattr(held_out, "_judge", lambda *_: PairEvaluation([], 3))
    with pytest.raises(DataFormatError, match="None of the 3 held-out pairs can be used"):
        held_out.before(None, Path("unused"), {})


# ---- figures ---------------------------------------------------------------------------------------------------------


def pair(row: int, chosen: str, rejected: str, scores: tuple[float, float]) -> JudgedPair:
    return JudgedPair(row, "asked", [], chosen, rejected, *scores, [])


def test_figures_by_hand():
    # a longer chosen one right, a shorter one right, a longer one wrong, and a tie: 2.5 of 4
    rows = [
        pair(1, "four", "a", (2.0, 1.0)),
        pair(2, "b", "three", (1.0, 0.0)),
        pair(3, "longer", "c", (0.0, 3.0)),
        pair(4, "dd", "e", (1.0, 1.0)),
    ]
    found = figures(PairEvaluation(rows, left_out=2))
    assert found["accuracy"] == 0.625 and found["rows"] == 4 and found["ties"] == 1 and found["left_out"] == 2
    assert found["margin"] == (1 + 1 - 3 + 0) / 4
    assert found["mean_reward"] == 9 / 8
    assert found["reward_std"] == pytest.approx(((4 + 1 + 1 + 0 + 0 + 9 + 1 + 1) / 8 - (9 / 8) ** 2) ** 0.5)
    assert found["longer_wins"] == 0.75 and found["prefers_longer"] == pytest.approx(1 / 3)
    # ranks of 2 1 1 0 0 3 1 1 and of the lengths 4 1 1 5 6 1 2 1, ties at their mean: Pearson's of the two
    scores, lengths = [7, 4.5, 4.5, 1.5, 1.5, 8, 4.5, 4.5], [6, 2.5, 2.5, 7, 8, 2.5, 5, 2.5]
    both = sum((a - 4.5) * (b - 4.5) for a, b in zip(scores, lengths, strict=True))
    squares = [sum((a - 4.5) ** 2 for a in ranks) for ranks in (scores, lengths)]
    assert found["length_correlation"] == pytest.approx(both / (squares[0] * squares[1]) ** 0.5)
    low, high = found["ci95"]
    assert 0.2 < low < 0.625 < high < 0.95


def test_figures_of_nothing_and_of_constants():
    assert figures(PairEvaluation([]))["ci95"] == [0.0, 1.0] and longer_wins([]) is None
    same = figures(PairEvaluation([pair(1, "a", "b", (1.0, 1.0))]))
    assert same["accuracy"] == 0.5 and same["length_correlation"] is None and same["prefers_longer"] is None
    assert pair_change({1: False, 2: True}, {2: True, 3: True})["rows"] == 1


def state(accuracy: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    found = {"accuracy": accuracy, "ci95": [low, high], "rows": 100, "margin": 1.0, "mean_reward": 0.0}
    return {**found, "reward_std": 1.0, "length_correlation": 0.1, "prefers_longer": 0.5, "longer_wins": 0.5, **more}


def test_what_the_page_says():
    control = state(0.5, 0.4, 0.6, kind="blank", change={"rows": 100})
    change = {"difference": 0.4, "ci95": [0.3, 0.5], "p": 1e-9, "rows": 100}
    good = {"before": state(0.5, 0.4, 0.6), "after": state(0.9, 0.82, 0.95), "control": control, "change": change}
    said = list(sentences(good))
    assert said[0].startswith("Change by training: +40.0 points") and said[0].endswith("more pairs are right.")
    assert said[1] == "With its media blanked the accuracy is 50.0% [40.0–60.0]: the judge needs the media."
    assert len(said) == 2
    blind = {"after": state(0.6, 0.5, 0.7, ties=3, length_correlation=0.71, longer_wins=0.62), "control": control}
    said = list(sentences(blind))
    assert said[0] == "3 of 100 pairs got equal scores; each counts as half right."
    assert said[1].endswith("nothing shows that the judge needs the media.")
    assert said[2] == (
        "This judge likes long responses: score and length correlate by +0.71. On these pairs the rule that the longer "
        "one wins is right in 62%."
    )
    short = {"after": state(0.6, 0.5, 0.7, length_correlation=-0.9)}
    assert "likes short responses" in next(iter(sentences(short)))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(page(good))
    text = console.export_text()
    assert "90.0% [82.0–95.0]" in text and max(map(len, text.splitlines())) <= 80
