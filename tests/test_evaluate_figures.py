"""The numbers of an evaluation, each by hand or against a slow loop: no model is needed for any of them."""

import io
import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import binomtest

from vlm_grpo.config import RewardSpec
from vlm_grpo.data import to_sample
from vlm_grpo.errors import ConfigError, RewardError
from vlm_grpo.evaluate import (
    Answered,
    Evaluation,
    Yardstick,
    change,
    figures,
    mcnemar,
    paired_change,
    pass_at_k,
    war_uar,
    yardstick_of,
    yes_no,
)
from vlm_grpo.evaluate.controls import shuffle_plan, without_media
from vlm_grpo.evaluate.figures import read_verdicts, write_rows
from vlm_grpo.evaluate.page import page
from vlm_grpo.evaluate.statistics import ks
from vlm_grpo.rewards import Failed, load_rewards


def answered(row: int, correct: bool | None, completion: str = "", truth=None, **more) -> Answered:
    value = None if correct is None else float(correct)
    return Answered(row, f"question {row}", [], completion, {"accuracy": value}, value, correct, truth, **more)


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (4, 1), (5, 2), (6, 0), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_all_choices_that_hold_a_right_one(n: int, right: int):
    for k in range(1, n + 1):
        choices = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)
    with pytest.raises(ValueError, match="1 <= k <= n"):
        pass_at_k(n, right, n + 1)


def test_the_ks():
    assert [ks(n) for n in (0, 1, 2, 3, 4, 6, 8)] == [[], [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_paired_change_is_that_of_a_slow_bootstrap():
    before = [True] * 12 + [False] * 28
    after = [False] * 3 + [True] * 9 + [True] * 11 + [False] * 17  # 3 lost, 11 gained, of 40
    found = paired_change(before, after, seed=1)
    assert found["difference"] == pytest.approx(8 / 40) and found["rows"] == 40
    assert found["p"] == pytest.approx(binomtest(3, 14, 0.5).pvalue) == pytest.approx(0.0574, abs=1e-4)

    draw, pairs = random.Random(0), list(zip(before, after, strict=True))
    means = []
    for _ in range(4000):
        resample = [pairs[draw.randrange(40)] for _ in range(40)]
        means.append(sum(new - old for old, new in resample) / 40)
    means.sort()
    low, high = found["ci95"]
    assert low == pytest.approx(means[100], abs=0.026) and high == pytest.approx(means[3900], abs=0.026)
    assert paired_change(before, after, seed=1) == found, "seeded"
    backwards = paired_change(after, before, seed=1)
    assert backwards["difference"] == -found["difference"] and backwards["p"] == found["p"]


def test_a_change_of_nothing():
    assert paired_change([], []) == {"difference": 0.0, "ci95": [-1.0, 1.0], "p": 1.0, "rows": 0}
    assert paired_change([True, False], [True, False]) == {"difference": 0.0, "ci95": [0.0, 0.0], "p": 1.0, "rows": 2}
    with pytest.raises(ValueError, match="3 rows before and 2 after are not pairs"):
        paired_change([True] * 3, [True] * 2)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (0, 5), (3, 3), (40, 12), (4000, 3900)])
def test_mcnemar_is_the_binomial_test(gained: int, lost: int):
    expected = binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-6)


def test_a_change_takes_the_rows_with_a_verdict_on_both_sides():
    found = change({1: False, 2: True, 5: False}, {5: True, 1: True, 3: False})
    assert found["rows"] == 2 and found["difference"] == 1.0


def test_war_and_uar():  # covers O8
    # joy: 3 of 4 found, fear: 0 of 1, calm: 1 of 1; "anger" is only ever predicted, "disgust" never seen at all.
    truths = ["joy", "joy", "joy", "joy", "fear", "calm"]
    given = ["joy", "joy", "joy", "anger", "joy", "calm"]
    war, uar = war_uar(truths, given)
    assert war == pytest.approx(4 / 6) and uar == pytest.approx((3 / 4 + 0 + 1) / 3)
    assert war_uar([], []) == (0.0, 0.0)
    assert war_uar(["a"], ["b"]) == (0.0, 0.0)


