"""Supervised warm start: the loss is that of the completion's tokens, media included, whatever the batching."""

import copy

import pytest
import reference
import tiny
import torch
from datasets import Dataset
from test_exact import with_adapter

from vlm_grpo import VLMSFTConfig, VLMSFTTrainer
from vlm_grpo.data import to_sample
from vlm_grpo.encode import completion_ids
from vlm_grpo.errors import ConfigError, DataFormatError, GradientError, UnsupportedError

COMPLETIONS = ("red", "two cat", "seven eight nine ten", "yes")


def rows() -> list[dict]:
    """Different sizes and counts of pictures, one row without, completions of different lengths."""
    out = []
    for i, (count, completion) in enumerate(zip([1, 2, 0, 1], COMPLETIONS, strict=True)):
        pictures = [tiny.image(10 * i + j, (56 + 28 * (i % 2), 56)) for j in range(count)]
        prompt = tiny.prompt(f"count {tiny.WORDS[i]}", count)
        out.append({"prompt": prompt, "images": pictures, "completion": completion})
    return out


def config(path, **options) -> VLMSFTConfig:
    defaults = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0.0, "logging_steps": 1}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant"}
    return VLMSFTConfig(str(path), **{**defaults, **quiet, **options})


def train(path, data=None, family="qwen2_5_vl", model=None, **options) -> VLMSFTTrainer:
    built, processor = tiny.build(family)
    data = Dataset.from_list(data or rows())
    trainer = VLMSFTTrainer(model or built, config(path, **options), data, processing_class=processor)
    trainer.train()
    return trainer


def hand_written_loss(family, data) -> float:
    """Mean negative log-probability of the completions and their ends, row by row in float64."""
    model, processor = tiny.build(family)
    model, words = model.double(), processor.tokenizer
    total = []
    for row in data:
        target = words(row["completion"], add_special_tokens=False)["input_ids"] + [words.eos_token_id]
        encoded = reference.encode(processor, row)
        encoded = {k: v.double() if v.is_floating_point() else v for k, v in encoded.items()}
        with torch.no_grad():
            total.append(-reference.logps(model, encoded, target))
    return torch.cat(total).mean().item()


def loss_of(trainer) -> float:
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_loss_is_the_completions_only(family, tmp_path):
    data = rows()
    found = loss_of(train(tmp_path, data, family))
    assert found == pytest.approx(hand_written_loss(family, data), rel=1e-5)
    other = [{**row, "images": [tiny.image(99, image.size) for image in row["images"]]} for row in data]
    assert abs(loss_of(train(tmp_path, other, family)) - found) > 1e-4, "the pictures matter"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_accumulation_counts_tokens_and_not_batches(family, tmp_path):
    """Completions differ in length: a mean of means would be another loss."""
    updated = []
    for size, steps in ((4, 1), (1, 4)):
        model, _ = tiny.build(family)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        trainer = train(tmp_path, family=family, model=model, learning_rate=0.1, max_grad_norm=0.0, **options)
        updated.append((loss_of(trainer), trainer.state.log_history[0]["grad_norm"], model.state_dict()))
    (loss, norm, one), (other_loss, other_norm, many) = updated
    assert other_loss == pytest.approx(loss, rel=1e-5) and other_norm == pytest.approx(norm, rel=1e-5)
    before = tiny.build(family)[0].state_dict()
    moved = sum((one[name] - before[name]).square().sum() for name in one).sqrt()
    apart = sum((one[name] - many[name]).square().sum() for name in one).sqrt()
    assert moved > 1e-3 and apart / moved < 1e-4


def test_it_learns_and_only_the_adapter_moves(tmp_path):
    model = with_adapter(tiny.build("qwen2_5_vl")[0], trained=False)
    before = copy.deepcopy(model.state_dict())
    trainer = train(tmp_path, model=model, learning_rate=1e-2, max_steps=20, gradient_report=True)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < 0.5 * losses[0]
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert any("visual" in name for name in moved) and any("language_model" in name for name in moved)
    record = trainer.state.log_history[1]
    assert record["gradient/vision/received"] > 0 and record["gradient/language/received"] > 0


def test_evaluation_gives_the_same_loss(tmp_path):
    model, processor = tiny.build("qwen2_5_vl")
    data = Dataset.from_list(rows())
    options = config(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    trainer = VLMSFTTrainer(model, options, data, data, processor)
    trainer.train()
    losses = [record[key] for record in trainer.state.log_history for key in ("loss", "eval_loss") if key in record]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("red", "red"),
        (7, "7"),
        (7.0, "7"),
        (0, "0"),
        ([{"role": "assistant", "content": "red"}], "red"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "red"}]}], "red"),
    ],
)
def test_what_a_completion_may_be(value, text, tmp_path):
    model, processor = tiny.build("qwen2_5_vl")
    data = [{"prompt": tiny.prompt(images=0), "answer": value}] * 4
    options = config(tmp_path, completion_column="answer")
    trainer = VLMSFTTrainer(model, options, Dataset.from_list(data), processing_class=processor)
    labels = trainer.collate_rows([trainer.train_dataset[0]])["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == f"{text}<|im_end|>"


def test_a_templated_prompt_and_a_tokenizer_end_their_completion_too():
    _, processor = tiny.build("qwen2_5_vl")
    words = copy.deepcopy(processor.tokenizer)
    expected = words("red cat", add_special_tokens=False)["input_ids"] + [words.eos_token_id]
    assert completion_ids(processor, to_sample({"prompt": "hello"}), "red cat") == expected
    words.chat_template = processor.chat_template
    assert completion_ids(words, to_sample({"prompt": tiny.prompt(images=0)}), "red cat") == expected


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_text_only_batch_owes_the_vision_tower_nothing(family, tmp_path):
    data = [{"prompt": tiny.prompt(word, 0), "completion": "red"} for word in tiny.WORDS[:4]]
    trainer = train(tmp_path, data, family)
    assert trainer._gradient_check.pending, "vision is still owed"


def test_a_detached_tower_stops_it(tmp_path):
    model = with_adapter(tiny.build("qwen2_5_vl")[0], trained=True)
    merger = model.get_base_model().model.visual.merger
    merger.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(GradientError, match="vision tower"):
        train(tmp_path, model=model)


def test_users_objects_stay_and_errors_are_sentences(tmp_path):
    model, processor = tiny.build("qwen2_5_vl")
    processor.tokenizer.padding_side = "right"
    before = repr(processor)
    data = Dataset.from_list(rows())
    VLMSFTTrainer(model, config(tmp_path), data, processing_class=processor).train()
    assert repr(processor) == before
    with pytest.raises(ConfigError, match='no column "text" to learn .it has answer, prompt, images, completion'):
        VLMSFTTrainer(model, config(tmp_path, completion_column="text"), data, processing_class=processor)
    for empty in (None, ""):
        with pytest.raises(DataFormatError, match='A row has no text in "completion"'):
            train(tmp_path, [{**row, "completion": empty} for row in rows()[:3]] + rows()[3:])
    with pytest.raises(UnsupportedError, match="label_smoothing_factor=0.1"):
        config(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ConfigError, match="per_device_train_batch_size=0: needs 1 or more"):
        config(tmp_path, per_device_train_batch_size=0)
