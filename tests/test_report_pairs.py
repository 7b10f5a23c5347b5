"""The page of a reward model, and of a run that learns from one: what it judges by; score and truth side by side."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from test_report_page import EVIL, make_run, page_of, write

from vlm_grpo import report
from vlm_grpo.report import curves, judged, weights
from vlm_grpo.report.pairs import Verdict

JUDGE_CONFIG = """# vlm-grpo reward-train
model: org/model
lora: {r: 8}
data: {train: /somewhere/pairs.jsonl, eval: held-out.jsonl}
judge: {captions: /somewhere/image_to_caption.json}
train: {learning_rate: 2.0e-05}
"""


def figures(accuracy: float, low: float, high: float, **more: object) -> dict:
    return {"accuracy": accuracy, "ci95": [low, high], "rows": 8, "margin": 1.5, "mean_reward": 0.25} | more


def make_judge(folder: Path, control: dict | None = None, length: float = 0.1, captions: bool = False) -> Path:
    """A reward model's run: 8 held-out pairs, of which row 6 is judged wrongly after training, 0 to 5 before."""
    (folder / "media").mkdir(parents=True)
    (folder / "config.yaml").write_text(JUDGE_CONFIG)
    for number in range(8):
        Image.new("RGB", (48, 48), (30 * number, 90, 160)).save(folder / "media" / f"{number}.png")
    steps = range(1, 25)
    rising = {"accuracy": 0.4, "margin": 0.0, "mean_reward": 0.1, "min_reward": -1.0, "max_reward": 1.0}
    logged = [
        {"step": s, "loss": 0.7 - s / 60, **{name: value + s / 50 for name, value in rising.items()}} for s in steps
    ]
    write(folder / "metrics.jsonl", logged)
    shift = {"before": [-0.5] * 6 + [0.5] * 2, "after": [2.0] * 6 + [-1.0, 0.5], "control": [0.1, -0.1] * 4}
    lines = [
        {
            "state": state,
            "row": row,
            "prompt": f"[/data/{row}.png] which digit is this ?",
            "chosen": f"It is a {row}.",
            "rejected": f"It is clearly a {row + 1}.",
            "chosen_score": 0.25 + margin / 2,
            "rejected_score": 0.25 - margin / 2,
            "margin": margin,
            "correct": margin > 0,
            "captions": [f"a {row}", "handwriting"] if captions else [],
            "media": [f"/data/{row}.png"],
            "media_files": [{"kind": "image", "file": f"media/{row}.png"}],
        }
        for state, margins in shift.items()
        for row, margin in enumerate(margins)
    ]
    write(folder / "evaluation.jsonl", lines)
    evaluation = {
        "before": figures(0.25, 0.07, 0.59, reward_std=0.4, length_correlation=0.05),
        "after": figures(0.875, 0.75, 0.98, reward_std=1.2, length_correlation=length, longer_wins=0.3),
        "control": figures(0.5, 0.22, 0.7, kind="blank") | (control or {}),
        "change": {"difference": 0.625, "ci95": [0.2, 0.9], "p": 0.03, "rows": 8},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "result.json").write_text(json.dumps({"steps": 24, "seconds": 65.0, "stopped": None, "left_out": {}}))
    (folder / "reward_model.json").write_text(json.dumps({"version": 1, "stem": "Score:", "captions": captions}))
    (folder / "judge_prompt.jinja").write_text(
        "Judge the last response.\n{% for c in captions %}- {{ c }}\n{% endfor %}"
    )
    return folder


def cells(page, title: str) -> list[str]:
    found = [found for tag, found in page.elements if tag == "td"]
    return [attributes["data-value"] for attributes in found if attributes.get("data-title") == title]


@pytest.fixture
def drawn(monkeypatch):
    """The metrics of the panels that are drawn, which takes long, and here is not done."""
    seen = []
    monkeypatch.setattr(curves, "_draw_panel", lambda axes, panel, records: seen.append(panel.key))
    return seen


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return page_of(make_judge(tmp_path_factory.mktemp("judge") / "judge", captions=True))