def test_yes_and_no():  # covers L9
    # yes: 3 found, 1 missed; no: 2 right, 1 taken for yes, 1 without an answer.
    truths = ["yes"] * 4 + ["no"] * 4
    given = ["yes", "yes", "yes", "no", "no", "no", "yes", None]
    assert yes_no(truths, given) == pytest.approx(
        {"accuracy": 5 / 8, "precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4, "yes_ratio": 4 / 8}
    )


@pytest.mark.parametrize(
    ("truths", "given", "expected"),
    [
        ([], [], (0, 0, 0, 0, 0)),
        (["no", "no"], ["no", "no"], (1, 0, 0, 0, 0)),  # nothing to be found, and no yes
        (["no", "no"], ["yes", "no"], (0.5, 0, 0, 0, 0.5)),
        (["yes", "yes"], ["no", "no"], (0, 0, 0, 0, 0)),
        (["yes"], ["yes"], (1, 1, 1, 1, 1)),
        (["yes"], [None], (0, 0, 0, 0, 0)),
    ],
)
def test_yes_and_no_where_a_class_is_absent(truths, given, expected):  # covers L9
    assert tuple(yes_no(truths, given).values()) == expected


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=12), st.integers(0, 5))
def test_a_shuffle_gives_every_medium_once_and_none_to_its_own_row(counts: list[int], seed: int):
    total, most = sum(counts), max(counts, default=0)
    if total < 2 * most:
        with pytest.raises(ConfigError, match="one row has"):
            shuffle_plan(counts, seed)
        return
    plan = shuffle_plan(counts, seed)
    assert [len(slots) for slots in plan] == counts
    assert Counter(slot for slots in plan for slot in slots) == Counter(
        (row, which) for row, count in enumerate(counts) for which in range(count)
    )
    assert all(giver != row for row, slots in enumerate(plan) for giver, _ in slots)
    assert plan == shuffle_plan(counts, seed), "seeded"


def test_media_cannot_be_taken_out_of_a_templated_prompt():
    sample = to_sample({"prompt": "<image> what", "image": "a.png"}, where="row 3")
    with pytest.raises(ConfigError, match="the media of row 3 stand in a prompt that is one text"):
        without_media(sample)
    assert without_media(to_sample({"prompt": "what"})).prompt == "what"


# ---- what is right ---------------------------------------------------------------------------------------------------


def test_totals_are_those_of_training():
    yard = Yardstick({"a": len, "b": len}, {"a": 0.5, "b": 2.0})
    assert yard.total({"a": 1.0, "b": 1.5}) == 3.5
    assert yard.total({"a": 1.0, "b": None}) == 0.5, "not applicable adds nothing"
    assert yard.total({"a": None, "b": None}) is None
    assert yard.total({"a": 1.0, "b": Failed("HTTP 503")}) is None, "no verdict, and not 0"
    assert [yard.is_right(value) for value in (1.0, 1.7, 0.99, None, Failed("x"))] == [True, True, False, None, None]
    assert yard.judge == "a" and replace(yard, correct="b").judge == "b"


@pytest.mark.parametrize(
    ("options", "right", "wrong"),
    [({}, 1.0, 0.99), ({"scale": 0.5}, 0.5, 0.49), ({"scale": 2, "shift": -1}, 1.0, 0.9), ({"clip": [0, 0.5]}, 0.5, 0)],
)
def test_right_means_one_before_a_reward_is_scaled(options, right, wrong):
    yard = yardstick_of([RewardSpec(name="accuracy", **options)])
    assert (yard.is_right(right), yard.is_right(wrong)) == (True, False)


@pytest.mark.parametrize(
    ("spec", "right", "wrong"),
    [
        # PPO's transcripts earn up to 9: a near miss earned 1.5, and counted as right
        ({"name": "asr", "kwargs": {"variant": "ppo"}}, ("five", "five"), ("five", "nine")),
        ({"name": "asr"}, ("five", "five"), ("fivee", "five")),
        ({"name": "asr", "kwargs": {"token": 0.0, "exact": 0.2}}, ("five", "five"), ("fivee", "five")),
        ({"name": "caption_type", "kwargs": {"score": 1}}, ("No, it is red.", 6), ("Yes.", 6)),
        ({"name": "caption_type"}, ("B. red", 3), ("C. blue", 3)),
    ],
)
def test_rewards_on_other_scales_say_from_where_an_answer_is_right(spec, right, wrong):
    # covers A8, L7
    spec = RewardSpec(**spec)
    functions, _ = load_rewards([spec])
    yard = yardstick_of([spec], functions)
    said, truths = zip(right, wrong, strict=True)
    values = functions[0](completions=list(said), answer=list(truths), caption_type=list(truths))
    assert [yard.is_right(value) for value in values] == [True, False]


def test_a_decorated_reward_says_itself_from_where_an_answer_is_right(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import functools\n"
        "def timed(f):\n"
        "    return functools.wraps(f)(lambda **c: f(**c))\n"
        "@timed\n"
        "def right(completions, **columns):\n"
        "    return [9.0 for _ in completions]\n"
        "right.right_at = 10\n"
    )
    yard = yardstick_of([RewardSpec(name=f"{tmp_path / 'mine.py'}:right", scale=2)])
    assert [yard.is_right(value) for value in (18.0, 20.0)] == [False, True]


