"""Dead groups drawn anew: what is trained on is what TRL would train on had these prompts come in the first place."""

from collections import Counter

import pytest
import recorder
import reference
import tiny
import torch
from datasets import Dataset
from test_exact import differences, row, table

from vlm_grpo import VLMGRPOTrainer
from vlm_grpo.errors import ConfigError, UnsupportedError

DEAD = {"count one", "count two", "count three", "count four"}
TEXTS = (*sorted(DEAD), "red red", "blue one two", "green two", "red three")

SIZES = {"num_generations": 4, "per_device_train_batch_size": 8}  # four groups a rollout, in two micro-batches


def text_of(prompt) -> str:
    return "".join(part["text"] for part in prompt[-1]["content"] if part["type"] == "text")


def reward(prompts, completions, completion_ids, log_extra, **columns):
    """Tied where the prompt is one of ``DEAD``; else different for completions that differ."""
    log_extra("said", [f"{text_of(p)}: {ids}" for p, ids in zip(prompts, completion_ids, strict=True)])
    return [
        0.0 if text_of(p) in DEAD else float(sum(ids) % 101) for p, ids in zip(prompts, completion_ids, strict=True)
    ]


def data() -> list[dict]:
    """Rows with pictures of several sizes, and texts of several lengths."""
    rows = [row(text, *[("image", 10 * i, i % 4)] * (i % 3)) for i, text in enumerate(TEXTS)]
    return [{"images": [], **one} for one in rows]


def trainer_of(path, cls=recorder.Recorder, rows=None, funcs=None, **options) -> VLMGRPOTrainer:
    model, processor = tiny.build("qwen2_5_vl")
    args = recorder.config(path, **{"resample_dead_groups": 8, **SIZES, "max_steps": 2, **options})
    return cls(model, funcs or reward, args, table(data()) if rows is None else rows, None, processor)


class Counting(recorder.Recorder):
    """Notes the prompts of every generation, and the metrics of every log."""

    def __init__(self, *args, **kwargs):
        self.generated, self.logged, self.counted = [], [], []
        super().__init__(*args, **kwargs)

    def _generate_shared(self, prompt_ids, encodings):
        self.generated.append(len(prompt_ids))
        return super()._generate_shared(prompt_ids, encodings)

    def log(self, logs, start_time=None):
        self.counted += [len(values) for name, values in self._metrics["train"].items() if "completions/" in name]
        super().log(logs, start_time)
        self.logged.append(logs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Counting:
    trainer = trainer_of(tmp_path_factory.mktemp("run"), Counting)
    trainer.train()
    return trainer


def groups(trainer) -> list[list]:
    """The rows of the micro-batches, by prompt: every group is met whole, since groups stay together."""
    found: dict = {}
    for number, batch in enumerate(trainer.rows):
        for one in batch:
            found.setdefault((number, tuple(one.prompt)), []).append(one)
    return list(found.values())


def test_no_dead_group_is_trained_on_and_whole_groups_take_their_place(trained):
    assert {len(group) for group in groups(trained)} == {4}
    assert all(any(one.advantage != 0 for one in group) for group in groups(trained))
    # advantages as TRL defines them, of each group alone: (r - mean) / (std + 1e-4)
    for group in groups(trained):
        rewards = torch.tensor([float(sum(one.completion) % 101) for one in group])
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert torch.allclose(torch.tensor([one.advantage for one in group]), expected, atol=1e-5)


def test_only_dead_groups_are_generated_again(trained):
    first, *again = trained.generated
    assert first == sum(len(batch) for batch in trained.rows[:2]), "the whole rollout first"
    assert again and all(count % 4 == 0 for count in again) and min(again) < first


@pytest.mark.slow
def test_log_probabilities_of_the_merged_batch_are_those_of_each_row_alone(tmp_path):
    trainer = trainer_of(tmp_path, learning_rate=0.0, beta=0.1, max_steps=1)
    trainer.train()
    for attribute in ("logps", "ref"):
        assert max(differences(trainer, trainer.processing_class, data(), attribute=attribute)) <= 1e-5
    widths = {len(one.prompt) for batch in trainer.rows for one in batch}
    assert len(widths) > 1, "prompts of several lengths are padded together"


def test_metrics_and_logs_are_of_what_is_trained_on(trained):
    rows = [one for batch in trained.rows[-2:] for one in batch]
    logs = next(logs for logs in reversed(trained.logged) if "loss" in logs)
    lengths = [len(one.completion) for one in rows]
    assert logs["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert logs["completion_length"] == logs["completions/mean_length"]
    assert set(trained.counted) == {1}, "of one generation a step, and not of those that were thrown away"
    assert logs["reward"] == pytest.approx(sum(sum(one.completion) % 101 for one in rows) / len(rows))
    assert logs["groups/dead"] == 0 and logs["groups/resampled"] > 0
    assert logs["advantage/mean"] == pytest.approx(sum(one.advantage for one in rows) / len(rows), abs=1e-6)
    assert logs["advantage/std"] == pytest.approx(float(torch.tensor([one.advantage for one in rows]).std()), rel=1e-4)
    # every token of the two rollouts, and none of those that were drawn and left
    every = [one for batch in trained.rows for one in batch]
    assert logs["num_tokens"] == sum(len(one.prompt) + len(one.completion) for one in every)
    assert rows[0].tokens_in_generation == sum(lengths)
    # samples.jsonl is written from these: the rows that are trained on, each beside what its reward said of it
    shown = trained._logs
    ids = Counter(tuple(one.completion) for one in rows)
    assert len(shown["prompt"]) == len(shown["extra"]["said"]) == len(rows)
    for prompt, said, value in zip(shown["prompt"], shown["extra"]["said"], shown["rewards"]["reward"], strict=True):
        text, _, own = said.rpartition(": ")
        assert text == text_of(prompt) and text not in DEAD
        completion = tuple(int(number) for number in own.strip("[]").split(","))
        assert value == sum(completion) % 101
        ids[completion] -= 1
    assert not any(ids.values())


def test_the_gradient_is_that_of_a_run_whose_sampler_drew_these_prompts(tmp_path):
    """The completions that stay, shown to a second trainer that generates nothing."""
    first = trainer_of(tmp_path / "a", max_steps=1)
    gradients = keep_gradients(first)
    first.train()
    kept = {tuple(one.prompt): [] for batch in first.rows for one in batch}
    for one in (one for batch in first.rows for one in batch):
        kept[tuple(one.prompt)].append(one.completion)
    encoded = {tuple(reference.encode(first.processing_class, r)["input_ids"][0].tolist()): r for r in data()}

    class Told(recorder.Recorder):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
            return [kept[tuple(ids)].pop(0) for ids in prompt_ids], None

    chosen = [encoded[ids] for ids in kept]
    second = trainer_of(tmp_path / "b", Told, table(chosen), resample_dead_groups=0, max_steps=1)
    expected = keep_gradients(second)
    second.train()
    assert gradients and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-7), name


def keep_gradients(trainer) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    whole = trainer._get_grad_norm

    def keep(model, grad_norm=None):
        found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        return whole(model, grad_norm)

    trainer._get_grad_norm = keep
    trainer.args.max_grad_norm = 1e9
    return found


@pytest.mark.parametrize("seed", [5, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (6, 7, 8))])
def test_no_prompt_comes_twice_while_others_wait(seed, tmp_path):
    trainer = trainer_of(tmp_path, seed=seed, max_steps=1)
    trainer.train()
    prompts = [text_of(row.original["prompt"]) for row in trainer.seen_rows[::4]]
    assert len(prompts) == len(set(prompts)) and len(prompts) > 4, "of eight rows four are live, and all can be found"
    assert {tuple(one.prompt) for batch in trainer.rows for one in batch} == {
        tuple(reference.encode(trainer.processing_class, r)["input_ids"][0].tolist()) for r in data()[4:]
    }


