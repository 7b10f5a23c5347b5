"""The reward ``model``: a text reward model by name or loaded, scored as TRL scores one, and in a mix."""

import copy
import logging
from pathlib import Path

import pytest
import recorder
import tiny
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)
from trl.data_utils import apply_chat_template

from vlm_grpo import load_rewards
from vlm_grpo.config import RewardSpec
from vlm_grpo.errors import RewardError
from vlm_grpo.rewards.model import ModelReward


def shape(words, **options) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaConfig(vocab_size=len(words), pad_token_id=tiny.PAD, **sizes, **options)


def tokenizer_with_template():
    _, processor = tiny.build("qwen2_5_vl")
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = processor.chat_template
    return tokenizer


def saved_judge(path: Path) -> str:
    """A reward model and its tokenizer, written there."""
    words = tokenizer_with_template()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(shape(words, num_labels=1))
        model.score.weight.data.normal_(0, 1)
    model.save_pretrained(path)
    words.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def words():
    return tokenizer_with_template()


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    return saved_judge(tmp_path_factory.mktemp("models") / "judge")


PROMPTS = [[{"role": "user", "content": text}] for text in ("count the cat", "read", "a red square and a blue square")]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ("two", "yes no yes", "three")]


def as_trl_scores(model: str, prompts: list, completions: list) -> list[float]:
    """The body of TRL's loop over reward models."""
    judge = AutoModelForSequenceClassification.from_pretrained(model)
    words = AutoTokenizer.from_pretrained(model)
    if isinstance(prompts[0], str):
        texts = [p + c for p, c in zip(prompts, completions, strict=True)]
    else:
        rows = [{"messages": p + c} for p, c in zip(prompts, completions, strict=True)]
        texts = [apply_chat_template(row, words)["text"] for row in rows]
    inputs = words(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.inference_mode():
        return judge(**inputs).logits[:, 0].tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_it_scores_as_trl_does(judge, batch_size):  # covers O3
    reward = ModelReward(judge, batch_size=batch_size)
    scores = reward(completions=COMPLETIONS, prompts=PROMPTS, answer=["1"] * 3)
    assert scores == pytest.approx(as_trl_scores(judge, PROMPTS, COMPLETIONS), abs=1e-6)
    assert len({round(score, 3) for score in scores}) == 3
    texts = ["count the cat ", "read "], ["two", "yes no"]
    assert reward(prompts=texts[0], completions=texts[1]) == pytest.approx(as_trl_scores(judge, *texts), abs=1e-6)


def test_a_loaded_model_and_by_name_give_the_same(judge, words):  # covers O3
    model = AutoModelForSequenceClassification.from_pretrained(judge).train()
    loaded = ModelReward(model, tokenizer=words, name="mine")
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert (loaded.__name__, ModelReward(judge).__name__) == ("mine", "judge")
    assert not isinstance(loaded, torch.nn.Module), "a trainer must not save it, nor move it"
    (function,), _ = load_rewards([RewardSpec(name="model", kwargs={"model": judge})])
    arguments = {"prompts": PROMPTS, "completions": COMPLETIONS}
    assert function(**arguments) == loaded(**arguments) == ModelReward(judge)(**arguments)


def test_of_a_long_text_the_end_is_scored(judge, words, caplog):
    reward = ModelReward(judge, max_length=4)
    long = "count the cat and the dog and the square"
    ids = words(long + " two", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with caplog.at_level(logging.WARNING, "vlm_grpo"):
        scores = reward(prompts=[long, ""], completions=[" two", " two"])
    assert scores[0] == pytest.approx(reward.model(ids[:, -4:]).logits.item(), abs=1e-6)
    assert scores[1] == pytest.approx(ModelReward(judge)([" two"])[0], abs=1e-6)
    assert [record.getMessage() for record in caplog.records] == [
        f'The reward model "{judge}" is given the last 4 tokens of longer texts (one has 15): max_length.'
    ]


@pytest.mark.parametrize("where", ["parts", "column"])
def test_media_are_left_out_and_that_is_said_once(judge, where, caplog):
    reward = ModelReward(judge)
    image = Image.new("RGB", (8, 8))
    parts = [{"type": "text", "text": "count the cat"}]
    if where == "parts":
        parts.insert(0, {"type": "image", "image": image})
    columns = {"images": [[image]]} if where == "column" else {"images": [[]], "image": None}
    with caplog.at_level(logging.WARNING, "vlm_grpo"):
        scores = [reward(COMPLETIONS[:1], prompts=[[{"role": "user", "content": parts}]], **columns) for _ in range(2)]
    assert scores[0] == scores[1] == pytest.approx(as_trl_scores(judge, PROMPTS[:1], COMPLETIONS[:1]), abs=1e-6)
    assert len(caplog.records) == 1
    assert "reads text only: it does not see the images, videos and sounds" in caplog.text


def test_what_is_no_reward_model_is_one_sentence(judge, words, tmp_path):
    LlamaForCausalLM(shape(words)).save_pretrained(tmp_path / "lm")
    LlamaForSequenceClassification(shape(words, num_labels=3)).save_pretrained(tmp_path / "three")
    headless = LlamaModel(shape(words, num_labels=1))
    headless.config.architectures = ["LlamaForSequenceClassification"]
    headless.save_pretrained(tmp_path / "headless")
    config = (tmp_path / "headless" / "config.json").read_text()
    (tmp_path / "headless" / "config.json").write_text(
        config.replace('"LlamaModel"', '"LlamaForSequenceClassification"')
    )
    bare = copy.deepcopy(words)
    bare.chat_template = None
    cases = [
        (str(tmp_path / "lm"), {}, "is a LlamaForCausalLM, which has no scoring head. Give a sequence classification"),
        (str(tmp_path / "three"), {}, "has 3 labels, so that none of its outputs is the score"),
        (str(tmp_path / "headless"), {}, r"lacks weights \(score.weight\), which would be random"),
        (str(tmp_path / "nowhere"), {}, "cannot be loaded"),
        (judge, {"batch_size": 0}, "batch_size=0 must be a whole number from 1 on"),
        (torch.nn.Linear(2, 2), {}, "is no model of transformers"),
    ]
    for model, options, sentence in cases:
        with pytest.raises(RewardError, match=sentence) as error:
            ModelReward(model, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(RewardError, match="has no chat template, and the rows are conversations"):
        ModelReward(judge, tokenizer=bare)(COMPLETIONS, prompts=PROMPTS)


def test_a_mix_of_id_module_callable_and_ours_trains(judge, words, tmp_path):  # covers O3
    """The same judge four ways beside a function: the same metric each time."""
    model, processor = tiny.build("qwen2_5_vl")
    loaded = AutoModelForSequenceClassification.from_pretrained(judge)
    rows = [{"prompt": [{"role": "user", "content": f"count {word}"}], "answer": "1"} for word in tiny.WORDS[:4]]
    rewards = [judge, loaded, ModelReward(judge, name="ours"), recorder.reward]
    trainer = recorder.Recorder(
        model,
        rewards,
        recorder.config(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1),
        Dataset.from_list(rows),
        processing_class=processor,
        reward_processing_classes=[None, words, None, None],
    )
    trainer.train()
    (log,) = [record for record in trainer.state.log_history if "rewards/ours/mean" in record]
    assert log["rewards/ours/std"] > 0
    assert log["rewards/judge/mean"] == pytest.approx(log["rewards/ours/mean"], abs=1e-5)
    saved = {path.name for path in (tmp_path / "run").rglob("*.safetensors")}
    assert saved == {"model.safetensors"}, "no reward model is in a checkpoint"