def test_the_page_of_a_reward_model_says_how_it_judges(page):  # covers L1 L3
    for said in (
        "finished: 24 steps in 1:05",
        "How it judges held-out pairs",
        "before training 25.0% 7.0–59.0% 8",
        "after training 87.5% 75.0–98.0% 8",
        "after, media blanked 50.0% 22.0–70.0% 8",
        "Training changed the accuracy by +62.5 points (95% interval +20.0 to +90.0); p = 0.030; the same 8 pairs",
        "It looks at the media: 50.0% (22.0–70.0%) right with the media blanked, 87.5% (75.0–98.0%) with them. Without",
        "little to do with the length of a response (rank correlation +0.10)",
        "mean margin (score of chosen − rejected) 1.5 1.5 1.5",
        "rank correlation of score and length 0.05 0.1 –",
        "command vlm-grpo reward train",
        "training pairs pairs.jsonl",
        "captions for the judge image_to_caption.json",
        "Judge the last response. {% for c in captions %}",
        "a 6 handwriting",
        "[6.png] which digit is this ?",
    ):
        assert said in page.text, said
    assert "samples.jsonl has no" not in page.text and "/somewhere" not in page.source and "/data/" not in page.source
    labels = [attributes["aria-label"] for attributes in page.all("figure")]
    assert labels[:3] == [  # the margins' means are -0.25, 1.4375 and 0, around 0.25
        "before training: chosen 0.125 on average, rejected 0.375 on average",
        "after training: chosen 0.9688 on average, rejected -0.4688 on average",
        "media blanked: chosen 0.25 on average, rejected 0.25 on average",
    ]
    assert labels[3] == "margins after training: 7 judged right, 1 judged wrongly"
    assert labels[4] == "share of pairs judged right: 0.42 at step 1, 0.88 at step 24"
    assert labels[7] == "score: mean, lowest to highest: 0.12 at step 1, 0.58 at step 24"
    assert not re.search(r"(fill|stroke): #(?!none)", page.source), "every colour has a dark side"


def test_pairs_judged_wrongly_come_first_and_then_by_margin(page):
    assert [float(value) for value in cells(page, "margin")] == [-1.0, 0.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert cells(page, "row")[:3] == ["6.0", "7.0", "0.0"]
    assert cells(page, "margin before")[:3] == ["0.5", "0.5", "-0.5"]
    assert cells(page, "score of chosen")[0] == "-0.25" and cells(page, "score of rejected")[0] == "0.75"
    assert [found["class"] for found in page.all("th") if found.get("aria-sort") == "ascending"] == ["number"]
    assert len(page.all("img")) == 8 and page.text.count("✗") == 1


def verdicts(run: Path, captions: bool = False) -> list[Verdict]:
    evaluation = json.loads((run / "evaluation.json").read_text())
    return report.verdicts(evaluation, captions)


BLANKED = "80.0% (60.0–90.0%) right with the media blanked, 87.5% (75.0–98.0%) with them"


@pytest.mark.parametrize(
    ("control", "captions", "said"),
    [
        (
            {"accuracy": 0.8, "ci95": [0.6, 0.9]},
            False,
            f"Nothing shows that it needs the media: {BLANKED}, and the intervals",
        ),
        ({"accuracy": 0.6, "ci95": [0.4, 0.75]}, False, "and the intervals overlap. The texts tell it enough."),
        ({"accuracy": 0.8, "ci95": [0.6, 0.9]}, True, "The captions, which it still reads, may tell it enough."),
        ({"accuracy": 0.6, "ci95": [0.55, 0.7]}, False, "It looks at the media: 60.0% (55.0–70.0%) right with"),
    ],
    ids=["as well", "just touching", "captions", "less well"],
)
def test_a_judge_that_does_not_need_the_media_is_told(tmp_path, control, captions, said):
    found = verdicts(make_judge(tmp_path / "judge", control), captions)[0]
    assert said in found.text and found.bad == ("Nothing shows" in found.text)
    assert "Without them it guesses" not in found.text


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (0.62, "It likes long responses: score and length correlate by +0.62. In these pairs the longer response is "
         "the chosen one in 30%."),
        (-0.7, "It likes short responses: score and length correlate by -0.70."),
        (0.4, "It leans to long responses: score and length correlate by +0.40."),
        (0.1, "Its score has little to do with the length of a response (rank correlation +0.10)."),
    ],
)  # fmt: skip
def test_a_judge_that_likes_length_is_told(tmp_path, length, said):  # covers L3
    found = verdicts(make_judge(tmp_path / "judge", length=length))
    assert [verdict.bad for verdict in found] == [False, abs(length) > 0.5] and said in found[1].text


