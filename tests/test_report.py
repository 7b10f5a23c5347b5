"""Curves and contact sheets: what is drawn, and that odd metrics files do not stop a run."""

import json
import math
import random
import re
import warnings
from pathlib import Path

import pytest
from PIL import Image

from vlm_grpo import report
from vlm_grpo.report import curves, records, sheet, style


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def titles(monkeypatch):
    """The titles of the panels that ``draw_curves`` fills, in order."""
    seen = []
    draw = curves._draw_panel
    monkeypatch.setattr(
        curves, "_draw_panel", lambda axes, panel, records: (seen.append(panel.key), draw(axes, panel, records))
    )
    return seen


def test_names_that_matplotlib_would_read_as_formulas_are_drawn(tmp_path):
    names = ("a$b$\\frac", "_hidden", "\ud800", "x" * 200)
    logged = [{"step": s, "reward": s, **{f"rewards/{name}/mean": s * 2 for name in names}} for s in range(3)]
    (drawing,) = curves.curve_drawings(logged)
    assert [name for name, _ in drawing.lines[1:]] == ["a$b$\\frac", "hidden", "?", "x" * 27 + "…"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report.draw_curves(write(tmp_path / "metrics.jsonl", logged), tmp_path / "curves.png")


def test_drawings_take_the_colours_of_the_page_and_stay_small():
    random.seed(0)
    logged = [
        {"step": s, "loss": random.random(), "reward": 1.0, "groups/dead": 0.5, "groups/dead_low": 0.2, "kl": 0.1}
        for s in range(6_000)
    ]
    drawings = curves.curve_drawings(logged)
    assert [drawing.title for drawing in drawings][1:] == ["loss", "KL to the reference (nats a token)"] + [
        "groups with equal rewards (share)"
    ]
    assert [name for name, _ in drawings[3].lines] == ["total", "all lowest"]
    for drawing in drawings:
        assert "var(--hue-0)" in drawing.svg and "var(--muted)" in drawing.svg
        assert not re.search(r"(fill|stroke): #(?!none)", drawing.svg), "every colour has a dark side"
        assert len(drawing.svg) < 150_000
    names = [re.findall(r'\bid="([^"]+)"', drawing.svg) for drawing in drawings]
    assert len(set(sum(names, []))) == sum(map(len, names)), "ids are a page's own"


def test_thinning_keeps_every_peak():
    steps, values = [float(s) for s in range(30_000)], [0.0] * 30_000
    values[12_345] = 7.0
    thin_steps, thin_values = curves._thinned(steps, values)
    assert len(thin_steps) == len(thin_values) <= 1250
    assert (12_345.0, 7.0) in zip(thin_steps, thin_values, strict=True)
    assert curves._thinned([1.0, 2.0], [3.0, 4.0]) == ([1.0, 2.0], [3.0, 4.0])


def test_only_metrics_with_values_get_a_panel(tmp_path, titles):
    records = [{"step": s, "reward": s / 9, "loss": None, "kl": math.nan, "learning_rate": 1e-5} for s in range(1, 9)]
    assert report.draw_curves(write(tmp_path / "metrics.jsonl", records), tmp_path / "curves.png")
    assert titles == ["reward", "learning_rate"]
    assert Image.open(tmp_path / "curves.png").size[0] > 600
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 1, "reward": 0.5, "reward_std": 0.1, "completions/mean_length": 2.0, "grad_norm": 1}],
        [{"step": s, "reward": 0.0, "rewards/a/mean": None if s % 2 else 0.5, "rewards/b/mean": 1} for s in range(40)],
        [{"step": s, "grad_norm": 10.0**s} for s in range(5)],
        [
            {"step": 10, "eval_reward": 0.4},
            {"step": 20, "eval_reward": 0.6},
            {"reward": 1.0},
            {"step": None, "loss": 1},
        ],
        [{"step": s, "reward": 1, "reward_std": None, "completions/mean_length": 5} for s in range(30)],
    ],
    ids=["one point", "parts with gaps", "log scale", "evaluation only", "no band"],
)
def test_odd_files_are_drawn(tmp_path, records):
    assert report.draw_curves(write(tmp_path / "metrics.jsonl", records), tmp_path / "curves.png")
    assert len(Image.open(tmp_path / "curves.png").convert("L").getcolors(1 << 24)) > 10


