"""Log-probabilities of rows without sharing: one prompt per completion, as many rows a forward as fit."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .collate import collate
from .encode import EncodedPrompt
from .models.families import Family, together


class Encodings(list[EncodedPrompt]):
    """The rows' encodings, and of each row whether its gradient is known to be zero, on their way through TRL."""

    idle: list[bool]

    def __init__(self, encodings: list[EncodedPrompt], idle: list[bool] | None = None) -> None:
        super().__init__(encodings)
        self.idle = [False] * len(encodings) if idle is None else idle


def forwards(family: Family, encodings: list[EncodedPrompt], size: int) -> Iterator[list[int]]:
    """The rows of each forward: at most ``size``, and only rows that a family can take together."""
    for start in range(0, len(encodings), size):
        for rows in together(family, encodings[start : start + size]):
            yield [start + row for row in rows]


def logps(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    width: int,
    encodings: list[EncodedPrompt],
    batches: Iterator[list[int]],
    autocast: Callable[[], AbstractContextManager],
    aux_loss: bool = False,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Log-probabilities and entropies (B, width) in nats at the head's temperature, and the router loss a forward.

    Args:
        model: with TRL's fused head.
        ids: (B, L + width), prompts left-padded, completions right-padded; ``mask`` alike, 1 at real tokens.
        width: tokens of the completions.
        encodings: one per row.
        batches: the rows of each forward.
        autocast: the precision of training.
        aux_loss: ask for the router loss.
    """
    shape = (len(ids), width)
    logps = torch.zeros(shape, device=ids.device)
    entropies: Tensor | None = torch.zeros(shape, device=ids.device)
    aux_losses = []
    for rows in batches:
        index = torch.tensor(rows, device=ids.device)
        own_ids, own_mask = ids[index], mask[index]
        inputs = collate([encodings[row] for row in rows], ids.size(1), [width] * len(rows), ids.device)
        if aux_loss:
            inputs["output_router_logits"] = True
        labels = own_ids.masked_fill(own_mask == 0, -100)
        labels[:, :-width] = -100
        with autocast():
            out = model(input_ids=own_ids, attention_mask=own_mask, **inputs, labels=labels, fused_lm_head=True)
        logps = logps.index_copy(0, index, out.log_probs[:, -width:].to(logps.dtype))
        if out.entropy is None:  # a reference's head computes none
            entropies = None
        elif entropies is not None:
            entropies = entropies.index_copy(0, index, out.entropy[:, -width:].to(logps.dtype))
        aux_losses.append(out.aux_loss)
    return logps, entropies, aux_losses
