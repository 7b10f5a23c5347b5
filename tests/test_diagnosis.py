"""What a run is told of itself: the right sentence, with its figure, once; and nothing where all is well."""

import logging
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import recorder
import tiny
import torch
from datasets import Dataset
from transformers import TrainerCallback

from vlm_grpo import VLMGRPOTrainer
from vlm_grpo.diagnosis import Diagnosis
from vlm_grpo.ties import Ranges, is_tied

NAN = math.nan


class Run:
    """A trainer's loop without a trainer: rollouts and logs in, sentences out."""

    def __init__(self, caplog, names=("accuracy",), weights=None, group=4, **options):
        caplog.set_level(logging.WARNING, "vlm_grpo")
        self.caplog, self.metrics, self.step = caplog, defaultdict(list), 0
        weights = weights or [1.0] * len(names)
        self.diagnosis = Diagnosis(names, weights, group, self.metrics, 256, **options)
        self.args = SimpleNamespace()

    def steps(self, groups=(), times=1, last=1000, main=True, **logs):
        """So many steps, each with these groups of rewards and these metrics."""
        for _ in range(times):
            self.step += 1
            state = SimpleNamespace(global_step=self.step, max_steps=last, is_world_process_zero=main)
            rows = [row if isinstance(row, tuple) else (row,) for group in groups for row in group]
            if rows:
                self.diagnosis.rollout(rows)
            self.diagnosis.on_step_end(self.args, state, None)
            logs = {name.replace("__", "/"): value for name, value in logs.items()}
            self.diagnosis.on_log(self.args, state, None, logs={"loss": 0.1, **logs})
        return self

    @property
    def said(self) -> list[str]:
        return [record.getMessage() for record in self.caplog.records if record.name == "vlm_grpo"]


LIVE, LOW, HIGH, HALF = [0, 1, 0, 1], [0] * 4, [1] * 4, [0.5] * 4


# ---- groups ---------------------------------------------------------------------------------------------------------


def test_a_group_is_tied_where_trl_gives_it_no_advantage():
    assert is_tied([(1.0,), (1.0,)], [1.0]) and not is_tied([(1.0,), (0.0,)], [1.0])
    assert is_tied([(1.0, 0.0), (0.0, 1.0)], [1.0, 1.0]), "the sums are equal"
    assert not is_tied([(1.0, 0.0), (0.0, 1.0)], [1.0, 1.0], each=True)
    assert not is_tied([(1.0, 0.0), (0.0, 1.0)], [1.0, 0.5])
    # one completion with a reward has nothing to be compared with; None of one function counts as 0 beside another
    assert is_tied([(NAN,), (1.0,)], [1.0]) and is_tied([(NAN,), (NAN,)], [1.0])
    assert is_tied([(NAN, 1.0), (0.0, 1.0)], [1.0, 1.0])
    assert is_tied([(0.1 + 0.2,), (0.3,)], [1.0])


@pytest.mark.parametrize(
    ("rewards", "weights", "expected"),
    [
        ([(0.0, 0.0)] * 2, [1.0, 0.5], ("low", 0.0)),
        ([(1.0, 1.0)] * 2, [1.0, 0.5], ("high", 1.5)),
        ([(1.0, 0.0)] * 2, [1.0, 0.5], ("between", 1.0)),  # format without accuracy is not the top
        ([(NAN, 1.0)] * 2, [1.0, 0.5], ("high", 0.5)),  # a function that does not apply takes nothing away
        ([(1.0, 0.0)] * 2, [-1.0, 1.0], ("low", -1.0)),  # a negative weight turns the range around
        ([(0.0, 1.0)] * 2, [-1.0, 1.0], ("high", 1.0)),
        ([(NAN, NAN), (1.0, 1.0)], [1.0, 1.0], ("unscored", 0.0)),
    ],
)
def test_where_a_group_is_tied(rewards, weights, expected):
    assert Ranges().tie(rewards, weights) == expected