def test_a_judge_that_guesses_and_one_without_a_control_are_told_apart():
    guessing = figures(0.55, 0.45, 0.65, length_correlation=None)
    assert [verdict.text for verdict in report.verdicts({"after": guessing}, False)] == [
        "It judges no better than chance: 55.0% (45.0–65.0%) of the pairs right, where a guess has half."
    ]
    worse = report.verdicts({"after": figures(0.2, 0.1, 0.4)}, False)
    assert worse[0].bad and "worse than chance" in worse[0].text
    assert report.verdicts({"after": figures(0.9, 0.8, 0.95)}, False) == []
    shuffled = {"after": figures(0.9, 0.8, 0.95), "control": figures(0.9, 0.8, 0.95, kind="shuffle")}
    assert report.verdicts(shuffled, False) == [], "only blank media are no media"


def test_an_unfinished_or_odd_reward_run_is_still_a_page(tmp_path, drawn):
    run = make_judge(tmp_path / "judge")
    for name in ("evaluation.json", "evaluation.jsonl", "result.json", "reward_model.json", "judge_prompt.jinja"):
        (run / name).unlink()
    text = page_of(run).text
    assert "held-out pairs are judged when a run begins and ends" in text and "not finished: 24 steps" in text
    odd = {"state": "after", "row": 0, "chosen": EVIL, "rejected": None, "captions": EVIL, "margin": "x", "correct": 1}
    write(run / "evaluation.jsonl", [odd, {"state": "after", "row": 1, "chosen_score": 1e400}, {"state": "else"}])
    (run / "evaluation.json").write_text(json.dumps({"after": {"accuracy": 1, "ci95": "x"}, "control": 3}))
    (run / "judge_prompt.jinja").write_text(EVIL.replace("\ud800", ""))
    page = page_of(run)
    assert (
        "captions for the judge" in page.text
        and len(page.all("script")) == 1
        and page.text.count("alert(1)") >= 3
        and "after training 100.0%" in page.text
    )


def test_of_many_pairs_the_worst_and_others_evenly_are_shown(tmp_path, drawn):
    run = make_judge(tmp_path / "judge")
    lines = [{"state": "after", "row": n, "margin": n - 80.5, "correct": n > 80} for n in range(400)]
    write(run / "evaluation.jsonl", lines)
    page = page_of(run)
    assert "100 of 400 shown. evaluation.jsonl has all." in page.text
    assert "captions for the judge" not in page.text.partition("This run")[0], "no column of nothing"
    margins = [float(value) for value in cells(page, "margin")]
    assert margins == sorted(margins) and len(margins) == 100 and margins[-1] == 318.5
    assert margins[:50] == [n - 80.5 for n in range(50)]


def test_curves_of_a_reward_run_have_a_panel_each(tmp_path, drawn):
    run = make_judge(tmp_path / "judge")
    assert report.draw_curves(run / "metrics.jsonl", run / "curves.png")
    assert drawn == ["accuracy", "loss", "margin", "mean_reward"]


# ---- a run that learns from a judge -----------------------------------------------------------------------------

GRPO_CONFIG = """# vlm-grpo train
model: org/model
data: {{train: train.jsonl, eval: held-out.jsonl}}
rewards:
- {{name: model, weight: 1.0, kwargs: {{model: /somewhere/runs/digit-judge}}}}
- {{name: accuracy, weight: {weight}}}
"""


