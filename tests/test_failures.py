"""Rewards that fail: not 0, not None, but a row without a say; counted, logged, and too many stop the run."""

import asyncio
import json
import time
from decimal import Decimal

import pytest
import recorder
import torch
from datasets import Dataset
from test_rewards import one
from test_trainer import VLMGRPOTrainer, logged, rows, tiny
from test_trainer import train as train_with

from vlm_grpo import load_rewards
from vlm_grpo.callbacks import SamplesCallback
from vlm_grpo.config import RewardSpec
from vlm_grpo.errors import ConfigError, RewardError
from vlm_grpo.rewards import Failed

GROUP = {"num_generations": 4, "steps_per_generation": 1, "gradient_accumulation_steps": 1}
FORMAT = [1.0, 0.0, 1.0, 0.3]
JUDGE = [0.5, Failed("HTTP 503 after 4 tries"), 0.2, 0.9]


def train(path, reward, **options):
    return train_with(rows(1), path, reward=reward, **GROUP, **options)


def shape(completions, **columns):
    return FORMAT * (len(completions) // 4)


def judge(completions, **columns):
    return JUDGE * (len(completions) // 4)


async def async_judge(completions, **columns):
    return JUDGE * (len(completions) // 4)


@pytest.mark.parametrize("function", [judge, async_judge])
def test_a_failed_call_takes_its_row_out_of_the_baseline(function, tmp_path):
    # covers A4
    # Totals 1.5, -, 1.2, 1.2: mean 1.3, standard deviation sqrt((0.2² + 0.1² + 0.1²) / 2) = 0.17320508. Were the failed
    # call a 0, the second row would have the total 0 and pull the mean to 0.975.
    trainer = train(tmp_path, [shape, function], max_steps=1, max_reward_failures=1.0)
    scale = 0.03**0.5 + 1e-4
    expected = torch.tensor([0.2, 0.0, -0.1, -0.1]) / scale
    assert torch.allclose(torch.tensor(list(trainer._logs["advantages"])[:4]), expected, atol=1e-5)
    assert logged(trainer, f"rewards/{function.__name__}/failed")[0] == 0.25
    assert logged(trainer, "rewards/shape/mean")[0] == pytest.approx((1.0 + 1.0 + 0.3) / 3, abs=1e-6)
    assert logged(trainer, "reward")[0] == pytest.approx(1.3, abs=1e-6)


def test_none_keeps_its_meaning(tmp_path):
    # covers U8
    # None is "not applicable": the row's total is what the other function gave, 0.0 in the second row.
    def sometimes(completions, **columns):
        return [0.5, None, 0.2, 0.9]

    trainer = train(tmp_path, [shape, sometimes], max_steps=1)
    totals = torch.tensor([1.5, 0.0, 1.2, 1.2])
    expected = (totals - totals.mean()) / (totals.std() + 1e-4)
    assert torch.allclose(torch.tensor(list(trainer._logs["advantages"])[:4]), expected, atol=1e-5)
    assert not logged(trainer, "rewards/sometimes/failed")


def test_the_sample_log_says_why(tmp_path):
    # covers Q9
    model, processor = tiny.build("qwen2_5_vl")
    trainer = VLMGRPOTrainer(
        model,
        [shape, judge],
        recorder.config(tmp_path, max_steps=1, **GROUP),
        Dataset.from_list(rows(1)),
        processing_class=processor,
    )
    trainer.add_callback(SamplesCallback(tmp_path / "samples.jsonl", trainer))
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["failed"] for line in lines] == [None, "judge: HTTP 503 after 4 tries", None, None]
    assert lines[1]["rewards"] == {"shape": None, "judge": None} and lines[0]["rewards"]["judge"] == 0.5


def test_a_judge_that_never_answers_stops_the_run_and_saves_it(tmp_path):
    def down(completions, **columns):
        return [Failed("connection refused")] * len(completions)

    with pytest.raises(RewardError) as caught:
        train(tmp_path, [shape, down], max_steps=5)
    assert str(caught.value).startswith(
        'The reward "down" failed for 4 of the last 4 completions (100%), more than max'
    )
    assert "connection refused" in str(caught.value) and "the same command goes on" in str(caught.value)
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").is_file()


def test_a_hiccup_does_not_stop_the_run(tmp_path):
    calls = []

    def flaky(completions, **columns):
        calls.append(1)
        return [Failed("timeout")] * 4 if len(calls) == 3 else [0.1, 0.2, 0.3, 0.4]

    trainer = train(tmp_path, flaky, max_steps=5, max_reward_failures=0.4)
    assert trainer.state.global_step == 5
    assert logged(trainer, "rewards/flaky/failed") == [1.0, 0.0, 0.0], "from the first failure on"
    with pytest.raises(ConfigError, match="max_reward_failures=1.5: needs 0 or more, at most 1"):
        recorder.config(tmp_path, max_reward_failures=1.5)


def test_a_stopped_run_goes_on_once_the_judge_is_mended(tmp_path):
    answers = [[Failed("HTTP 503"), 0.2, 0.3, 0.4]]

    def shaky(completions, **columns):
        return answers[0]

    def trainer_of():
        model, processor = tiny.build("qwen2_5_vl", layers=1)
        config = recorder.config(tmp_path, max_steps=5, max_reward_failures=0.1, **GROUP)
        data = Dataset.from_list(rows(1))
        return VLMGRPOTrainer(model, [shape, shaky], config, data, processing_class=processor)

    with pytest.raises(RewardError, match="failed for 3 of the last 12 .*last reason: HTTP 503"):
        trainer_of().train()
    answers[0] = [0.1, 0.2, 0.3, 0.4]
    trainer = trainer_of()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5, "what had failed before does not stop it again"


# ---- what a spec may say about a function -------------------------------------------------------------------------

OWN = """
import asyncio, time
from vlm_grpo.rewards import Failed

def slow(completions, seconds=0.0, **columns):
    time.sleep(seconds)
    return [1.0] * len(completions)

async def later(completions, seconds=0.0, **columns):
    await asyncio.sleep(seconds)
    return [1.0] * len(completions)

def raw(completions, truth, **columns):
    return truth

def wrong(completions, **columns):
    raise ValueError("no number in " + repr(completions))

def two(completions, answer):
    return [1.0] * len(completions)

two_3 = two

class Made:
    def __init__(self, level=1.0):
        self.level = level
    def __call__(self, completions, **columns):
        return [self.level] * len(completions)

class Uncallable:
    pass

class Broken:
    def __init__(self):
        raise OSError("no file")
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "own.py"
    path.write_text(OWN)
    return path


def test_scale_shift_clip_and_columns(own):
    raw = one(f"{own}:raw", columns={"truth": "score"}, scale=2.0, shift=-1.0, clip=[-1.0, 1.5])
    values = raw(completions=["a"] * 5, score=[0.0, 1.0, 3.0, None, Failed("gone")])
    assert values == [-1.0, 1.0, 1.5, None, Failed("gone")]
    with pytest.raises(RewardError, match='columns: truth=score: the rows have no column "score". Did you mean "scor"'):
        raw(completions=["a"], scor=[1.0])
    with pytest.raises(ValueError, match="has no room; give the lower bound first"):
        RewardSpec(name="x", clip=[1.0, 0.0])


def test_a_call_that_takes_too_long_has_failed(own):
    start = time.perf_counter()
    values = one(f"{own}:slow", kwargs={"seconds": 5.0}, timeout=0.05)(completions=["a", "b"])
    assert values == [Failed("no answer within 0.05 s")] * 2
    values = asyncio.run(one(f"{own}:later", kwargs={"seconds": 5.0}, timeout=0.05)(completions=["a"]))
    assert values == [Failed("no answer within 0.05 s")]
    assert time.perf_counter() - start < 4
    assert one(f"{own}:slow", kwargs={"seconds": 0.0})(completions=["a"], seconds=[9.0]) == [1.0], "over a column"
    assert one(f"{own}:slow", timeout=5.0)(completions=["a"]) == [1.0]


def test_a_class_is_made_once_with_its_arguments(own):
    # covers A5
    made = one(f"{own}:Made", kwargs={"level": 0.25})
    assert made(completions=["a", "b"]) == [0.25, 0.25] and made.__name__ == "Made"
    for name, kwargs, sentence in (
        ("Made", {"levle": 1}, 'has no option "levle". Did you mean "level"'),
        ("Uncallable", {}, "is a class without __call__"),
        ("Broken", {}, "making Broken failed with OSError: no file"),
        ("two", {"tag": 1}, 'has no option "tag"'),
    ):
        with pytest.raises(RewardError, match=sentence):
            one(f"{own}:{name}", kwargs=kwargs)
    with pytest.raises(RewardError, match='The reward "accuracy" has no option "colum". Did you mean "column"'):
        one("accuracy", kwargs={"colum": "x"})


def test_an_error_shows_a_row(own):
    # covers A5
    with pytest.raises(RewardError) as caught:
        one(f"{own}:wrong")(prompts=["how many?"], completions=["seven"])
    assert 'began with the completion "seven" of the prompt "how many?"' in str(caught.value)
    with pytest.raises(RewardError, match='returned 1 values for 2 completions.* began with the completion "a"'):
        one(f"{own}:raw")(completions=["a", "b"], truth=[1.0])
    with pytest.raises(RewardError) as caught:
        one(f"{own}:wrong")(completions=["b" * 5000])
    assert len(str(caught.value)) < 700, "of a long message and a long completion the beginning"
    for value, said in (
        (10**400, "1000"),
        ("x" * 5000, "xxx"),
        (float("nan"), "nan"),
        (torch.tensor(torch.inf), "inf"),
    ):
        with pytest.raises(RewardError, match=f"returned [^.]*{said}.* Return a finite number") as caught:
            one(f"{own}:raw")(completions=["a"], truth=[value])
        assert len(str(caught.value)) < 300
    assert one(f"{own}:raw")(completions=["a"] * 3, truth=[Decimal("0.5"), True, 2]) == [0.5, 1.0, 2.0]


def test_a_function_that_does_not_fit_the_rows(own):
    # covers A5
    with pytest.raises(RewardError, match='raw": it asks for the column "truth", which the rows do not have. They hav'):
        one(f"{own}:raw")(completions=["a"], prompts=["p"], label=["1"], log_extra=print)
    with pytest.raises(RewardError, match="it is given prompts, label by name and does not take them. Add [*][*]colum"):
        one(f"{own}:two")(completions=["a"], prompts=["p"], answer=["1"], label=["1"])
    assert one(f"{own}:two")(completions=["a"], answer=["1"]) == [1.0]


def test_a_column_may_have_the_name_of_a_built_in_option():
    columns = {"answer": ["7", "8"], "tags": ["a", "b"], "strict": ["x", "y"], "method": ["m", "n"], "column": [1, 2]}
    texts = ["<think>x</think><answer>7</answer>"] * 2
    assert one("format")(completions=texts, **columns) == [1.0, 1.0]
    assert one("accuracy", kwargs={"wrong": -1.0})(completions=texts, **columns) == [1.0, -1.0]


def test_names_stay_apart(own):
    functions, _ = load_rewards([f"{own}:{name}" for name in ("two_3", "two", "two", "two")])
    assert [function.__name__ for function in functions] == ["two_3", "two", "two_4", "two_5"]
    functions, _ = load_rewards([f"{own}:{name}" for name in ("two_3", "two_3", "raw", "two_3")])
    assert len({function.__name__ for function in functions}) == 4
    functions, _ = load_rewards([f"{own}:{name}" for name in ("two", "two_3", "two")])
    assert [function.__name__ for function in functions] == ["two", "two_3", "two_4"], "two_3 would be the third's"