def test_ranges_are_those_seen_and_a_penalty_ends_at_zero():
    ranges = Ranges()
    ranges.widen([(-0.5, 3.0), (0.0, 0.2)])
    assert ranges.of(0) == (-0.5, 0.0) and ranges.of(1) == (0.0, 3.0) and ranges.of(2) == (0.0, 1.0)
    assert ranges.tie([(0.0, 3.0)] * 2, [1.0, 1.0]) == ("high", 3.0)
    assert ranges.tie([(0.0, 1.0)] * 2, [1.0, 1.0]) == ("between", 1.0)


def test_too_hard_is_said_once_with_its_share(caplog):
    # 6 of 16 groups a rollout: 24 of 64 = 37.5%, above a third
    run = Run(caplog).steps([LOW] * 6 + [LIVE] * 10, times=3)
    assert not run.said, "48 groups are too few to tell"
    run.steps([LOW] * 6 + [LIVE] * 10, times=9)
    (sentence,) = run.said
    assert sentence.startswith("Step 4: 38% of the last 64 groups are tied at 0: the task is too hard for this policy.")
    assert all(word in sentence for word in ("vlm-grpo sft", "num_generations", "temperature", "resample_dead_groups"))
    assert run.metrics["groups/dead"] == run.metrics["groups/dead_low"] == [6 / 16] * 12
    assert run.metrics["groups/dead_high"] == [0] * 12


def test_too_easy_is_said_with_where_it_is_tied(caplog):
    run = Run(caplog, ("accuracy", "format"), [1.0, 0.5])
    run.steps([[(1, 1)] * 4] * 15 + [[(0, 1), (1, 1)] * 2], times=4)
    groups = [sentence for sentence in run.said if "groups" in sentence]
    assert (
        len(groups) == 1 and "Step 4: 94% of the last 64 groups are tied at 1.5: these rows teach nothing" in groups[0]
    )


def test_ties_below_both_thresholds_are_no_alarm(caplog):
    # a run that learns well: few too hard, half of it solved at the end
    assert not Run(caplog).steps([LOW] * 2 + [HIGH] * 12 + [LIVE] * 2, times=20).said


def test_all_groups_tied_is_said_before_the_window_is_full(caplog):
    run = Run(caplog).steps([LOW] * 4, times=3)
    assert not run.said
    assert "Step 4: 100% of the last 16 groups are tied at 0" in run.steps([LOW] * 4).said[0]


def test_ties_in_between_and_rewards_that_are_missing(caplog):
    run = Run(caplog, ("a", "b")).steps(
        [[(0.5, 0)] * 4, [(0.25, 0)] * 4, [(0, 0.5)] * 4, [(0, 1)] * 2 + [(1, 1)] * 2] * 8, 4
    )
    (sentence,) = run.said
    assert "75% of the last 64 groups are tied at 0.5, neither the lowest nor the highest" in sentence
    caplog.clear()
    run = Run(caplog, ("a", "b")).steps([[(NAN, NAN)] * 4, LIVE_PAIR] * 8, 4)
    (sentence,) = run.said
    assert "50% of the last 64 groups are without two completions that have a reward" in sentence


LIVE_PAIR = [(0, 1), (1, 0), (0, 0), (1, 1)]


def test_only_the_main_process_speaks(caplog):
    assert not Run(caplog).steps([LOW] * 16, times=8, main=False, completions__clipped_ratio=1.0).said


# ---- single rewards -------------------------------------------------------------------------------------------------


def test_a_reward_that_never_differs_is_named_with_its_value(caplog):
    run = Run(caplog, ("accuracy", "style")).steps([[(0, 0.3), (1, 0.3)] * 2] * 8, times=7)
    assert not run.said
    run.steps([[(0, 0.3), (1, 0.3)] * 2] * 8, times=5)
    (sentence,) = run.said
    assert (
        'Step 8: the reward "style" gave 0.3 for every one of the last 256 completions; it teaches nothing.' in sentence
    )


