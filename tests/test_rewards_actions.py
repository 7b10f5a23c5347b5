"""Sets of actions (Q4) and counting on hostile completions, by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_grpo.errors import RewardError
from vlm_grpo.rewards.actions import actions
from vlm_grpo.rewards.counting import counting

ALL = "".join(f"({i})" for i in range(1, 11))


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("<answer>(1) (2)</answer>", "(1) (2)", 1.0),
        ("<answer>(2) (1)</answer>", "(1) (2)", 1.0),  # order does not count
        ("<answer>(10) (9) (2)</answer>", "(2) (9) (10)", 1.0),  # nor does text order: "10" < "2" < "9"
        ("<answer>(1) open (2) pour</answer>", "<answer>(1) open (2) pour</answer>", 1.0),
        ("<think>(7)</think><answer>(1)</answer>(8)", "(1)", 1.0),  # only what the tag has
        ("<answer>(1) (2)</answer>", "(2) (3)", 1 / 3),
        ("<answer>(1)</answer>", "(1) (2)", 0.5),
        ("<answer>(1) (1)</answer>", "(1)", 1.0),  # repetitions do not count
        ("<answer>(1) (1) (2)</answer>", "(1) (2) (2)", 1.0),
        ("<answer>(01)</answer>", "(1)", 1.0),
        (f"<answer>{ALL}</answer>", "(3)", 0.1),  # all of them: one in ten
        (f"<answer>{ALL * 1000}</answer>", "(3)", 0.1),
        (f"<answer>({'9' * 10_000}) (1)</answer>", "(1)", 0.5),
        ("<answer>(1)</answer><answer>(2)</answer>", "(2)", 0.0),  # the first tag
        ("<answer>(1)<answer>(2)</answer></answer>", "(2)", 0.5),
        ("<answer></answer>", "", 0.0),  # both empty: to say nothing is not right
        ("<answer>none</answer>", [], 0.0),
        ("<answer>(1)</answer>", "", 0.0),
        ("<answer></answer>", "(1)", 0.0),
        ("(1)", "(1)", 0.0),  # no tag
        ("<answer>(1)", "(1)", 0.0),
        ("(1)</answer>", "(1)", 0.0),
        ("<answer>1</answer>", "(1)", 0.0),
        ("<answer>( 1 ) (-1) (1.0) (²) (一)</answer>", "(1)", 0.0),
        ("<answer>(1) (4)</answer>", [4, 1], 1.0),
        ("<answer>(1) (4)</answer>", [4.0, 1.0, None], 1.0),  # a table makes floats of whole numbers beside a gap
        ("<answer>(1) (4)</answer>", ["(4)", "1"], 1.0),
        ("<answer>(4)</answer>", 4, None),
        ("<answer>(1)</answer>", None, None),
    ],
)
def test_actions(completion, answer, expected):  # covers Q4
    if answer == 4:
        with pytest.raises(RewardError, match='the right answer .4. has no ids like "'):
            actions([completion], answer=[answer])
        return
    value = actions([completion], answer=[answer])[0]
    assert value is None if expected is None else value == pytest.approx(expected)
    assert actions([[{"role": "assistant", "content": completion}]], answer=[answer])[0] == value


def test_truths_stay_with_their_completions():
    """The original paired ground truths with the wrong completions at a batch above 1."""
    said = ["<answer>(1)</answer>", "<answer>(2)</answer>", "<answer>(3)</answer>"]
    assert actions(said, answer=["(1)", "(1)", None]) == [1.0, 0.0, None]
    assert actions(said, column="steps", steps=[[1], [2, 1], [3]]) == [1.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"answer": ["run, jump"]}, r"'run, jump' has no ids like \"\(1\) \(4\)\". Correct the row"),
        ({"label": ["(1)"]}, 'there is no column "answer" .the rows have: label'),
        ({"answer": [["run"]]}, "has no ids"),
    ],
)
def test_wrong_rows_are_named(columns, sentence):
    with pytest.raises(RewardError, match=sentence):
        actions(["<answer>(1)</answer>"], **columns)


@pytest.mark.parametrize(
    ("completion", "answer", "partial", "exact"),
    [
        ("7", 7, 1.0, 1.0),
        ("<think>1 2 3 4</think><answer>There are 7 dogs.</answer>", "7", 1.0, 1.0),
        ("seven", "7", 1.0, 1.0),
        ("There are Twenty-One of them", 21, 1.0, 1.0),
        ("7", "seven", 1.0, 1.0),
        ("none", 0, 1.0, 1.0),
        ("1,000", 1000.0, 1.0, 1.0),
        ("2 cats + 1 dog = 3", 3, 1.0, 1.0),  # of several the one that is called the answer
        ("of the 9, the answer is 7", 7, 1.0, 1.0),
        ("7 (seven) dogs: 7", 7, 1.0, 1.0),
        ("6", 7, 1 - 1 / 7, 0.0),
        ("8", 7, 1 - 1 / 7, 0.0),
        ("1", 0, 0.0, 0.0),
        ("0", 4, 0.0, 0.0),
        ("8", 4, 0.0, 0.0),
        ("999999999", 4, 0.0, 0.0),
        ("9" * 5000, 4, 0.0, 0.0),
        ("1 2 3 4 5 6 7", 7, 0.0, 0.0),  # listing them wins nothing
        ("7 6 5 4 3 2 1", 7, 0.0, 0.0),
        ("6 or 7", 7, 0.0, 0.0),
        ("6-8", 7, 0.0, 0.0),
        ("= 6 = 7", 7, 0.0, 0.0),
        ("the answer is 6, the answer is 7", 7, 0.0, 0.0),
        ("six seven", 7, 0.0, 0.0),
        ("6.5", 7, 0.0, 0.0),  # a hedge between two
        ("-7", 7, 0.0, 0.0),
        ("700%", 7, 1.0, 1.0),
        ("<answer></answer>7", 7, 0.0, 0.0),
        ("<answer>6</answer><answer>7</answer>", 7, 1 - 1 / 7, 0.0),
        ("many", 7, 0.0, 0.0),
        ("", 7, 0.0, 0.0),
        ("6", [5, 7], 1 - 1 / 7, 0.0),  # the nearest of those accepted
        ("7", [5, 7], 1.0, 1.0),
        ("7", None, None, None),
        ("7", [], None, None),
    ],
)
def test_counting(completion, answer, partial, exact):
    values = (counting([completion], answer=[answer])[0], counting([completion], answer=[answer], partial=False)[0])
    for value, expected in zip(values, (partial, exact), strict=True):
        assert value is None if expected is None else value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"answer": ["many"]}, "'many' is not a count. Correct the row: a whole number from 0"),
        ({"answer": [2.5]}, "'2.5' is not a count"),
        ({"count": [2]}, 'there is no column "answer" .the rows have: count'),
        ({"answer": [2], "partial": 1}, "partial=1 is not true or false"),
        ({"answer": [2], "partial": [2]}, 'if it is the column "partial" of the dataset'),
    ],
)
def test_wrong_counts_are_named(arguments, sentence):
    with pytest.raises(RewardError, match=sentence):
        counting(["2"], **arguments)


PIECES = ["<answer>", "</answer>", "(1)", "(2)", "(", ")", "7", "1,0", "-", "/", ".", "e9", "%", "=", " ", "seven", "²"]
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(max_size=60)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(HOSTILE)
def test_any_text_has_a_value_of_the_range(text):
    assert 0.0 <= actions([text], answer=["(1) (2)"])[0] <= 1.0
    assert 0.0 <= counting([text], answer=[7])[0] <= 1.0
    assert counting([text], answer=[7], partial=False)[0] in (0.0, 1.0)
