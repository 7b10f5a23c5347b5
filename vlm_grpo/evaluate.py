"""Held-out accuracy by greedy decoding, with an interval, and with the media blanked as a control."""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .data import Sample, to_sample
from .encode import EncodedPrompt, encode, model_inputs
from .media import Medium
from .rewards.accuracy import accuracy

_TRLS_OWN = ("prompt", "completion", "completion_ids")  # columns that TRL keeps from reward functions


@dataclass(frozen=True)
class Evaluation:
    """What a model answered on held-out rows.

    Attributes:
        accuracy: share of right answers.
        ci95: Wilson 95% interval of it.
        answers: the decoded completions, in row order.
        correct: per row.
    """

    accuracy: float
    ci95: tuple[float, float]
    answers: list[str]
    correct: list[bool]


def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); (0, 1) without observations.

    >>> [round(x, 4) for x in wilson(8, 10)]
    [0.4902, 0.9433]
    """
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def evaluate(
    model: Any,
    processor: Any,
    rows: Any,
    *,
    score: Callable[..., Sequence[float | None]] = accuracy,
    blank: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    template: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Answer every row greedily and count the right answers.

    Args:
        model: in any mode; its mode is restored.
        processor: the model's.
        rows: dataset rows; never trained on, or the figure means nothing.
        score: a reward function, called as the trainer calls it; a row counts as right when it returns 1 or more.
        blank: replace every image by a black one of its size: what is left is what the text alone gives away.
        batch_size: rows per ``generate`` call.
        max_new_tokens: length limit of an answer.
        template: keyword arguments of the chat template, as in training (``chat_template_kwargs``).
        progress: called with the number of rows done after each batch.
    """
    answers: list[str] = []
    scores: list[float | None] = []
    with _evaluation_mode(model):
        for batch in _batches(rows, batch_size):
            samples = [
                to_sample(row, where=f"row {n} of the evaluation") for n, row in enumerate(batch, len(answers) + 1)
            ]
            encodings = [
                encode(processor, _blanked(sample) if blank else sample, **(template or {})) for sample in samples
            ]
            ids = _greedy_ids(model, processor, encodings, max_new_tokens)
            texts = _decode(processor, ids)
            values = score(**_reward_arguments(batch, samples, texts, ids))
            scores += _awaited(values) if inspect.iscoroutine(values) else values
            answers += texts
            if progress is not None:
                progress(len(answers))
    correct = [value is not None and value >= 1 for value in scores]
    scored = sum(value is not None for value in scores)
    return Evaluation(sum(correct) / max(1, scored), wilson(sum(correct), scored), answers, correct)


def greedy(model: Any, processor: Any, encodings: list[EncodedPrompt], max_new_tokens: int) -> list[str]:
    """The greedy completion of each encoded prompt, decoded without special tokens."""
    return _decode(processor, _greedy_ids(model, processor, encodings, max_new_tokens))


def _greedy_ids(model: Any, processor: Any, encodings: list[EncodedPrompt], max_new_tokens: int) -> list[list[int]]:
    """The tokens of each completion, up to and including the one that ends it."""
    tokenizer = getattr(processor, "tokenizer", processor)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    inputs = model_inputs(encodings, pad, next(model.parameters()).device)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    completions = output[:, inputs["input_ids"].size(1) :].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in completions]


def _decode(processor: Any, ids: list[list[int]]) -> list[str]:
    texts = getattr(processor, "tokenizer", processor).batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _reward_arguments(
    rows: list[dict[str, Any]], samples: list[Sample], texts: list[str], ids: list[list[int]]
) -> dict[str, Any]:
    """What TRL gives a reward function: completions are messages where prompts are, and columns come by name."""
    completions = [
        text if isinstance(sample.prompt, str) else [{"role": "assistant", "content": text}]
        for sample, text in zip(samples, texts, strict=True)
    ]
    columns = {key: [row.get(key) for row in rows] for key in rows[0] if key not in _TRLS_OWN}
    logs = {"trainer_state": None, "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    prompts = [row["prompt"] for row in rows]
    return {"prompts": prompts, "completions": completions, "completion_ids": ids, **columns, **logs}


def _awaited(coroutine: Any) -> Any:
    """The result of an async reward; in a thread of its own, since a notebook runs a loop in this one."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, coroutine).result()


def _batches(rows: Any, size: int) -> Iterator[list[dict[str, Any]]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _blanked(sample: Sample) -> Sample:
    black = {id(medium): Medium(Image.new("RGB", medium.open().size), medium.where) for medium in sample.media}
    media = [black[id(medium)] for medium in sample.media]
    if isinstance(sample.prompt, str):
        return Sample(sample.prompt, media, sample.columns)
    prompt = [
        {
            **message,
            "content": [
                {"type": "image", "image": black[id(part["image"])]} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in sample.prompt
    ]
    return Sample(prompt, media, sample.columns)


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
