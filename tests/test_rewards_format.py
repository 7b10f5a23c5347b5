"""The format reward on hostile completions: graded (Q3) and strict (O6), by hand."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_grpo import load_rewards
from vlm_grpo.config import RewardSpec
from vlm_grpo.errors import RewardError
from vlm_grpo.rewards.format import think_answer_format

PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<",
    ">",
    "/",
    "a",
    " ",
    "\n",
    "\u200b",
    "\x00",
    "é",
    "<think a>",
]
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text(max_size=60)


@pytest.mark.parametrize(
    ("completion", "graded", "strict"),
    [
        ("<think>a</think><answer>b</answer>", 1.0, 1.0),
        ("  <think>a</think>\n\n<answer>b</answer>\n", 1.0, 1.0),
        ("<think>\na\n\nb\n</think>\n<answer>\n1\n2\n</answer>", 1.0, 1.0),  # multi-line bodies
        ("<think>1 < 2 > 0 </ x></think><answer><b></answer>", 1.0, 1.0),
        ("<think></think><answer></answer>", 1.0, 0.0),
        ("<think> \n</think><answer>b</answer>", 1.0, 0.0),
        ("<think>a</think><answer>\u200b</answer>", 1.0, 0.0),  # a space of no width
        ("a <think>x</think> b <answer>y</answer> c", 1.0, 0.0),
        ("<think>a</think>, <answer>b</answer>", 1.0, 0.0),
        ("<think>a</think><answer>b</answer>.", 1.0, 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 1.0, 0.0),  # exactly one answer
        ("<think>a</think><answer>b<answer>c</answer></answer>", 1.0, 0.0),
        ("<think>a</think><think>b</think><answer>c</answer>", 1.0, 0.0),
        ("<think>a<think>b</think><answer>c</answer>", 1.0, 0.0),
        ("<think>a</think></think><answer>c</answer>", 1.0, 0.0),
        ("<answer>b</answer><think>a</think>", 0.6, 0.0),
        ("<think><answer>b</answer></think>", 0.6, 0.0),
        ("<think>a<answer>b</think></answer>", 0.6, 0.0),
        ("<answer>1</answer><think>a</think><answer>b</answer>", 0.6, 0.0),
        ("<think>a</think>", 0.3, 0.0),
        ("<answer>b</answer>", 0.3, 0.0),
        ("<think>a<answer>b</answer>", 0.3, 0.0),  # unclosed
        ("<think>a</think><answer>b", 0.3, 0.0),
        ("</answer><answer>b</answer>", 0.3, 0.0),
        ("<Think>a</Think><Answer>b</Answer>", 0.0, 0.0),
        ('<think a="1">a</think><answer a="1">b</answer>', 0.0, 0.0),
        ("<think >a</think><answer >b</answer>", 0.0, 0.0),
        ("&lt;think&gt;a&lt;/think&gt;", 0.0, 0.0),
        ("</think><think>", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_by_hand(completion, graded, strict):  # covers Q3 O6
    assert think_answer_format([completion]) == [graded]
    assert think_answer_format([completion], strict=True) == [strict]
    messages = [{"role": "assistant", "content": [{"type": "text", "text": completion}]}]
    assert think_answer_format([messages], strict=True, answer=["x"]) == [strict]


def test_other_tags():
    text = "<plan>a</plan> <code>b</code> <check>c</check>"
    assert think_answer_format([text], strict=True, tags=["plan", "code", "check"]) == [1.0]
    assert think_answer_format([text], strict=True, tags=["code", "plan", "check"]) == [0.0]
    assert think_answer_format([text], tags=["plan", "check"]) == [1.0]
    assert think_answer_format([text], tags=["check", "plan"]) == [0.6]
    assert think_answer_format(["<answer>b</answer>", "b"], strict=True, tags=["answer"]) == [1.0, 0.0]


def test_by_name_with_options():
    (reward,), _ = load_rewards([RewardSpec(name="format", kwargs={"strict": True})])
    assert reward(prompts=["p"], completions=["a <think>x</think><answer>y</answer>"], completion_ids=[[1]]) == [0.0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"strict": "yes"}, "strict='yes' is not true or false"),
        ({"strict": ["a"]}, 'if it is the column "strict" of the dataset, rename that'),
        ({"tags": ["think"]}, "the graded form needs two tags. Name two, or set strict=true"),
        ({"tags": "think"}, "tags='think' is not a list of different tag names"),
        ({"tags": ["a", "a"]}, "not a list of different"),
        ({"tags": ["<a>", "b"]}, "not a list of different"),
        ({"tags": [], "strict": True}, "needs two tags"),
    ],
)
def test_wrong_options_are_named(options, sentence):
    with pytest.raises(RewardError, match=sentence):
        think_answer_format(["a"], **options)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(HOSTILE)
def test_any_text_has_a_value_of_the_range(text):
    graded, strict = think_answer_format([text])[0], think_answer_format([text], strict=True)[0]
    assert graded in (0.0, 0.3, 0.6, 1.0) and strict in (0.0, 1.0)
    assert strict <= graded, "what is strictly right has the full grade too"


@pytest.mark.parametrize(
    "piece", ["<think>", "</answer>", "<answer></answer>", "<think></think>", " ", "\n<", "\u200b"]
)
def test_a_megabyte_takes_no_time(piece):
    text = piece * (1_000_000 // len(piece))
    start = time.process_time()
    think_answer_format([text, f"<think>{text}", f"<think>a</think>{text}<answer>{text}</answer>"], strict=True)
    think_answer_format([text, f"<think>{text}</think>"])
    assert time.process_time() - start < 1.5, "0.1 s on an idle machine"