def test_groups_that_stay_dead_are_kept_after_so_many_times(tmp_path):
    def always(completions, **columns):
        return [1.0] * len(completions)

    trainer = trainer_of(tmp_path, Counting, funcs=always, resample_dead_groups=2, max_steps=1)
    trainer.train()
    logs = trainer.logged[0]
    size = sum(len(batch) for batch in trainer.rows)
    assert trainer.generated == [size] * 3, "all of them, twice more"
    assert logs["groups/resampled"] == 2 * size / 4 and logs["groups/dead"] == logs["groups/dead_high"] == 1


def test_a_resumed_run_draws_the_same_prompts(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2, "num_train_epochs": 9}
    whole = trainer_of(tmp_path, **saving)
    whole.train()
    resumed = trainer_of(tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    def told(trainer):
        return [[(one.prompt, one.completion, one.advantage) for one in batch] for batch in trainer.rows]

    assert len(whole.rows) == 8 and told(resumed) == told(whole)[4:]
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    assert resumed._diagnosis.state() == whole._diagnosis.state(), "groups seen, figures of the start, what was said"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"resample_dead_groups": -1}, ConfigError, "resample_dead_groups=-1: needs 0 or more"),
        ({"tools": True}, UnsupportedError, "resample_dead_groups=8 has no test with"),
        ({"stream": True, "max_steps": 1}, ConfigError, "IterableDataset only gives the next one"),
    ],
)
def test_what_cannot_be_resampled_is_one_sentence(options, error, says, tmp_path):
    def tool(word: str) -> str:
        """Repeats.

        Args:
            word: what to repeat.
        """
        return word

    tools = [tool] if options.pop("tools", False) else None
    rows = Dataset.from_list([{"prompt": tiny.prompt("count one")}] * 8)
    rows = rows.to_iterable_dataset() if options.pop("stream", False) else rows
    model, processor = tiny.build("qwen2_5_vl")
    with pytest.raises(error, match=says):
        args = recorder.config(tmp_path, **{"resample_dead_groups": 8, **options})
        VLMGRPOTrainer(model, reward, args, rows, None, processor, tools=tools)
