"""Built-in rewards on hostile completions, and a user's own: by name, by file, by module, and what they do wrong."""

import asyncio
import math
import time

import numpy as np
import pytest
import torch

from vlm_grpo import load_rewards
from vlm_grpo.config import RewardSpec
from vlm_grpo.errors import RewardError
from vlm_grpo.rewards.accuracy import accuracy
from vlm_grpo.rewards.format import think_answer_format


def right(completion, answer) -> float | None:
    return accuracy([completion], answer=[answer])[0]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("<answer>1</answer> or <answer>2</answer>", "1", 1.0),  # the first counts
        ("<answer>1</answer> or <answer>2</answer>", "2", 0.0),
        ("<answer><answer>2</answer></answer>", "2", 0.0),
        ("</answer><answer>2</answer>", "2", 1.0),
        ("<answer></answer>2", "2", 0.0),
        ("<answer>2", "2", 0.0),
        ("<ANSWER>2</ANSWER>", "2", 0.0),
        ("<think>2</think> <answer>\n two \n</answer>", "two", 1.0),
        ("the answer is 2", "2", 0.0),
        (" SEVEN. ", "seven", 1.0),
        ("**7**", "7", 1.0),
        ("7!?", "7", 1.0),
        ("“7”", "7", 1.0),
        ("-7", "7", 0.0),
        ("7%", "7", 0.0),
        ("(0, 1]", "[0, 1)", 0.0),
        ("new   york", "New\tYork", 1.0),
        ("STRASSE", "straße", 1.0),
        ("e\u0301te\u0301", "été", 1.0),  # composed and decomposed
        ("x²", "x2", 0.0),
        ("<answer>2</answer>", "<answer>2</answer>", 1.0),
        ("", "", 0.0),
        (" . ", ".", 0.0),
        ("<answer>   </answer>", " ", 0.0),
        ("7", 7, 1.0),
        ("7", 7.0, 1.0),  # a column of whole numbers beside a fraction
        ("1.5", 1.5, 1.0),
        ("true", True, 1.0),
        ("7", None, None),
        ([{"role": "assistant", "content": "7"}], "7", 1.0),
        ([{"role": "assistant", "content": "no"}, {"role": "tool", "content": "x"}, {"content": "7"}], "7", 1.0),
        ([{"role": "assistant", "content": [{"type": "text", "text": "<answer>7"}, {"text": "</answer>"}]}], "7", 1.0),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "7", 0.0),
        ([], "7", 0.0),
    ],
)
def test_accuracy(completion, answer, expected):
    assert right(completion, answer) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("<answer>b</answer><think>a</think>", 0.6),
        ("<think><answer>b</answer></think>", 0.6),
        ("<answer>1</answer><think>a</think><answer>b</answer>", 0.6),
        ("<think>a</think>", 0.3),
        ("</answer><answer>b</answer>", 0.3),
        ("<think>a<answer>b", 0.0),
        ("</think><think>", 0.0),
        ("<think></think><answer></answer>", 1.0),
        ("", 0.0),
        ("a <think>x</think> b <answer>y</answer> c", 1.0),
    ],
)
def test_format(completion, expected):
    # covers Q3
    assert think_answer_format([completion]) == [expected]
    assert think_answer_format([[{"role": "assistant", "content": completion}]], answer=["x"]) == [expected]