def test_a_reward_that_was_learned_is_no_alarm_but_one_that_broke_is(caplog):
    mixed, learned = [[(0, 0.5), (1, 1)] * 2] * 8, [[(0, 1), (1, 1)] * 2] * 8
    assert not Run(caplog, ("accuracy", "format")).steps(mixed).steps(learned, times=20).said
    broke = [[(0, 0), (1, 0)] * 2] * 8
    (sentence,) = Run(caplog, ("accuracy", "format")).steps(mixed).steps(broke, times=20).said
    assert 'the reward "format" gave 0 for every one of the last 256 completions' in sentence


def test_a_reward_that_applies_to_nothing_and_one_without_weight(caplog):
    rows = [[(0, NAN, 1), (1, NAN, 1)] * 2] * 8
    (sentence,) = Run(caplog, ("accuracy", "boxes", "watched"), [1, 1, 0]).steps(rows, times=20).said
    assert 'the reward "boxes" gave None for every one' in sentence


def test_a_single_reward_is_said_once_and_not_as_a_tie_too(caplog):
    (sentence,) = Run(caplog).steps([HALF] * 4, times=3).steps([HALF] * 60, times=20).said
    assert "neither the lowest nor the highest" in sentence
    caplog.clear()
    (sentence,) = Run(caplog).steps([LOW] * 16, times=20).said
    assert "tied at 0" in sentence


# ---- TRL's metrics --------------------------------------------------------------------------------------------------


def test_clipped_completions(caplog):
    run = Run(caplog).steps(times=7, completions__clipped_ratio=0.62)
    assert not run.said
    (sentence,) = run.steps(times=30, completions__clipped_ratio=0.62).said
    assert "Step 8: 62% of the completions are cut off at max_completion_length=256 tokens" in sentence
    caplog.clear()
    run = Run(caplog).steps(times=30, completions__clipped_ratio=0.1).steps(times=3, completions__clipped_ratio=1.0)
    assert not run.said, "three odd batches"
    assert run.steps(times=3, completions__clipped_ratio=1.0).said


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (40, 160, "grew from 40 to 160 tokens (4.0 times as long)"),
        (200, 50, "shrank from 200 to 50 tokens (25% of their length)"),
        (40, 110, None),  # less than three times
        (2, 12, None),  # six times, and still a short answer
    ],
)
def test_length_drift(before, after, says, caplog):
    run = Run(caplog).steps(times=10, completions__mean_length=before).steps(times=4, completions__mean_length=after)
    assert not run.said
    said = run.steps(times=10, completions__mean_length=after).said
    assert (len(said) == 1 and says in said[0]) if says else not said


def test_kl_that_explodes_and_kl_that_stays_at_nothing(caplog):
    assert not Run(caplog).steps(times=40, kl=0.3).said
    assert not Run(caplog).steps(times=20, kl=0.01).steps(kl=900.0).steps(times=20, kl=0.01).said
    (sentence,) = Run(caplog).steps(times=20, kl=0.01).steps(times=9, kl=5.0).said
    assert "Step 24: the KL divergence from the reference is 2.5 nats a token" in sentence, "the median of eight"
    caplog.clear()
    run = Run(caplog).steps(times=24, kl=0.0, last=100)
    assert not run.said, "a warm-up"
    (sentence,) = run.steps(times=8, kl=0.0, last=100).said
    assert "the KL divergence from the reference is still 0 nats a token: the policy has not moved" in sentence


def test_entropy_collapse_but_not_of_a_task_that_is_solved(caplog):
    (sentence,) = Run(caplog).steps(times=10, entropy=1.2).steps(times=10, entropy=0.03).said
    assert "the entropy fell from 1.2 to 0.03 nats a token" in sentence
    caplog.clear()
    assert (
        not Run(caplog)
        .steps([HIGH] * 9 + [LIVE] * 7, 10, entropy=1.2)
        .steps([HIGH] * 9 + [LIVE] * 7, 9, entropy=0.03)
        .said
    )
    assert not Run(caplog).steps(times=30, entropy=0.03).said, "it began so"