def test_the_first_reward_that_can_tell_says_what_is_right():
    specs = [RewardSpec(name="format", scale=-1), RewardSpec(name="accuracy", kwargs={"column": "label"})]
    assert yardstick_of(specs).judge == "accuracy" and yardstick_of(specs).truth == "label"
    with pytest.raises(ConfigError, match='The reward "format" cannot say which answers are right'):
        yardstick_of(specs, correct="format")
    with pytest.raises(ConfigError, match=r"No reward \(format\) can say which answers are right.*accuracy=0"):
        yardstick_of(specs[:1])
    with pytest.raises(ConfigError, match='there is no reward "acuracy". Did you mean "accuracy"'):
        yardstick_of(specs, correct="acuracy")
    with pytest.raises(RewardError, match="No reward is given"):
        yardstick_of([])


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_figures_leave_out_what_failed_and_count_it():
    def row(number: int, a, b) -> Answered:
        yard = Yardstick({"a": len, "b": len}, {"b": 2.0})
        values = {"a": a, "b": b}
        return Answered(number, "", [], "", values, yard.total(values), yard.is_right(a))

    rows = [row(1, 1.0, 0.5), row(2, 0.0, Failed("HTTP 503")), row(3, None, 1.0), row(4, Failed("late"), None)]
    found = figures(Evaluation(rows, left_out=2))
    assert found["accuracy"] == 1 / 2 and found["rows"] == 4 and found["unscored"] == 2 and found["left_out"] == 2
    assert found["rewards"] == {"a": 0.5, "b": 0.75} and found["reward"] == pytest.approx((2.0 + 2.0) / 2)
    assert found["failed"] == {"a": 1, "b": 1}
    nothing = figures(Evaluation([]))
    assert nothing == {"accuracy": 0.0, "ci95": [0.0, 1.0], "rows": 0, "reward": None, "rewards": {}}


def test_pass_at_k_is_a_mean_over_the_rows():
    drawn = [(True, False, False, False), (False,) * 4, (True, True, None, None)]
    rows = [answered(i, True, drawn=("x",) * 4, drawn_correct=verdicts) for i, verdicts in enumerate(drawn)]
    found = figures(Evaluation(rows))["pass@k"]
    # Of the last row two verdicts are known: it has no pass@4.
    assert found == pytest.approx({"1": (1 / 4 + 0 + 1) / 3, "2": (1 / 2 + 0 + 1) / 3, "4": (1 + 0) / 2})
    assert [row.pass_rate for row in rows] == [0.25, 0.0, 1.0]
    assert [answered(1, right).pass_rate for right in (True, False, None)] == [1.0, 0.0, None]


def of(pairs: list[tuple[str, object]]) -> Evaluation:
    return Evaluation([answered(i, True, text, truth) for i, (text, truth) in enumerate(pairs)])


def test_labels_are_read_from_the_answer_tag():  # covers O8
    pairs = [("<think>fear?</think><answer>Joy.</answer>", "joy"), ("joy", "joy"), ("<answer>joy</answer>", "fear")]
    found = figures(of([*pairs, ("fear", "<answer>fear</answer>")]))
    assert (found["war"], found["uar"]) == (3 / 4, (1 + 1 / 2) / 2) and "yes_no" not in found


def test_yes_and_no_are_read_as_pope_reads_them():  # covers L9
    pairs = [("Yes, there is. Not sure.", "yes"), ("There is no dog, I think", "No"), ("A dog.", "no"), ("", "yes")]
    found = figures(of(pairs))
    assert found["yes_no"] == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}
    assert figures(of([("no", "no"), ("yes", "no")]))["yes_no"]["f1"] == 0.0, "a class that is absent"


def test_classes_are_few_and_recur():
    free = of([(f"sentence {i}", f"sentence {i}") for i in range(8)])
    assert "war" not in figures(free) and figures(free, labels="yes")["war"] == 1.0
    few = of([("a", "a"), ("b", "b")] * 2)
    assert figures(few)["uar"] == 1.0 and "uar" not in figures(few, labels="no")
    assert "war" not in figures(of([("a", None), ("b", ["x"])]), labels="yes"), "no label at all"
    assert figures(of([("7", 7.0), ("3", 7), ("3", 3), ("3", 3)]))["uar"] == 0.75, "numbers as they are written"