@pytest.mark.parametrize("text", [None, "", '{"step": 3}\n', '{"step": 1, "rew', "[1, 2]\n7\n"])
def test_nothing_to_draw_leaves_the_picture_alone(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "curves.png").write_text("kept")
    assert report.draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png") is False
    assert (tmp_path / "curves.png").read_text() == "kept"


def test_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo{"step": 3, "loss": 1.0}\n{"step": 4, "los')
    assert list(report.read_jsonl(path)) == [{"step": 1, "loss": 2.0}]


def test_smoothing_keeps_the_level_and_follows_a_slope_without_lag():
    line = [0.5 * index for index in range(100)]
    smoothed = curves._smooth(line)
    assert smoothed[50] == pytest.approx(line[50])
    assert smoothed[0] == pytest.approx(sum(line[:4]) / 4)
    assert curves._smooth([3.0] * 60) == [3.0] * 60
    assert curves._smooth([1.0, 9.0, 2.0]) == [1.0, 9.0, 2.0]


def test_a_single_reward_function_is_drawn_once():
    logged = [{"step": s, "reward": s / 7, "rewards/accuracy/mean": s / 7} for s in range(5)]
    (drawing,) = curves.curve_drawings(logged)
    assert drawing.lines == []
    halved = [record | {"reward": record["reward"] / 2} for record in logged]
    (drawing,) = curves.curve_drawings(halved)
    assert [name for name, _ in drawing.lines] == ["total", "accuracy"]
    assert drawing.story == "0 at step 0, 0.2857 at step 4"  # 4 / 7 / 2


def ppo_records(moves: bool = True, penalty: float = 1.0) -> list[dict]:
    """As PPO logs: what a rollout has every second step, what an update has at each."""
    records = []
    for step in range(1, 9):
        record = {"step": step, "loss": 0.5, "loss/policy": 0.4, "loss/value": 1.0, "approx_kl": 0.01 * step}
        record |= {"clipfrac": 0.1, "vf_clipfrac": 0.2}
        if step % 2:
            record |= {"reward": step / 8, "score": step / 8 - penalty, "kl": 2.0 + step, "explained_variance": -0.5}
            record |= {"kl_coef": 0.2 - 0.01 * step * moves, "returns": 1.0, "values": 0.1 * step}
        records.append(record)
    return records


def test_what_ppo_learns_by_has_panels(tmp_path, titles):
    # covers A10
    drawings = {drawing.title: drawing for drawing in curves.curve_drawings(ppo_records())}
    assert [name for name, _ in drawings["loss"].lines] == ["total", "policy", "value"]
    assert [name for name, _ in drawings["values and returns (mean over tokens)"].lines] == ["returns", "values"]
    assert "values 0.1 at step 1, 0.7 at step 7" in drawings["values and returns (mean over tokens)"].story
    assert [name for name, _ in drawings["clipped (share of tokens)"].lines] == ["policy's ratios", "new values"]
    assert drawings["share of the returns' variance explained"].story == "-0.5 at step 1, -0.5 at step 7"
    assert drawings["KL to the rollout's policy (nats a token)"].story == "0.01 at step 1, 0.08 at step 8"
    assert [name for name, _ in drawings["reward"].lines] == ["total", "score"]
    kl = drawings["KL to the reference (nats a completion)"]
    assert kl.story == "KL 3 at step 1, 9 at step 7; kl_coef 0.19 at step 1, 0.13 at step 7"
    assert report.draw_curves(write(tmp_path / "metrics.jsonl", ppo_records()), tmp_path / "curves.png")
    assert titles[titles.index("kl") + 1] == "kl_coef"


def test_what_says_nothing_in_ppos_panels_is_left_out():
    drawings = {drawing.title: drawing for drawing in curves.curve_drawings(ppo_records(moves=False, penalty=0.0))}
    assert drawings["reward"].lines == [], "the score is the reward"
    assert drawings["KL to the reference (nats a completion)"].story == "3 at step 1, 9 at step 7", "a fixed kl_coef"
    grpo = [{"step": s, "loss": 0.1, "reward": 0.1 * s, "kl": 0.1, "clip_ratio/region_mean": 0.1} for s in range(4)]
    found = [drawing.title for drawing in curves.curve_drawings(grpo)]
    assert found == ["reward", "loss", "KL to the reference (nats a token)"]


def test_a_name_that_has_another_colour_is_explained_again(tmp_path, monkeypatch):
    """A reward function may be called as a part of the loss is."""
    axes, draw = [], curves._draw_panel
    monkeypatch.setattr(curves, "_draw_panel", lambda own, *others: (axes.append(own), draw(own, *others)))
    named = {"rewards/a/mean": 2.0, "rewards/policy/mean": 1.0}
    logged = [record | named for record in ppo_records(penalty=0.0)]
    assert report.draw_curves(write(tmp_path / "metrics.jsonl", logged), tmp_path / "curves.png")
    legends = {
        own.get_title("left"): [text.get_text() for text in own.get_legend().get_texts()]
        for own in axes
        if own.get_legend()
    }
    assert legends["reward"] == ["total", "a", "policy"]
    assert legends["loss"] == ["policy", "value"]


@pytest.mark.parametrize(("seconds", "text"), [(7.9, "0:07"), (750, "12:30"), (11100, "3:05:00")])
def test_duration(seconds, text):
    assert report.duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(1e-5, "1e-5"), (0.25, "0.25"), (0.0, "0"), (250000.0, "2.5e5")])
