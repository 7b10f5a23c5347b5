"""Held-out figures: the interval, what counts, what blanking takes away, and a model that is left as it was."""

import math
from functools import partial

import pytest
import reference
import tiny
import torch
from datasets import Dataset
from PIL import Image

from vlm_grpo.errors import MediaError, RewardError
from vlm_grpo.evaluate import accuracy_of_learned, evaluate, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 1 - 0.1170, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_equals_published_values(successes, n, low, high):
    found = wilson(successes, n)
    assert found == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert 0.0 <= found[0] <= found[1] <= 1.0


def test_wilson_solves_its_equation():
    """The ends are the proportions p0 from which the observed one is z standard errors away."""
    for successes, n in ((3, 10), (50, 80), (359, 360)):
        for end in wilson(successes, n):
            distance = abs(successes / n - end) / math.sqrt(end * (1 - end) / n)
            assert distance == pytest.approx(1.959964, rel=1e-6)


@pytest.fixture(scope="module")
def built():
    return tiny.build("qwen2_5_vl")


def rows(count: int = 6) -> list[dict]:
    pictures = [[tiny.image(i, (56 + 28 * (i % 3), 56))] if i != 4 else [] for i in range(count)]
    return [
        {"prompt": tiny.prompt("read the digit", len(images)), "images": images, "answer": str(i)}
        for i, images in enumerate(pictures)
    ]


def alone(model, processor, row, length=5) -> str:
    """The greedy answer token by token, one row at a time, from the plain logits."""
    encoded = reference.encode(processor, row)
    ids: list[int] = []
    while len(ids) < length and (not ids or ids[-1] != tiny.EOS):
        inputs = {key: value for key, value in encoded.items() if key not in ("input_ids", "attention_mask")}
        tail = torch.tensor([ids], dtype=torch.long)
        inputs["mm_token_type_ids"] = torch.cat([encoded["mm_token_type_ids"], torch.zeros_like(tail)], 1)
        with torch.no_grad():
            logits = model(input_ids=torch.cat([encoded["input_ids"], tail], 1), **inputs, use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_answers_are_those_of_each_row_alone_and_batches_change_nothing(built):
    model, processor = built
    data = rows()
    expected = [alone(model, processor, row) for row in data]
    assert len(set(expected)) > 2, "the pictures matter"
    done = []
    for size in (1, 4, 32):
        found = evaluate(model, processor, data, batch_size=size, max_new_tokens=5, progress=done.append)
        assert found.answers == expected
    assert done == [1, 2, 3, 4, 5, 6, 4, 6, 6]
    dataset = Dataset.from_list(data)
    assert evaluate(model, processor, dataset, batch_size=4, max_new_tokens=5).answers == expected


def test_blanking_takes_the_picture_away_and_keeps_its_size(built, monkeypatch):
    model, processor = built
    data = rows()
    sighted = evaluate(model, processor, data, max_new_tokens=5).answers
    blind = evaluate(model, processor, data, blank=True, max_new_tokens=5).answers
    black = [{**row, "images": [Image.new("RGB", image.size) for image in row["images"]]} for row in data]
    assert blind == [alone(model, processor, row) for row in black]
    assert sum(a != b for a, b in zip(sighted, blind, strict=True)) >= 3
    assert sighted[4] == blind[4], "a row without a picture is the same"
    repainted = [
        {**row, "images": [tiny.image(50 + i, image.size) for i, image in enumerate(row["images"])]} for row in data
    ]
    assert evaluate(model, processor, repainted, blank=True, max_new_tokens=5).answers == blind, "text and size only"


def test_rows_without_a_score_leave_the_denominator(built):
    model, processor = built

    def score(prompts, completions, completion_ids, answer, images, **columns):
        assert len(prompts) == len(completions) == len(completion_ids) == len(images)
        assert completions[0][0]["role"] == "assistant" and prompts[0][0]["role"] == "user"
        return [None if int(a) < 2 else float(int(a) % 2) for a in answer]

    found = evaluate(model, processor, rows(), score=score, batch_size=4, max_new_tokens=2)
    assert found.accuracy == 2 / 4 and found.ci95 == wilson(2, 4)
    assert found.correct == [False, False, False, True, False, True]
    nothing = evaluate(model, processor, rows(), score=lambda completions, **_: [None] * len(completions))
    assert (nothing.accuracy, nothing.ci95) == (0.0, (0.0, 1.0))
    assert evaluate(model, processor, []).answers == []


def test_partial_scores_and_async_and_logging_rewards(built):
    model, processor = built

    async def score(completions, log_extra, log_metric, trainer_state, **columns):
        log_extra("x", list(range(len(completions))))
        log_metric("y", 1.0)
        return [0.3, 0.99, 1.0, 1.7, 0.0, -1.0]

    found = evaluate(model, processor, rows(), score=score, max_new_tokens=2)
    assert found.correct == [False, False, True, True, False, False] and found.accuracy == 2 / 6


def test_templated_prompts_are_scored_as_texts(built):
    model, processor = built
    text = processor.apply_chat_template(tiny.prompt("read the digit"), tokenize=False, add_generation_prompt=True)
    seen = []
    data = [{**row, "prompt": text} for row in rows() if row["images"]]
    found = evaluate(model, processor, data, score=lambda completions, **_: seen.extend(completions) or [1.0] * 5)
    assert found.answers == seen and all(isinstance(completion, str) for completion in seen)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored_even_after_an_error(built, training):
    model, processor = built
    model.train(training)
    modes = []

    def score(completions, **columns):
        modes.append(model.training)
        raise ValueError("a reward's bug")

    with pytest.raises(ValueError, match="a reward's bug"):
        evaluate(model, processor, rows(2), score=score, max_new_tokens=2)
    assert modes == [False] and model.training is training
    evaluate(model, processor, rows(2), max_new_tokens=2)
    assert model.training is training
    model.eval()


def test_a_broken_picture_names_its_row(built):
    model, processor = built
    data = [*rows(2), {"prompt": tiny.prompt(), "images": [b"junk"], "answer": "x"}]
    with pytest.raises(MediaError, match="row 3 of the evaluation"):
        evaluate(model, processor, data, batch_size=2, max_new_tokens=2)


@pytest.mark.parametrize("column", ["completion", "answer"])
def test_a_warm_start_is_scored_by_the_text_that_it_learns(built, column):
    model, processor = built
    plain = [{key: value for key, value in row.items() if key != "answer"} for row in rows(3)]
    right = evaluate(model, processor, plain, score=lambda completions, **_: [1.0] * 3, max_new_tokens=2).answers
    texts = [right[0], [{"role": "assistant", "content": right[1]}], "another"]
    data = [{**row, column: text} for row, text in zip(plain, texts, strict=True)]
    score: dict = {"score": partial(accuracy_of_learned, column), "max_new_tokens": 2}
    assert evaluate(model, processor, data, **score, shown_too=[column]).correct == [True, True, False]
    with pytest.raises(RewardError, match=f'there is no column "{column}"'):
        evaluate(model, processor, plain, **score, shown_too=[column])