def test_a_learning_rate_of_zero_but_not_a_warm_up_or_an_end(caplog):
    run = (
        Run(caplog)
        .steps(learning_rate=0.0)
        .steps(times=20, learning_rate=1e-6, last=22)
        .steps(learning_rate=0.0, last=22)
    )
    assert not run.said
    (sentence,) = run.steps(times=9, learning_rate=0.0).said
    assert "the learning rate has been 0 since step 22: nothing is learned" in sentence


def test_evaluations_and_summaries_are_not_looked_at(caplog):
    run = Run(caplog)
    state = SimpleNamespace(global_step=9, max_steps=10, is_world_process_zero=True)
    for _ in range(40):
        run.diagnosis.on_log(run.args, state, None, logs={"eval_loss": 1.0, "completions/clipped_ratio": 1.0})
        run.diagnosis.on_log(run.args, state, None, logs=None)
    assert not run.said


def test_what_was_said_and_seen_goes_on_after_a_resume(caplog):
    first = Run(caplog).steps([LOW] * 16, times=5, completions__mean_length=40, entropy=1.0)
    assert len(first.said) == 1
    second = Run(caplog)
    second.diagnosis.load(first.diagnosis.state())
    assert second.diagnosis.state() == first.diagnosis.state()
    second.steps([LOW] * 16, times=5, completions__mean_length=40)
    assert len(second.said) == 1, "not again"
    Run(caplog).diagnosis.load({})  # a checkpoint of before there was a diagnosis


# ---- in a trainer ---------------------------------------------------------------------------------------------------


class Tracker(TrainerCallback):
    """Stands where a tracker of ``report_to`` stands."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_a_trainer_of_python_is_diagnosed_and_trackers_see_the_aliases(tmp_path, caplog):
    def seven(completions, **columns):
        return [7.0] * len(completions)

    tracker = Tracker()
    model, processor = tiny.build("qwen2_5_vl")
    args = recorder.config(tmp_path, max_steps=8, beta=0.1, eval_strategy="steps", eval_steps=8, num_train_epochs=9)
    rows = Dataset.from_list([{"prompt": tiny.prompt(f"count {word}", images=0)} for word in tiny.WORDS[:4]])
    funcs = [seven, recorder.reward]
    trainer = VLMGRPOTrainer(model, funcs, args, rows, rows, processor, callbacks=[tracker])
    advantages = []
    whole = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (advantages.append(inputs["advantages"]), whole(model, inputs))[1]
    with caplog.at_level(logging.WARNING, "vlm_grpo"):
        trainer.train()
    logs = [seen for seen in tracker.seen if "loss" in seen]
    assert len(logs) == 8
    for number, seen in enumerate(logs):
        own = torch.cat(advantages[2 * number : 2 * number + 2])
        assert seen["advantage/mean"] == pytest.approx(float(own.mean()), abs=1e-6)
        assert seen["advantage/std"] == pytest.approx(float(own.std()), abs=1e-6)
        assert seen["completion_length"] == seen["completions/mean_length"] and seen["kl"] is not None
        assert 0 <= seen["groups/dead"] <= 1
    assert any("eval_completion_length" in seen for seen in tracker.seen)
    said = [record.getMessage() for record in caplog.records]
    assert any("cut off at max_completion_length=6" in sentence for sentence in said)
    assert any("learning rate has been 0 since step 1" in sentence for sentence in said)


def test_two_rewards_of_one_name_are_two(tmp_path):
    model, processor = tiny.build("qwen2_5_vl")
    rows = Dataset.from_list([{"prompt": tiny.prompt(f"count {word}", images=0)} for word in tiny.WORDS[:4]])
    funcs = [
        lambda completion_ids, **_: [float(sum(ids) % 101) for ids in completion_ids],
        lambda completion_ids, **_: [1.0] * len(completion_ids),
    ]
    trainer = VLMGRPOTrainer(model, funcs, recorder.config(tmp_path), rows, None, processor)
    trainer.train()
    logs = next(record for record in trainer.state.log_history if "loss" in record)
    assert logs["rewards/<lambda> 2/mean"] == 1 != logs["rewards/<lambda>/mean"]
    assert logs["groups/dead"] == logs["frac_reward_zero_std"] == 0