@pytest.mark.parametrize(
    "piece",
    ["<answer>", "<think>", "</answer>", "<answer></answer>", " ", ".", "\n", "<", "<answer>.", "<think><answer>"],
)
def test_a_megabyte_takes_no_time(piece):
    text = piece * (1_000_000 // len(piece))
    start = time.perf_counter()
    right(text, "7")
    right(f"<answer>{text}", "7")
    think_answer_format([text, f"<think>{text}"])
    assert time.perf_counter() - start < 1.0, "0.01 s on an idle machine"


# ---- a user's own -----------------------------------------------------------------------------------------------

OWN = """
import dataclasses

@dataclasses.dataclass
class Scale:
    factor: float = 2.0
    def __call__(self, completions, **columns):
        return [self.factor] * len(completions)

class Later:
    async def __call__(self, completions, **columns):
        return [4.0] * len(completions)

double = Scale()
later = Later()

def length(completions, factor=1.0, **columns):
    return [factor * len(text) for text in completions]

async def slow(completions, **columns):
    return [float(len(text)) for text in completions]

def table(completions, values, **columns):
    return values

async def slow_table(completions, values, **columns):
    return values

def boom(completions, **columns):
    raise KeyError("first line\\nsecond line")

number = 5
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(OWN)
    return path


def one(name, **spec):
    functions, weights = load_rewards([RewardSpec(name=str(name), **spec)])
    return functions[0]


def test_names_files_modules_weights_and_arguments(own, monkeypatch):
    # covers A5
    specs = ["accuracy", RewardSpec(name="format", weight=0.3), RewardSpec(name=f"{own}:length", kwargs={"factor": 2})]
    functions, weights = load_rewards(specs)
    assert weights == [1.0, 0.3, 1.0]
    assert [function.__name__ for function in functions] == ["accuracy", "format", "length"], "as metrics name them"
    assert functions[0](completions=["a"], answer=["a"]) == [1.0]
    assert functions[2](prompts=["p"], completions=["abc"], answer=["x"]) == [6.0]
    assert one(f"{own}:double")(completions=["a", "b"]) == [2.0, 2.0]
    assert one("accuracy", kwargs={"column": "label"})(completions=["a"], label=["a"], answer=["b"]) == [1.0]
    monkeypatch.syspath_prepend(str(own.parent))
    assert one("my_rewards:length")(completions=["abc"]) == [3.0]


def test_two_rewards_of_one_name_stay_apart(own, tmp_path):
    """TRL files metrics and samples under a reward's name."""
    (tmp_path / "other.py").write_text("def length(completions, **columns):\n    return [0.0] * len(completions)\n")
    functions, _ = load_rewards([f"{own}:length", "format", f"{tmp_path / 'other.py'}:length", f"{own}:length"])
    names = [function.__name__ for function in functions]
    assert names[:2] == ["length", "format"] and len(set(names)) == 4
    assert [function(completions=["abc"])[0] for function in functions] == [3.0, 0.0, 0.0, 3.0]


def test_async_rewards_stay_async(own):
    from trl.trainer.utils import is_async_callable

    for name, expected in (("slow", [3.0]), ("later", [4.0])):
        function = one(f"{own}:{name}")
        assert is_async_callable(function), "TRL awaits it together with the others"
        assert asyncio.run(function(completions=["abc"])) == expected
    with pytest.raises(RewardError, match="returned nan"):
        asyncio.run(one(f"{own}:slow_table")(completions=["a"], values=[math.nan]))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1.0, math.nan], "returned nan. Return a finite number, or None"),
        ([1.0, math.inf], "returned inf"),
        (torch.tensor([1.0, math.nan]), "returned nan|returned tensor"),
        ([1.0], "returned 1 values for 2 completions"),
        ([1.0] * 3, "returned 3 values for 2 completions"),
        ([1.0, "1"], "returned '1'. Return a finite number"),
        (None, "returned None. Return a list"),
        (1.0, "returned 1.0. Return a list"),
        ("ab", "returned 'ab'. Return a list"),
    ],
    ids=repr,
)
def test_what_a_reward_may_not_return(own, values, sentence):
    with pytest.raises(RewardError, match=sentence) as caught:
        one(f"{own}:table")(completions=["a", "b"], values=values)
    assert 'my_rewards.py:table"' in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [[1, None], (1.0, True), np.array([1.0, 2.0]), torch.tensor([1.0, 2.0])], ids=repr)
def test_what_a_reward_may_return(own, values):
    assert one(f"{own}:table")(completions=["a", "b"], values=values) == list(values)


def test_a_reward_that_raises_is_named(own):
    with pytest.raises(RewardError, match='boom" failed with KeyError: .*first line.* Fix it there') as caught:
        one(f"{own}:boom")(completions=["a"])
    assert "\n" not in str(caught.value) and isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RewardError, match=r'The reward "accuracy": there is no column "answer" .the rows have: label'):
        one("accuracy")(prompts=["p"], completions=["a"], completion_ids=[[1]], label=["x"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("acuracy", 'There is no reward "acuracy". Did you mean "accuracy"'),
        ("{own}:lenght", 'has no function "lenght". Did you mean "length"'),
        ("{own}:number", 'has no function "number"'),
        ("nowhere.py:f", 'the file "nowhere.py" does not exist'),
        ("no_such_module:f", "importing no_such_module failed with ModuleNotFoundError"),
        ("{broken}:f", "failed with SyntaxError"),
        ("{leaves}:f", "failed with ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_found_is_said(own, name, sentence, tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("1 / 0\n")
    name = name.format(own=own, broken=tmp_path / "broken.py", leaves=tmp_path / "leaves.py")
    with pytest.raises(RewardError, match=sentence) as caught:
        load_rewards([name])
    assert "\n" not in str(caught.value)


def test_no_reward_is_refused():
    with pytest.raises(RewardError, match="No reward is given"):
        load_rewards([])