def make_judged(folder: Path, rises: bool = True, falls: bool = True, weight: float = 0.0, steps: int = 12) -> Path:
    """A GRPO run with a judge and accuracy: four completions a prompt, of which the judge prefers one wrong one."""
    make_run(folder)
    (folder / "config.yaml").write_text(GRPO_CONFIG.format(weight=weight))
    score = [0.1 * step * (1 if rises else -1) for step in range(steps)]
    truth = [0.5 + 0.02 * step * (-1 if falls else 1) for step in range(steps)]
    logged = [
        {"step": step + 1, "reward": a, "rewards/model/mean": a, "rewards/model/std": 1, "rewards/accuracy/mean": b}
        for step, (a, b) in enumerate(zip(score, truth, strict=True))
    ]
    write(folder / "metrics.jsonl", logged)
    samples = [
        {"step": step, "prompt": "p", "completion": "c", "rewards": {"model": a, "accuracy": b}, "advantage": 0.0}
        for step in (1, 2)
        for a, b in ((2.0, 0.0), (1.5, 1.0), (0.5, 1.0), (-1.0, 0.0))
    ]
    write(folder / "samples.jsonl", samples)
    state = {"accuracy": 0.5, "ci95": [0.4, 0.6], "rows": 90, "reward": 0.2, "rewards": {"model": 0.2, "accuracy": 0.5}}
    after = {**state, "accuracy": 0.4, "ci95": [0.3, 0.5], "reward": 1.25, "rewards": {"model": 1.25, "accuracy": 0.4}}
    change = {"difference": -0.1, "ci95": [-0.2, 0.02], "p": 0.08, "rows": 90}
    (folder / "evaluation.json").write_text(json.dumps({"before": state, "after": after, "change": change}))
    return folder


def test_score_and_truth_stand_side_by_side_and_reward_hacking_is_called_so(tmp_path):
    page = page_of(make_judged(tmp_path / "run"))
    section = page.text.partition("Score and truth")[2].partition("Curves")[0]
    for said in (
        # thirds of 12 steps: 0, .1, .2, .3 and .8 to 1.1; .5 to .44 and .34 to .28
        "While it trained the judge's score rose (0.15 to 0.95) and the truth fell (0.47 to 0.31)",
        "(reward hacking)",
        "( accuracy , which is only watched and no part of the reward)",
        "Over 8 completions in samples.jsonl the rank correlation of score and truth is +0.00.",
        "right one has the higher score in 50% of 8 pairs (50% is chance)",
        "before training 0.2 50.0% 40.0–60.0%",
        "after training 1.25 40.0% 30.0–50.0%",
    ):
        assert said in section, said
    labels = [found["aria-label"] for found in page.all("figure")]
    assert labels[0] == (
        "score and truth: judge's score 0 at step 1, 1.1 at step 12; true accuracy 0.5 at step 1, 0.28 at step 12"
    )


PAID = weights.Rewards({"model": 1.0, "accuracy": 0.0}, "model", "accuracy")


def seen(run: Path) -> judged.Judged:
    evaluation = json.loads((run / "evaluation.json").read_text())
    found = judged.judged(run, list(report.read_jsonl(run / "metrics.jsonl")), evaluation, PAID)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("rises", "falls", "said"),
    [
        (True, False, "Both rose: the judge's score went from 0.15 to 0.95, the true accuracy from 0.53 to 0.69"),
        (False, True, "Both fell:"),
        (False, False, "The score fell while the truth rose:"),
    ],
)
def test_other_courses_are_no_warning(tmp_path, monkeypatch, rises, falls, said):
    monkeypatch.setattr(judged, "judged_drawing", lambda records, rewards: None)
    found = seen(make_judged(tmp_path / "run", rises, falls))
    assert said in found.sentences[0] and not found.warning


def test_a_fall_on_held_out_rows_is_hacking_too_where_the_interval_says_so(tmp_path, monkeypatch):
    run = make_judged(tmp_path / "run", falls=False)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["change"]["ci95"] = [-0.2, -0.01]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    monkeypatch.setattr(judged, "judged_drawing", lambda records, rewards: None)
    said = "On held-out rows the judge's score rose (0.2 to 1.25) and the truth fell (50.0% to 40.0%)"
    assert seen(run).warning.startswith(said)


