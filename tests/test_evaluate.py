"""Held-out figures: the interval, what counts, what blanking takes away, and a model that is left as it was."""

import asyncio
import math
from functools import partial

import pytest
import reference
import tiny
import torch
from datasets import Dataset
from PIL import Image

from vlm_grpo.errors import ConfigError, MediaError, RewardError
from vlm_grpo.evaluate import Yardstick, accuracy_of_learned, evaluate, wilson
from vlm_grpo.rewards import Failed


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


# ---- several rewards, drawn answers, controls ------------------------------------------------------------------------


def length(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


async def first(completion_ids, **columns):
    return [float(ids[0] % 2) for ids in completion_ids]


def test_every_reward_measures_and_one_says_what_is_right(built):
    model, processor = built

    def partly(answer, **columns):
        return [None if i == "0" else Failed("HTTP 503") if i == "1" else 0.5 for i in answer]

    yard = Yardstick(
        {"first": first, "length": length, "partly": partly}, {"length": 0.1}, correct="length", right_at=3
    )
    found = evaluate(model, processor, rows(4), yardstick=yard, max_new_tokens=3, batch_size=3)
    again = evaluate(model, processor, rows(4), score=first, max_new_tokens=3)
    for row, other in zip(found.rows, again.rows, strict=True):
        assert row.completion == other.completion and row.rewards["first"] == other.rewards["first"]
        assert row.correct is (row.rewards["length"] >= 3)
    assert [row.rewards["partly"] for row in found.rows] == [None, Failed("HTTP 503"), 0.5, 0.5]
    assert found.rows[1].total is None
    values = found.rows[2].rewards
    assert found.rows[2].total == pytest.approx(values["first"] + 0.1 * values["length"] + 0.5)
    assert [row.row for row in found.rows] == [1, 2, 3, 4] and found.rows[1].truth == "1"
    assert found.rows[0].prompt == "[<image 56x56>] read the digit" and found.rows[0].media == ["<image 56x56>"]
    assert found.only({2, 4}).answers == found.answers[1::2] and found.only({2, 4}).left_out == 2


def test_a_reward_that_returns_what_is_none_is_named(built):
    model, processor = built

    def short(completions, **columns):
        return [1.0]

    with pytest.raises(RewardError, match='"short" returned 1 values for 2 completions'):
        evaluate(model, processor, rows(2), score=short, max_new_tokens=2)
    with pytest.raises(RewardError, match='"<lambda>" returned nan'):
        evaluate(model, processor, rows(1), score=lambda **_: [math.nan], max_new_tokens=2)


def test_async_rewards_share_one_event_loop(built):
    model, processor = built
    loops, running = set(), []

    async def slow(completions, **columns):
        loops.add(asyncio.get_running_loop())
        running.append(1)
        await asyncio.sleep(0.05)
        both = len(running) % 2 == 0
        return [float(both)] * len(completions)

    async def also(completions, **columns):
        return await slow(completions)

    yard = Yardstick({"slow": slow, "also": also})
    found = evaluate(model, processor, rows(4), yardstick=yard, batch_size=2, max_new_tokens=1)
    assert len(loops) == 1 and found.accuracy == 1.0, "each waits while the other one runs"


def test_drawn_answers_are_seeded_and_change_nothing_else(built):
    model, processor = built
    options = {"score": first, "max_new_tokens": 4, "batch_size": 4}
    state = torch.random.get_rng_state()
    greedy = evaluate(model, processor, rows(), **options)
    some, same, other = (evaluate(model, processor, rows(), samples=3, seed=s, **options) for s in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert some.answers == greedy.answers and [row.rewards for row in some.rows] == [r.rewards for r in greedy.rows]
    drawn = [row.drawn for row in some.rows]
    assert drawn == [row.drawn for row in same.rows] != [row.drawn for row in other.rows]
    assert all(len(texts) == 3 == len(row.drawn_correct) for texts, row in zip(drawn, some.rows, strict=True))
    assert len({text for texts in drawn for text in texts}) > 6 and all(row.drawn == () for row in greedy.rows)
    cold = evaluate(model, processor, rows(), samples=2, temperature=1e-4, **options)
    assert [row.drawn for row in cold.rows] == [(answer, answer) for answer in greedy.answers]
    with pytest.raises(ConfigError, match="temperature=0: answers are drawn at a temperature above 0"):
        evaluate(model, processor, rows(), samples=2, temperature=0)


def test_shuffling_gives_each_row_the_picture_of_another(built):
    model, processor = built
    data = rows()
    found = evaluate(model, processor, data, control="shuffle", seed=3, max_new_tokens=5)
    pictures = [row["images"] for row in data]
    for row, answered in zip(data, found.rows, strict=True):
        others = [images for images in pictures if images and images is not row["images"]]
        given = [alone(model, processor, {**row, "images": images}) for images in others] if row["images"] else []
        assert answered.completion in given or (not given and answered.completion == alone(model, processor, row))
    assert found.answers != evaluate(model, processor, data, max_new_tokens=5).answers
    table = Dataset.from_list(data)
    again = evaluate(model, processor, table, control="shuffle", seed=3, max_new_tokens=5, batch_size=2)
    assert again.answers == found.answers
    with pytest.raises(ConfigError, match="shuffle needs all rows at hand"):
        evaluate(model, processor, iter(data), control="shuffle")
    with pytest.raises(ConfigError, match="one row has 1 of the 1 of its kind"):
        evaluate(model, processor, data[:1], control="shuffle")


def test_without_its_media_a_row_is_its_text(built):
    model, processor = built
    bare = [{**row, "prompt": tiny.prompt("read the digit", 0), "images": []} for row in rows()]
    expected = evaluate(model, processor, bare, max_new_tokens=5).answers
    assert evaluate(model, processor, rows(), control="text", max_new_tokens=5).answers == expected
    with pytest.raises(ConfigError, match='"blanc" is not known. Did you mean "blank"'):
        evaluate(model, processor, rows(), control="blanc")
