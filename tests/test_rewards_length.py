"""Length, overlong and repetition rewards by hand, and completions made to cheat."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_grpo.errors import RewardError
from vlm_grpo.rewards.length import Length, Overlong
from vlm_grpo.rewards.repetition import Repetition


def of_tokens(reward, count, **columns):
    return reward([""], completion_ids=[list(range(count))], **{name: [value] for name, value in columns.items()})[0]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, -1.0), (1, -0.75), (3, -0.25), (4, 0.0), (10, 0.0), (11, -0.1), (15, -0.5), (20, -1.0), (500, -1.0)],
)
def test_length_outside_its_bounds(tokens, expected):
    assert of_tokens(Length(min_length=4, max_length=10), tokens) == pytest.approx(expected)
    assert of_tokens(Length(min_length=4, max_length=10, penalty=-2), tokens) == pytest.approx(2 * expected)


def test_length_with_one_bound_and_with_a_reach():
    assert of_tokens(Length(max_length=10), 0) == 0.0
    assert of_tokens(Length(min_length=4), 500) == 0.0
    assert of_tokens(Length(max_length=10, reach=2), 11) == -0.5


@pytest.mark.parametrize(
    ("completion", "unit", "expected"),
    [
        ("one two three four five", "words", 0.0),
        ("one two three four five six", "words", -0.2),
        ("今天天气好", "words", 0.0),
        ("今天天气很好", "words", -0.2),
        ("one" + " " * 500, "words", 0.0),
        (" \n\u3000 ", "words", 0.0),
        ("x" * 500, "words", 0.0),  # one word, however long
        ("x" * 500, "characters", -1.0),
        ("abc", "characters", 0.0),
        ("a" + " " * 500 + "b", "characters", 0.0),
        ("abc de", "characters", -0.2),
        ([{"role": "assistant", "content": "abcdef"}], "characters", -0.2),
        ([], "characters", 0.0),
    ],
)
def test_length_in_words_and_characters(completion, unit, expected):
    assert Length(max_length=5, unit=unit)([completion]) == [pytest.approx(expected)]


# covers L6
@pytest.mark.parametrize(
    ("tokens", "bonus", "expected"),
    [
        (0, 1.0, 0.0),
        (128, 1.0, -2.5),
        (128, 0.5, -1.25),
        (512, 1, -10.0),
        (999, 1.0, -10.0),
        (128, -1.0, 2.5),
        (128, 0, 0.0),
        (128, None, None),
        (128, float("nan"), None),
    ],
)
def test_llava_rlhf_length_penalty(tokens, bonus, expected):
    reward = Length(variant="llava-rlhf")
    reward.use_run(processor=None, media=None, max_completion_length=512)
    assert of_tokens(reward, tokens, length_bonus=bonus) == expected
    mine = Length(variant="llava-rlhf", max_length=512, penalty=-1, column="bonus")
    mine.use_run(max_completion_length=7)
    assert of_tokens(mine, tokens, bonus=bonus) == (None if expected is None else expected / 10)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (10_000, -1.0)],
)
def test_overlong_by_hand(tokens, expected):
    assert of_tokens(Overlong(max_completion_length=100, cache=20), tokens) == pytest.approx(expected)
    reward = Overlong()  # a fifth of the run's limit
    reward.use_run(max_completion_length=100)
    assert of_tokens(reward, tokens) == pytest.approx(expected)
    mine = Overlong(max_completion_length=100)
    mine.use_run(max_completion_length=7)
    assert of_tokens(mine, tokens) == pytest.approx(expected)


def test_overlong_without_a_cache():
    assert [of_tokens(Overlong(100, cache=0), tokens) for tokens in (100, 101)] == [0.0, -1.0]


@pytest.mark.parametrize(
    ("completion", "options", "expected"),
    [
        ("", {}, 0.0),
        ("  \n", {}, 0.0),
        ("one two", {}, 0.0),
        ("one two three four", {}, 0.0),
        ("a b c a b c", {}, -1 / 4),  # abc bca cab abc
        ("A b C a B c", {}, -1 / 4),
        ("go go go go go", {}, -2 / 3),
        ("go " * 1000, {}, -997 / 998),
        ("go " * 5, {"max_penalty": -3.0}, -2.0),
        ("go " * 5, {"ngram": 1}, -4 / 5),
        ("好好好好好", {}, -2 / 3),
        ("今天天气今天天气", {}, -2 / 6),  # 今天天 天天气 天气今 气今天 and two again
        ("ha" * 50, {}, 0.0),  # one word
        ("ha" * 50, {"unit": "characters"}, -96 / 98),
        ([{"role": "assistant", "content": "a b c a b c"}], {}, -1 / 4),
    ],
)
def test_repetition_by_hand(completion, options, expected):
    reward = Repetition(**{"unit": "words", **options})
    assert reward([completion]) == [pytest.approx(expected)]


def test_repetition_of_tokens():
    assert Repetition()(["x", "x", "x"], completion_ids=[[5, 5, 5, 5, 5], [1, 2, 3, 4], []]) == pytest.approx(
        [-2 / 3, 0.0, 0.0]
    )


@pytest.mark.parametrize(
    ("make", "columns", "message"),
    [
        (lambda: Length(), {}, "there is neither min_length nor max_length"),
        (lambda: Length(max_length=0), {}, "max_length=0 is not a number of at least 1"),
        (lambda: Length(min_length=9, max_length=4), {}, "min_length 9 is above max_length 4"),
        (lambda: Length(max_length=4, penalty=1), {}, "penalty is 1. Give a number of at most 0"),
        (lambda: Length(max_length=4, unit="lines"), {}, "unit='lines' is none of tokens, words, characters"),
        (lambda: Length(max_length=4), {}, 'there are no completion_ids .* set unit to "words" or "characters"'),
        (lambda: Length("llava-rlhf"), {"completion_ids": [[1]]}, "there is no max_length"),
        (lambda: Length("llava-rlhf", max_length=4), {"completion_ids": [[1]]}, 'no column "length_bonus"'),
        (
            lambda: Length("llava-rlhf", max_length=4),
            {"completion_ids": [[1]], "length_bonus": ["much"]},
            "the column \"length_bonus\" holds 'much'. Put a number there",
        ),
        (lambda: Overlong(), {"completion_ids": [[1]]}, "there is no max_completion_length"),
        (lambda: Overlong(9), {}, "there are no completion_ids"),
        (lambda: Overlong(9, cache=10), {}, "cache is 10, above max_completion_length 9"),
        (lambda: Overlong(0), {}, "max_completion_length=0 is not a number of at least 1"),
        (lambda: Repetition(), {}, "there are no completion_ids"),
        (lambda: Repetition(ngram=0), {}, "ngram=0 is not a number of at least 1"),
        (lambda: Repetition(max_penalty=1), {}, "max_penalty is 1"),
    ],
)
def test_what_users_get_wrong_is_named(make, columns, message):
    with pytest.raises(RewardError, match=message):
        make()([""], **columns)


def test_a_cache_above_the_runs_limit_is_named_when_the_run_gives_it():
    reward = Overlong(cache=64)
    with pytest.raises(RewardError, match="cache is 64, above max_completion_length 32"):
        reward.use_run(max_completion_length=32)


def test_rewards_go_to_other_processes():
    for reward in (Length(max_length=4), Overlong(9), Repetition()):
        again = pickle.loads(pickle.dumps(reward))
        assert of_tokens(again, 9) == of_tokens(reward, 9)
        assert again.__name__ == type(reward).__name__.lower()


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.text(max_size=40), st.lists(st.integers(0, 3), max_size=40), st.floats(-3, 3))
def test_any_completion_stays_in_range(completion, ids, bonus):
    bonus_range = Length("llava-rlhf", max_length=8)([completion], completion_ids=[ids], length_bonus=[bonus])[0]
    assert bonus_range is not None and -10 * abs(bonus) <= bonus_range <= 10 * abs(bonus)
    for reward in (Length(min_length=5, max_length=9), Overlong(20), Repetition()):
        assert -1 <= reward([completion], completion_ids=[ids])[0] <= 0
    for unit in ("words", "characters"):
        for made in (Length(min_length=5, max_length=9, unit=unit), Repetition(unit=unit)):
            assert -1 <= made([completion])[0] <= 0