def test_an_accuracy_that_another_reward_tells_is_not_called_the_truth(tmp_path, monkeypatch):
    monkeypatch.setattr(judged, "judged_drawing", lambda records, rewards: None)
    run = make_judged(tmp_path / "run", falls=False)
    evaluation = json.loads((run / "evaluation.json").read_text())
    for state, truth in (("before", 0.25), ("after", 0.125)):
        evaluation[state]["rewards"]["accuracy"] = truth
    evaluation["change"]["ci95"] = [-0.2, -0.01]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    found = seen(run)
    assert found.states == [("before training", "0.2", "0.25", ""), ("after training", "1.25", "0.125", "")]
    assert not found.warning


def test_noise_is_no_trend():
    assert judged._trend([0.0, 1.0, 0.0, 1.0, 0.1, 0.9, 1.0, 0.2, 1.0]) == 0
    assert judged._trend([0.0] * 3 + [1.0] * 3) == 1 and judged._trend([1.0] * 9) == 0
    assert judged._trend([0.0, 1.0]) is None


def test_the_rank_correlation_is_spearmans():
    assert judged.rank_correlation([1, 2, 3, 4], [10, 20, 400, 300]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert judged.rank_correlation([0, 1, 1, 5], [0, 1, 1, 1]) == pytest.approx(0.816497, abs=1e-6)  # ties: mean ranks
    assert judged.rank_correlation([1, 1, 1], [1, 2, 3]) is None and judged.rank_correlation([1, 2], [1, 2]) is None


def test_a_reward_of_weight_0_is_nowhere_part_of_the_reward(tmp_path, monkeypatch):
    run = make_judged(tmp_path / "run")
    page = page_of(run)
    assert "rewards model (digit-judge) × 1" in page.text and "× 0" not in page.text
    assert "watched, no part of the reward accuracy" in page.text
    assert "mean of accuracy (watched) 0.5 0.4" in page.text
    assert cells(page, "reward")[:2] == ["2.0", "1.5"] and cells(page, "accuracy (watched)")[:2] == ["0.0", "1.0"]
    records = list(report.read_jsonl(run / "metrics.jsonl"))
    drawings = curves.curve_drawings(records, weights.Rewards({"model": 1.0, "accuracy": 0.0}))
    assert [drawing.title for drawing in drawings] == ["reward", "watched only, no part of the reward"]
    assert drawings[0].lines == [] and drawings[1].lines == [("accuracy", "--hue-1")]
    assert drawings[1].story == "accuracy 0.5 at step 1, 0.28 at step 12"
    monkeypatch.setattr(curves, "_draw_panel", lambda axes, panel, records: None)
    paid = page_of(make_judged(tmp_path / "paid", weight=0.5))
    assert "watched" not in paid.text and "rewards model (digit-judge) × 1, accuracy × 0.5" in paid.text


def test_a_run_without_a_judge_has_no_such_section(tmp_path, drawn):
    assert "Score and truth" not in page_of(make_run(tmp_path / "run")).text
    names = ["format", "model"]
    found = weights.rewards_of({"rewards": [{"name": "format"}, {"name": "model", "weight": 0.5}]}, names)
    assert found == weights.Rewards({"format": 1.0, "model": 0.5}), "no truth to compare with"
    several = [{"name": "model", "weight": 0.1}, {"name": "ocr"}, {"name": "model", "weight": 2}, {"name": "accuracy"}]
    found = weights.rewards_of({"rewards": several}, ["model", "ocr", "model_2", "accuracy"])
    assert (found.judge, found.truth) == ("model_2", "accuracy")
    for config, logged in (({}, ["a"]), ({"rewards": [{"weight": "x"}]}, ["a"]), ({"rewards": several}, ["a"])):
        assert weights.rewards_of(config, logged) == weights.Rewards({})


def test_curves_png_shows_score_above_truth(tmp_path, drawn):
    run = make_judged(tmp_path / "run")
    assert report.draw_curves(run / "metrics.jsonl", run / "curves.png")
    assert drawn == ["reward", "rewards/model/mean", "rewards/accuracy/mean"]
