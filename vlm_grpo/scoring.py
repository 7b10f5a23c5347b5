"""Log-probabilities and values of rows without sharing: one prompt per completion, as many rows a forward as fit."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .collate import collate
from .encode import EncodedPrompt
from .models.families import Family, family_of, together
from .models.heads import last_hidden_state
from .models.modes import pinned_forward

T = TypeVar("T")


class Encodings(list[EncodedPrompt]):
    """The rows' encodings, and of each row whether its gradient is known to be zero, on their way through TRL."""

    idle: list[bool]

    def __init__(self, encodings: list[EncodedPrompt], idle: list[bool] | None = None) -> None:
        super().__init__(encodings)
        self.idle = [False] * len(encodings) if idle is None else idle


class _Whole(nn.Module):
    """Stands where DDP keeps its module: the work of a micro-batch, however many forwards of the module it takes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        return work(self.module)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """By the module's own names, by which DDP knows those that it must not share."""
        return self.module.named_buffers(*args, **kwargs)


def as_one_forward(model: Any, work: Callable[[Any], T]) -> T:
    """``work(model)``; under DDP one forward of it, within which ``work`` has the module as often as it needs it.

    DDP allows one forward a backward pass: each shares buffers among the processes, and only what the last returned is
    searched for the parameters that a process does not use. So one process may take several forwards for its rows, and
    another one fewer, or none that reaches a tower.

    Args:
        model: the trainer's model, wrapped as it may be.
        work: returns all that the loss is made of, as tensors, and tuples and lists of them.
    """
    if not isinstance(model, DistributedDataParallel):
        return work(model)
    module = model.module
    model.module = _Whole(module)
    try:
        return model(work)
    finally:
        model.module = module


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


def score_rows(
    trainer: Any,
    ids: Tensor,
    mask: Tensor,
    width: int,
    rows: Encodings,
    batch_size: int | None,
    aux_loss: bool,
    model: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A GRPO trainer's log-probabilities and entropies (B, width) in nats and router loss, shared where that is exact.

    Args:
        trainer: whose sharing, precision and family count.
        ids, mask, width, aux_loss: as in ``logps``.
        rows: the rows' encodings.
        batch_size: rows of a forward at most; None takes all.
        model: what is called, unwrapped from DDP.
    """
    autocast, most = trainer.accelerator.autocast, batch_size or len(rows)

    def unshared(own: Any, few: list[int]) -> Tensor:
        """The same rows, one prompt per completion."""
        return logps(own, ids, mask, width, rows, iter([[row] for row in few]), autocast)[0][few]

    with pinned_forward(model):
        if trainer.sharing.on(model, rows):
            sizes = (most, ids.size(1) - width)
            shared = trainer.sharing.logps(model, ids[:, -width:], mask[:, -width:], rows, rows.idle, unshared, *sizes)
            if shared is not None:
                return *shared, None
        batches = forwards(family_of(trainer.model.config), rows, most)
        found, entropies, losses = logps(model, ids, mask, width, rows, batches, autocast, aux_loss)
        return found, entropies, torch.stack(losses).mean() if aux_loss else None


def values(
    model: Any,
    head: Callable[[Tensor], Tensor],
    ids: Tensor,
    mask: Tensor,
    width: int,
    encodings: list[EncodedPrompt],
    batches: Iterator[list[int]],
    autocast: Callable[[], AbstractContextManager],
) -> Tensor:
    """What a scalar head makes of the hidden state in front of each completion token: (B, width), 0 at padding.

    Args:
        model: the plain model, adapters included.
        head: hidden states (..., H) to numbers (...).
        ids, mask, width, encodings, batches, autocast: as in ``logps``.
    """
    found = torch.zeros((len(ids), width), device=ids.device)
    for rows in batches:
        index = torch.tensor(rows, device=ids.device)
        inputs = collate([encodings[row] for row in rows], ids.size(1), [width] * len(rows), ids.device)
        with autocast():
            hidden = last_hidden_state(model, input_ids=ids[index], attention_mask=mask[index], **inputs)
            own = head(hidden[:, -width - 1 : -1])
        found = found.index_copy(0, index, own.masked_fill(mask[index, -width:] == 0, 0.0))
    return found
