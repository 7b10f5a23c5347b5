"""The reward trainer: its loss and metrics by hand, the same whatever the batching, and what it says when it cannot."""

import argparse
import json
import math

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_scores import by_itself

from vlm_grpo import VLMRewardConfig, VLMRewardTrainer
from vlm_grpo.errors import ConfigError, GradientError
from vlm_grpo.judging.captions import Captions
from vlm_grpo.judging.prompt import JudgePrompt
from vlm_grpo.losses import pairwise_loss
from vlm_grpo.models.heads import add_head, head_of
from vlm_grpo.pairwise import judge_pairs

JUDGE = JudgePrompt("what is {{ response }} ?{% for c in captions %} {{ c }}{% endfor %}", "answer")
PAIRS = (("red", "blue"), ("two cat", "one"), ("yes", "no no no"), ("seven eight", "nine ten red"))


def rows(count: int = 4) -> list[dict]:
    """Prompts of different lengths, the third without a picture; answers of different lengths."""
    out = []
    for i in range(count):
        chosen, rejected = PAIRS[i % 4]
        pictures = [tiny.image(i, (56 + 28 * (i % 2), 56))] if i % 4 != 2 else []
        prompt = tiny.prompt(f"count {tiny.WORDS[i]} {'red ' * (i % 3)}", len(pictures))
        out.append({"prompt": prompt, "images": pictures, "chosen": chosen, "rejected": rejected})
    return out


def adapted(family: str = "qwen2_5_vl", scale: float = 0.1, **lora):
    model, processor = tiny.build(family)
    options = {"r": 4, "lora_alpha": 8, "target_modules": r".*self_attn\.(q|v)_proj", **lora}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(**options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape) * scale
    return model, processor


def config(path, **options) -> VLMRewardConfig:
    defaults = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0.0, "logging_steps": 1}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant"}
    return VLMRewardConfig(str(path), **{**defaults, **quiet, **options})


def make(path, data=None, model=None, processor=None, *, captions=None, judge=JUDGE, evaluated=None, **options):
    built = adapted() if model is None else (model, processor or tiny.build("qwen2_5_vl")[1])
    data = Dataset.from_list(rows() if data is None else data)
    args = config(path, **options)
    return VLMRewardTrainer(built[0], args, data, evaluated, built[1], judge=judge, captions=captions)


def train(path, *args, **options) -> VLMRewardTrainer:
    trainer = make(path, *args, **options)
    trainer.train()
    return trainer


def scores_by_hand(trainer, family) -> list[tuple[float, float]]:
    """Each response in a forward of its own, in float64, by a model that no trainer has touched."""
    model, head = adapted(family)[0].double(), head_of(trainer.model)
    found = []
    for batch in trainer.get_train_dataloader():
        for place, encoding in enumerate(batch["encodings"]):
            pair = (batch[name][place] for name in ("chosen", "rejected"))
            found.append(tuple(by_itself(model, head, _double(encoding), s).item() for s in pair))
    return found


def _double(encoding):
    media = {k: v.double() if v.is_floating_point() else v for k, v in encoding.media.items()}
    return type(encoding)(encoding.input_ids, encoding.tokens, media, encoding.options, encoding.senses, encoding.after)


def log_of(trainer, step: int = 0) -> dict:
    return trainer.state.log_history[step]


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_pairwise_loss_by_hand():
    # covers L3; margins 2 and -1, the mean of the sums 3 and 1 is 2
    chosen, rejected = torch.tensor([2.5, 0.0]), torch.tensor([0.5, 1.0])
    preferring = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    assert pairwise_loss(chosen, rejected).item() == pytest.approx(preferring)
    assert pairwise_loss(chosen, rejected, 0.5).item() == pytest.approx(preferring + 0.5 * 2)
    assert pairwise_loss(-chosen, -rejected, 0.5).item() == pytest.approx(
        (math.log(1 + math.exp(2)) + math.log(1 + math.exp(-1))) / 2 + 0.5 * 2
    )
    assert pairwise_loss(torch.tensor([500.0]), torch.tensor([-500.0])).item() == 0.0
    assert pairwise_loss(torch.tensor([-500.0]), torch.tensor([500.0])).item() == 1000.0, "no overflow"


