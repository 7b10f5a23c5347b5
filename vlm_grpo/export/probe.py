"""What a model says and thinks on the sample rows, and how far two models are apart."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..collate import collate
from ..encode import EncodedPrompt
from ..evaluate import completion_tokens, decoded_texts
from ..models.modes import inference_mode

# Of a number's significand, the implied one included.
BITS = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}


@dataclass(frozen=True)
class Probe:
    """One model on N rows.

    Attributes:
        ids: the greedy answer to each row, as T tokens.
        answers: the same as texts.
        fed: the answers that were fed to get ``logits``: the reference's, so that two models see the same.
        logits: of each row (T, V), at the last prompt token and along the answer that was fed.
        bits: of its coarsest weights that are not 4-bit.
    """

    ids: list[list[int]]
    answers: list[str]
    fed: list[list[int]]
    logits: list[Tensor]
    bits: int


def probe(
    model: Any,
    processor: Any,
    encodings: list[EncodedPrompt],
    max_new_tokens: int,
    like: Probe | None = None,
    adapter: bool = True,
) -> Probe:
    """Greedy answers, and the logits at the last prompt token and along the answer of ``like``, or its own.

    Args:
        model: with or without an adapter; its mode is restored.
        processor: decodes the answers.
        encodings: the rows.
        max_new_tokens: longest answer.
        like: the reference whose answers are fed.
        adapter: False switches the model's adapter off meanwhile, which leaves its base model.
    """
    switch: AbstractContextManager[Any] = nullcontext() if adapter else model.disable_adapter()
    with inference_mode(model), switch, torch.no_grad():
        ids = completion_tokens(model, processor, encodings, max_new_tokens)
        fed = ids if like is None else like.fed
        logits = _all_logits(model, encodings, fed)
    weights = [weight for name, weight in model.named_parameters() if weight.ndim > 1 and ".lora_" not in name]
    bits = min(BITS.get(str(weight.dtype).removeprefix("torch."), 24) for weight in weights)
    return Probe(ids, decoded_texts(processor, ids), fed, logits, bits)


def _logits(model: Any, encoding: EncodedPrompt, answer: list[int]) -> Tensor:
    device = next(model.parameters()).device
    follow = answer[:-1]
    ids = torch.tensor([encoding.input_ids + follow], device=device)
    inputs = collate([encoding], extra=[len(follow)], device=device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits
    return logits[0, -len(answer) :].float().cpu()  # (T, V)


def largest(one: Probe, other: Probe) -> float:
    """The largest difference between two models' logits, as far as the same tokens were fed; NaN where there is one."""
    found = []
    for a, b, fed, also in zip(one.logits, other.logits, one.fed, other.fed, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(fed, also, strict=False)) if x != y), len(fed)) + 1
        found.append(float((a[:same] - b[:same]).abs().max()))
    return math.nan if any(math.isnan(value) for value in found) else max(found)


def equal_answers(one: Probe, other: Probe) -> int:
    """On how many rows both give the same answer, token by token."""
    return sum(a == b for a, b in zip(one.ids, other.ids, strict=True))


def share(export: Probe, export_base: Probe, run: Probe, base: Probe) -> float:
    """How much of the change from ``base`` to ``run`` is in the change from ``export_base`` to ``export``.

    The least-squares factor between the two changes of the logits: 1 for a whole merge, 0 for a forgotten one. Rounding
    hardly moves it, since it points elsewhere.
    """
    product = norm = 0.0
    for made, start, wanted, origin in zip(export.logits, export_base.logits, run.logits, base.logits, strict=True):
        change = (wanted - origin).double()
        product += float(((made - start).double() * change).sum())
        norm += float(change.square().sum())
    return product / norm


def sensitivity(model: Any, encodings: list[EncodedPrompt], like: Probe, bits: float) -> float:
    """How far the logits move when every weight moves at random, by as much as numbers of so many bits are rounded.

    Measured, since models differ in it by orders of magnitude. The model is of no more use afterwards.

    Args:
        model: with weights that are numbers: 4-bit ones stay as they are.
        encodings: the rows.
        like: says what is fed.
        bits: of the significand.
    """
    with inference_mode(model), torch.no_grad():
        before = _all_logits(model, encodings, like.fed)
        generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
        for weight in model.parameters():
            if weight.is_floating_point():
                noise = torch.empty(weight.shape, device=weight.device).uniform_(-1, 1, generator=generator)
                weight.copy_(weight * (1 + noise * 2.0**-bits))
        after = _all_logits(model, encodings, like.fed)
    return largest(replace(like, logits=after), replace(like, logits=before))


def _all_logits(model: Any, encodings: list[EncodedPrompt], fed: list[list[int]]) -> list[Tensor]:
    return [_logits(model, encoding, answer) for encoding, answer in zip(encodings, fed, strict=True)]


def forks(reference: Probe, export: Probe) -> Iterator[tuple[int, float]]:
    """The rows (from 1) whose answers differ, each with the distance between the two tokens in the reference's logits.

    It is near 0 where both were about as likely; an answer that ends where the other goes on is infinitely far.
    """
    for row, (one, other) in enumerate(zip(reference.ids, export.ids, strict=True)):
        if one == other:
            continue
        step = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        if step is None:
            yield row + 1, math.inf
        else:
            logits = reference.logits[row][step]
            yield row + 1, float(logits[one[step]] - logits[other[step]])