def test_axis_numbers_are_short(value, text):
    assert records.number(value) == text


def test_contact_sheet_frames_tell_right_from_wrong(tmp_path):
    images = [
        Image.new("RGB", (56, 56), "white"),
        Image.new("L", (300, 100), 0),
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)),
    ]
    out = tmp_path / "new" / "sheet.png"
    report.contact_sheet(
        images,
        ["one", "a long caption that has to be cut somewhere", "→ zwölf\n(is 2)"],
        [True, False, True],
        out,
        2,
        "Digits",
    )
    colours = {colour for _, colour in Image.open(out).getcolors(1 << 24)}
    right, wrong = (tuple(bytes.fromhex(hue[1:])) for hue in (style.RIGHT, style.WRONG))
    assert {right, wrong} <= colours
    report.contact_sheet(images, ["", "", ""], None, out)
    colours = {colour for _, colour in Image.open(out).getcolors(1 << 24)}
    assert not {right, wrong} & colours


def test_contact_sheet_refuses_a_missing_caption(tmp_path):
    with pytest.raises(AssertionError, match="2 images need as many captions, got 1"):
        report.contact_sheet([Image.new("RGB", (9, 9))] * 2, ["one"], None, tmp_path / "sheet.png")


def test_captions_wrap_at_words_and_end_in_an_ellipsis():
    font = sheet._font(16)
    lines = sheet._wrap("the quick brown fox jumps over the lazy dog", font, 120)
    assert lines[0] == "the quick" and lines[1].startswith("brown fox") and lines[1].endswith("…") and len(lines) == 2
    assert all(font.getlength(line) <= 120 for line in lines)
    assert sheet._wrap("two\nlines", font, 120) == ["two", "lines"]
    (cut,) = sheet._wrap("x" * 99, font, 120)
    assert cut.endswith("x…") and font.getlength(cut) <= 120
