"""What a model says to encoded prompts: greedily, or drawn at a temperature."""

from typing import Any

import torch

from ..collate import model_inputs
from ..encode import EncodedPrompt
from ..models.families import family_of, placeholder_ids, together
from ..models.modes import inference_mode


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


def drawn_tokens(
    model: Any,
    processor: Any,
    encodings: list[EncodedPrompt],
    max_new_tokens: int,
    samples: int,
    *,
    temperature: float,
    seed: int,
    batch_size: int,
) -> list[list[list[int]]]:
    """``samples`` completions of each prompt, drawn from the model's whole distribution at a temperature.

    The same seed, prompts and batch size draw the same; the caller's random state stays as it was.

    Args:
        batch_size: completions that are generated at a time.

    Returns:
        of each prompt, the tokens of its completions.
    """
    # A published model's own top_k of 1 would undo every temperature; penalties are not the model's distribution.
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    options |= {"min_p": None, "repetition_penalty": 1.0}
    repeated = [encoding for encoding in encodings for _ in range(samples)]
    device = next(model.parameters()).device
    flat: list[list[int]] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(repeated), batch_size):
            some = repeated[start : start + batch_size]
            flat += completion_tokens(model, processor, some, max_new_tokens, **options)
    return [flat[start : start + samples] for start in range(0, len(flat), samples)]


def decoded_texts(processor: Any, ids: list[list[int]]) -> list[str]:
    texts = getattr(processor, "tokenizer", processor).batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]