def test_the_pairwise_loss_and_its_gradient_against_a_loop_in_float64():
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    chosen, rejected = (row.clone().requires_grad_() for row in given)
    found = pairwise_loss(chosen, rejected, 0.3)
    found.backward()
    pairs = list(zip(given[0].tolist(), given[1].tolist(), strict=True))
    mean = sum(a + b for a, b in pairs) / 7
    expected = sum(-math.log(1 / (1 + math.exp(b - a))) for a, b in pairs) / 7 + 0.3 * abs(mean)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    for (a, b), gradient in zip(pairs, chosen.grad.tolist(), strict=True):
        by_hand = (-1 / (1 + math.exp(a - b)) + 0.3 * math.copysign(1, mean)) / 7
        assert gradient == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_loss_and_metrics_are_those_of_rows_scored_one_by_one(family, tmp_path):
    # covers L1, L3: rows of different lengths, one without a picture, against float64 without padding or sharing
    model, processor = adapted(family)
    trainer = train(tmp_path, None, model, processor, center_rewards_coefficient=0.5)
    pairs = scores_by_hand(trainer, family)
    margins = [a - b for a, b in pairs]
    both = [score for pair in pairs for score in pair]
    found = log_of(trainer)
    mean = sum(both) / 4  # of the four sums
    expected = sum(math.log1p(math.exp(-m)) for m in margins) / 4 + 0.5 * abs(mean)
    assert found["loss"] == pytest.approx(expected, abs=1e-5)
    assert found["accuracy"] == sum(m > 0 for m in margins) / 4
    assert found["margin"] == pytest.approx(sum(margins) / 4, abs=1e-5)
    assert found["mean_reward"] == pytest.approx(sum(both) / 8, abs=1e-5)
    assert found["min_reward"] == pytest.approx(min(both), abs=1e-5)
    assert found["max_reward"] == pytest.approx(max(both), abs=1e-5)
    assert found["grad_norm"] > 0


def test_a_step_counts_pairs_and_not_micro_batches(tmp_path):
    # covers L3: three pairs in micro-batches of two; a mean of means would weigh the last pair double
    updated = []
    for size, steps in ((3, 1), (2, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        model, processor = adapted()
        center = {"center_rewards_coefficient": 0.0}
        trainer = train(tmp_path, rows(3), model, processor, learning_rate=0.1, max_grad_norm=0.0, **options, **center)
        trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        updated.append((log_of(trainer), trained))
    (one, weights), *others = updated
    for other, theirs in others:
        for name in ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name
        assert all(torch.allclose(weights[name], theirs[name], atol=1e-6) for name in weights)


def test_both_responses_share_one_prompt_and_one_order_of_captions(tmp_path):
    # covers L2: captions reach the judge's request only
    data = [{**row, "captions": ["red cat", "two three", "nine"]} for row in rows()]
    trainer = make(tmp_path, data, captions=Captions())
    words = trainer.tokenizer
    batch = trainer.collate_rows([trainer.train_dataset[0], trainer.train_dataset[1]])
    assert len(batch["encodings"]) == 2 and len(batch["labels"]) == 2
    orders = []
    for place in range(2):
        texts = [words.decode(batch[name][place]) for name in ("chosen", "rejected")]
        orders += [text.split("?")[1] for text in texts]
        assert orders[-1] == orders[-2] and all(caption in orders[-1] for caption in data[0]["captions"])
        assert "three" not in words.decode(batch["encodings"][place].input_ids)
    scored: list = []
    original = trainer.scorer
    trainer.scorer = lambda *args: (
        lambda encodings, suffixes: scored.append(encodings) or original(*args)(encodings, suffixes)
    )
    trainer.compute_loss(trainer.model, batch)
    assert scored[0][0] is scored[0][1] and scored[0][2] is scored[0][3] and scored[0][0] is not scored[0][2]


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_learns_and_only_adapter_and_head_move(checkpointing, tmp_path):
    # covers L3, A3
    model, processor = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"learning_rate": 2e-2, "max_steps": 12, "gradient_checkpointing": checkpointing}
    trainer = train(tmp_path, None, model, processor, gradient_report=True, **options)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < 0.5 * losses[0] and trainer.state.log_history[-2]["accuracy"] == 1.0
    moved = {n for n, value in trainer.model.state_dict().items() if n not in before or not value.equal(before[n])}
    assert any("lora_A" in name for name in moved) and any("scalar_heads" in name for name in moved)
    assert all("lora_" in name or "scalar_heads" in name for name in moved)
    assert log_of(trainer)["gradient/head/received"] == 2, "the bias too: of the term that centres the scores"


def test_evaluation_has_the_same_figures(tmp_path):
    data = Dataset.from_list(rows())
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    trainer = train(tmp_path, evaluated=data, metric_for_best_model="eval_accuracy", **options)
    logged, evaluated = (next(r for r in trainer.state.log_history if key in r) for key in ("loss", "eval_loss"))
    for name in ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert evaluated[f"eval_{name}"] == pytest.approx(logged[name], rel=1e-5)
    assert trainer.evaluate()["eval_accuracy"] == logged["accuracy"]


def test_what_is_saved_is_a_whole_reward_model(tmp_path):
    # covers L3: adapter, head, judge's prompt and facts, in checkpoints too
    trainer = train(tmp_path, save_strategy="steps", save_steps=1, learning_rate=1e-2)
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "checkpoint-1"):
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_model.safetensors", "head.safetensors", "judge_prompt.jinja", "reward_model.json"} <= names
        facts = json.loads((folder / "reward_model.json").read_text())
        assert facts["stem"] == "answer" and facts["captions"] is False and facts["load_in_4bit"] is False
        assert JudgePrompt.load(folder) == JUDGE