def test_accuracy_by_column():
    pairs = [("cat", True), ("dog", False), ("cat", False), (None, True), ("cat", None)]
    rows = [answered(i, right, columns={"kind": kind}) for i, (kind, right) in enumerate(pairs)]
    found = figures(Evaluation(rows), by=["kind"])["by"]["kind"]
    assert list(found) == ["cat", "", "dog"] and found["cat"]["rows"] == 2 and found["cat"]["accuracy"] == 0.5
    assert found["dog"]["ci95"] == pytest.approx([0.0, 0.7935], abs=1e-4)


# ---- written and shown -----------------------------------------------------------------------------------------------


def test_rows_of_a_state_take_the_place_of_older_ones(tmp_path: Path):
    path = tmp_path / "evaluation.jsonl"
    assert read_verdicts(path, "before") == {}
    odd = answered(2, None, "line\u2028break", {"nested": {1, 2}})
    write_rows(path, "before", Evaluation([answered(1, True, "yes", "yes"), odd]))
    write_rows(path, "after", Evaluation([answered(1, False)]))
    write_rows(path, "after", Evaluation([answered(1, True), answered(3, False)]))
    assert read_verdicts(path, "before") == {1: True} and read_verdicts(path, "after") == {1: True, 3: False}
    failed = Answered(4, "p", ["a.png"], "c", {"api": Failed("HTTP 503"), "len": 1.0}, None, None, "t")
    write_rows(path, "control", Evaluation([replace(failed, drawn=("x", "y"), drawn_correct=(True, None))]))
    last = json.loads(path.read_text().splitlines()[-1])
    assert last == {
        "state": "control",
        "row": 4,
        "prompt": "p",
        "completion": "c",
        "answer": "t",
        "correct": None,
        "rewards": {"api": None, "len": 1.0},
        "media": ["a.png"],
        "failed": {"api": "HTTP 503"},
        "pass_rate": 1.0,
        "drawn": [{"completion": "x", "correct": True}, {"completion": "y", "correct": None}],
    }


def test_the_page_shows_every_state_and_says_what_it_means():
    seeing = Evaluation([answered(i, i < 30, "yes", "yes", columns={"kind": f"k{i}"}) for i in range(40)])
    blind = Evaluation([answered(i, i < 10, "no", "yes", columns={"kind": f"k{i}"}) for i in range(40)], left_out=1)
    loss = {"kind": "blank", "change": change(seeing.verdicts, blind.verdicts)}
    evaluation = {
        "before": figures(seeing, ["kind"]),
        "after": figures(seeing, ["kind"]),
        "control": figures(blind, ["kind"]) | loss,
        "change": change(seeing.verdicts, seeing.verdicts),
        "settings": {},
    }
    console = Console(width=110, file=io.StringIO(), record=True)
    console.print(page(evaluation, {"after": "[b]mine[/b]"}))
    text = console.export_text()
    assert "75.0% [59.8–85.8]" in text and "[b]mine[/b]" in text and "control (blank)" in text
    assert "Change: +0.0 points [+0.0, +0.0], p = 1, 40 rows: too little to tell the two apart" in text
    assert "With its media blanked: -50.0 points" in text and "40 rows: the answers hang on the media" in text
    assert "yes/no F1" in text and "rows left out" in text
    assert "Accuracy by kind" in text and "and 20 more values in evaluation.json" in text


def test_what_is_right_is_not_said_by_the_form_of_an_answer(caplog):
    """Presets and people name the format first; a wrong answer in good form is no right one."""
    specs = [RewardSpec(name=name, kwargs=more) for name, more in (("format", {}), ("length", {"max_length": 9}))]
    specs.append(RewardSpec(name="length_bonus"))
    assert yardstick_of([*specs, RewardSpec(name="caption_type")]).judge == "caption_type"
    assert "nor to one whose answer is yes. Measure a reward that gives verdicts beside it" in caplog.text
    assert yardstick_of([RewardSpec(name="caption_type"), RewardSpec(name="accuracy", weight=0)]).judge == "accuracy"
    assert yardstick_of([*specs, RewardSpec(name="actions")]).judge == "actions"
    assert yardstick_of(specs).judge == "format", "there is nothing else"
    assert yardstick_of([*specs, RewardSpec(name="accuracy")], correct="format").judge == "format"


def test_an_answer_that_is_no_number_stands_as_null(tmp_path: Path):
    write_rows(tmp_path / "rows.jsonl", "after", Evaluation([answered(1, False, truth=float("nan"))]))
    assert json.loads((tmp_path / "rows.jsonl").read_text())["answer"] is None


def test_rows_without_a_verdict_say_nothing_of_a_change():
    none = figures(Evaluation([answered(1, None)]))
    found = {"before": none, "after": none, "change": change({}, {})}
    out = io.StringIO()
    Console(file=out, width=100).print(page(found))
    assert "Change" not in out.getvalue() and none["unscored"] == 1
