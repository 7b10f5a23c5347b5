"""Held-out accuracy by greedy decoding, with an interval, and with the media blanked as a control."""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from .collate import model_inputs
from .data import Sample, blanked, decoded, undecoded
from .encode import EncodedPrompt
from .errors import EncodingError, MediaError, OverlongError
from .intake import Intake
from .media.hearing import extractor_of
from .models.families import family_of, placeholder_ids, placeholder_ids_by_kind, together
from .models.modes import inference_mode
from .rewards.accuracy import accuracy
from .rewards.text import completion_text

_TRLS_OWN = ("prompt", "completion", "completion_ids")  # columns that TRL keeps from reward functions


@dataclass(frozen=True)
class Evaluation:
    """What a model answered on held-out rows.

    Attributes:
        accuracy: share of right answers.
        ci95: Wilson 95% interval of it.
        answers: the decoded completions, in row order.
        correct: per row.
        left_out: rows that could not be used; they count for nothing.
    """

    accuracy: float
    ci95: tuple[float, float]
    answers: list[str]
    correct: list[bool]
    left_out: int = 0


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
    intake: Intake | None = None,
    progress: Callable[[int], None] | None = None,
    shown_too: Sequence[str] = (),
) -> Evaluation:
    """Answer every row greedily and count the right answers.

    Args:
        model: in any mode; its mode is restored.
        processor: the model's.
        rows: dataset rows; never trained on, or the figure means nothing.
        score: a reward function, called as the trainer calls it; a row counts as right when it returns 1 or more.
        blank: black pictures and frames and silence in place of the media: what is left is what the text gives away.
        batch_size: rows per ``generate`` call.
        max_new_tokens: length limit of an answer.
        template: keyword arguments of the chat template, as in training (``chat_template_kwargs``).
        intake: how rows are read, and what happens to those that cannot be; by default one that stops at them.
        progress: called with the number of rows done after each batch.
        shown_too: columns that ``score`` reads though TRL keeps them from rewards, such as ``completion``.

    Raises:
        MediaError, EncodingError, OverlongError: a row cannot be used and the intake leaves none out.
    """
    intake = intake or Intake(processor, placeholder_ids_by_kind(model.config, processor), template=template)
    answers: list[str] = []
    scores: list[float | None] = []
    rows, pictures = undecoded(rows)
    done = 0
    with inference_mode(model):
        for batch in _batches(rows, batch_size):
            read = _read(intake, batch, done, blank)
            done += len(batch)
            if read:
                ids = completion_tokens(model, processor, [encoding for _, _, encoding in read], max_new_tokens)
                texts = decoded_texts(processor, ids)
                shown = [decoded(row, pictures) for row, _, _ in read]
                arguments = _reward_arguments(shown, [sample for _, sample, _ in read], texts, ids)
                arguments |= {name: [row.get(name) for row in shown] for name in shown_too if name in shown[0]}
                values = score(**arguments)
                scores += _awaited(values) if inspect.iscoroutine(values) else values
                answers += texts
            if progress is not None:
                progress(done)
    correct = [value is not None and value >= 1 for value in scores]
    scored = sum(value is not None for value in scores)
    right = sum(correct)
    return Evaluation(right / max(1, scored), wilson(right, scored), answers, correct, done - len(answers))


def accuracy_of_learned(column: str, **columns: Any) -> list[float | None]:
    """``accuracy`` against the text that a warm start learns, which may be messages."""
    if column in columns:
        texts = [completion_text(value) if isinstance(value, list) else value for value in columns[column]]
        columns = {**columns, column: texts}
    return accuracy(column=column, **columns)


def _read(
    intake: Intake, batch: list[dict[str, Any]], done: int, blank: bool
) -> list[tuple[dict[str, Any], Sample, EncodedPrompt]]:
    """The rows that can be used, as samples and encodings."""
    out = []
    for number, row in enumerate(batch, done + 1):
        try:
            sample, encoding = intake.read(row, f"row {number} of the evaluation")
            if blank and sample.media:
                extractor = extractor_of(intake.processor)
                sample = blanked(sample, intake.media, extractor.sampling_rate if extractor else None)
                encoding = intake.encode(sample)
        except (MediaError, EncodingError, OverlongError) as error:
            intake.leave_out(error)
            continue
        out.append((row, sample, encoding))
    return out


def complete(
    model: Any, processor: Any, encodings: list[EncodedPrompt], max_new_tokens: int, **options: Any
) -> list[str]:
    """The completion of each encoded prompt, decoded without special tokens; greedy. The model's mode is restored.

    ``options`` are further arguments of ``generate``, such as a temperature or (for one prompt) a streamer.
    """
    with inference_mode(model):
        return decoded_texts(processor, completion_tokens(model, processor, encodings, max_new_tokens, **options))


def completion_tokens(
    model: Any, processor: Any, encodings: list[EncodedPrompt], max_new_tokens: int, **more: Any
) -> list[list[int]]:
    """The tokens of each completion, up to and including the one that ends it."""
    tokenizer = getattr(processor, "tokenizer", processor)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad}
    options |= {"eos_token_id": sorted(ends) or None, **more}
    options["suppress_tokens"] = list(placeholder_ids(model.config, processor)) or None
    out: dict[int, list[int]] = {}
    for rows in together(family_of(model.config), encodings):
        inputs = model_inputs([encodings[row] for row in rows], pad, next(model.parameters()).device)
        with torch.no_grad():
            output = model.generate(**inputs, **options)
        for row, ids in zip(rows, output[:, inputs["input_ids"].size(1) :].tolist(), strict=True):
            out[row] = ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]
    return [out[row] for row in range(len(encodings))]


def decoded_texts(processor: Any, ids: list[list[int]]) -> list[str]:
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