def test_dropout_is_off_and_the_head_the_same_whatever_was_drawn_before(tmp_path):
    first = make(tmp_path, model=adapted(lora_dropout=0.5)[0])
    assert all(module.p == 0 for module in first.model.modules() if isinstance(module, torch.nn.Dropout))
    torch.randn(100)
    assert head_of(make(tmp_path).model).weight.equal(head_of(first.model).weight)
    assert not head_of(make(tmp_path, seed=7).model).weight.equal(head_of(first.model).weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"), [("qwen2_audio", "audio"), ("qwen2_5_vl", "video"), ("qwen2_5_omni_thinker", "audio")]
)
def test_sounds_and_videos_are_judged_too(family, kind, tmp_path):
    # covers L3: the score hangs on what is heard and seen, and each response's is that of a row by itself
    model, processor = adapted(family)
    maker = {"audio": tiny.audio, "video": tiny.video}[kind]
    data = [
        {key: value for key, value in row.items() if key != "images"}
        | {"prompt": tiny.prompt("count", **{"images": 0, f"{kind}s": 1}), f"{kind}s": [maker(number)]}
        for number, row in enumerate(rows())
    ]
    trainer = train(tmp_path, data, model, processor, center_rewards_coefficient=0.0)
    pairs = scores_by_hand(trainer, family)
    expected = sum(math.log1p(math.exp(b - a)) for a, b in pairs) / 4
    assert log_of(trainer)["loss"] == pytest.approx(expected, abs=1e-5)
    given = {"processor": trainer.processing_class, "intake": trainer.intake, "judge": trainer.judge}
    seen, blank = (judge_pairs(trainer.scorer(), trainer.train_dataset, blank=b, **given).rows for b in (False, True))
    assert all(abs(a.chosen_score - b.chosen_score) > 1e-3 for a, b in zip(seen, blank, strict=True))
    assert sorted(row.chosen_score for row in seen) == pytest.approx(sorted(a for a, _ in pairs), abs=1e-4)


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_a_model_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"A reward model is an adapter, and this Qwen.* has none\. Load it with"):
        make(tmp_path, model=tiny.build("qwen2_5_vl")[0])


def test_what_a_notebook_confuses_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"judge is a str: it needs a JudgePrompt. Give JudgePrompt.of\(FILE\)"):
        make(tmp_path, judge="judge.jinja")
    with pytest.raises(ConfigError, match=r"captions is a dict: it needs a Captions. Give Captions.read\(FILE\)"):
        make(tmp_path, captions={"a.png": ["a cat"]})
    model, processor = adapted()
    with pytest.raises(ConfigError, match="args is a Namespace: VLMRewardTrainer takes a VLMRewardConfig"):
        VLMRewardTrainer(model, argparse.Namespace(), rows(), None, processor)
    with pytest.raises(ConfigError, match="processing_class is missing"):
        VLMRewardTrainer(model, config(tmp_path), rows())


def test_fewer_pairs_than_a_batch_are_said_or_refused(tmp_path, caplog):
    with pytest.raises(ConfigError, match="has 4 pairs, and a batch takes 5: no step could be taken. Add pairs"):
        make(tmp_path, per_device_train_batch_size=5, dataloader_drop_last=True)
    with caplog.at_level("WARNING", "vlm_grpo"):
        make(tmp_path, per_device_train_batch_size=5)
    assert "has 4 pairs, and a batch takes 5: every step takes all of them" in caplog.text


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_coefficient_that_cannot_be(value, tmp_path):
    with pytest.raises(ConfigError, match="center_rewards_coefficient=.*needs 0 or more"):
        config(tmp_path, center_rewards_coefficient=value)


def test_an_adapter_without_gradient_stops_it(tmp_path):
    # covers: a head on a detached model would learn alone, without a word
    trainer = make(tmp_path)
    head = head_of(trainer.model)
    head.register_forward_pre_hook(lambda module, arguments: (arguments[0].detach(),))
    with pytest.raises(GradientError, match="trained parameters of the language tower received a gradient"):
        trainer.train()


def test_a_head_without_gradient_stops_it(tmp_path):
    trainer = make(tmp_path, center_rewards_coefficient=0.0)
    head = head_of(trainer.model)
    head.forward = lambda hidden: torch.nn.functional.linear(hidden, head.weight.detach())[..., 0]
    with pytest.raises(GradientError, match="None of the 2 trained parameters of the head tower received a gradient"):
        trainer.train()


def test_pairs_that_all_get_equal_scores_stop_it(tmp_path):
    model, processor = adapted()
    add_head(model, zero=True)
    with pytest.raises(GradientError, match="both responses of each of the last 8 pairs got the same score"):
        train(tmp_path, rows(), model, processor, max_steps=3, gradient_check=False)


def test_rows_that_are_no_pairs_are_named(tmp_path):
    with pytest.raises(ValueError, match="train_dataset row 2: both answers are"):
        make(tmp_path, [rows()[0], {**rows()[1], "rejected": "two cat"}])
