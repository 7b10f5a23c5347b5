"""Encoded prompts to model inputs, all families by one rule; and a buffered rollout to plain data and back."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .encode import EncodedPrompt


def collate(
    encodings: list[EncodedPrompt], width: int | None = None, extra: list[int] | None = None, device: Any = None
) -> dict[str, Any]:
    """Encoded prompts to the model's keyword arguments, all families by one rule, without ids and mask.

    Token-level tensors are left-padded to the prompts' common width and extended over what follows the prompt;
    everything else is zero-padded on its trailing dimensions and concatenated on dimension 0.

    Args:
        encodings: one per row (B); rows of a group may share one object.
        width: total width of the sequences; by default the longest row.
        extra: per row, how many tokens follow the prompt (completion, tool results, right padding); default 0.
        device: where the tensors go.

    Returns:
        token-level tensors (B, width, ...), media tensors (sum of first dimensions, ...) and the rows' options.
    """
    extra = [0] * len(encodings) if extra is None else extra
    lengths = [len(encoded.input_ids) + more for encoded, more in zip(encodings, extra, strict=True)]
    width = max(lengths) if width is None else width
    inputs: dict[str, Any] = {}
    for key in dict.fromkeys(key for encoded in encodings for key in encoded.tokens):
        example = next(encoded.tokens[key] for encoded in encodings if key in encoded.tokens)
        rows = [_extend(e, key, example, width - n, more) for e, n, more in zip(encodings, lengths, extra, strict=True)]
        inputs[key] = pad_and_concatenate(rows).to(device)
    for key in dict.fromkeys(key for encoded in encodings for key in encoded.media):
        rows = [encoded.media[key] for encoded in encodings if key in encoded.media]
        inputs[key] = pad_and_concatenate(rows).to(device)
    for encoded in encodings:
        inputs |= encoded.options
    return inputs


def _extend(encoded: EncodedPrompt, key: str, example: Tensor, left: int, right: int) -> Tensor:
    value = encoded.tokens.get(key)
    if value is None:  # a text row between image rows
        value = example.new_zeros((1, len(encoded.input_ids), *example.shape[2:]))
    # Type ids are 0 for text, or what ``after`` says. A mask over media (L, ...) keeps the last prompt token's view.
    last = value[:, -1:] if value.ndim > 2 else value.new_full((1, 1), encoded.after.get(key, 0))
    tail = last.expand(-1, right, *value.shape[2:])
    return torch.cat([value.new_zeros((1, left, *value.shape[2:])), value, tail], 1)


def pad_and_concatenate(tensors: list[Tensor]) -> Tensor:
    """Concatenate on dimension 0, zero-padded at the end of the other dimensions to their largest sizes."""
    if len(tensors) == 1:
        return tensors[0]
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        if list(tensor.shape[1:]) != shape:
            larger = tensor.new_zeros((tensor.shape[0], *shape))
            larger[tuple([slice(None), *(slice(0, size) for size in tensor.shape[1:])])] = tensor
            tensor = larger
        padded.append(tensor)
    return torch.cat(padded)


def model_inputs(encodings: list[EncodedPrompt], pad_token_id: int, device: Any = None) -> dict[str, Any]:
    """A left-padded batch for ``generate``: ``input_ids`` and ``attention_mask`` (B, L) with ``collate``'s tensors."""
    width = max(len(encoded.input_ids) for encoded in encodings)
    ids = [[pad_token_id] * (width - len(e.input_ids)) + e.input_ids for e in encodings]
    mask = [[0] * (width - len(e.input_ids)) + [1] * len(e.input_ids) for e in encodings]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        **collate(encodings, device=device),
    }


_FIELDS = [entry.name for entry in fields(EncodedPrompt)]


def pack_rollout(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """A buffered rollout as plain containers and tensors; encodings that rows share are kept once."""
    unique: dict[int, int] = {}
    plain, packed = [], []
    for batch in batches:
        index = []
        for encoded in batch["encodings"]:
            if id(encoded) not in unique:
                unique[id(encoded)] = len(plain)
                plain.append({name: getattr(encoded, name) for name in _FIELDS})
            index.append(unique[id(encoded)])
        packed.append({**batch, "encodings": index})
    return {"encodings": plain, "batches": packed}


def unpack_rollout(state: dict[str, Any], device: Any) -> list[dict[str, Any]]:
    """The inverse of ``pack_rollout``; a batch's own tensors go to ``device``, encodings stay where they are made."""
    encodings = [EncodedPrompt(**plain) for plain in state["encodings"]]
    return [
        {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        | {"encodings": [encodings[i] for i in batch["encodings"]]}
        for batch in state["batches"]
    ]
