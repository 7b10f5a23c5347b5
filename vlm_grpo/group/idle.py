"""Groups without a gradient: their backward pass is skipped, and leaves the zeros that it would have left."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..encode import EncodedPrompt
from ..models.families import Family, tower_of


@contextmanager
def without_gradient(device: torch.device) -> Iterator[None]:
    """For a forward that is not there without sharing: what it draws (some towers draw for layers that they might skip)
    leaves the samples of the next step as they are."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        yield


class _Zero(torch.autograd.Function):
    """0, whose gradient is zeros for all parameters: an optimizer moves those too, by momentum and decay."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def zero_gradients(model: Any, family: Family, encodings: list[EncodedPrompt]) -> Tensor:
    """A zero that gives a zero gradient to every trained parameter that the rows' forward would have used.

    Args:
        model: the plain model.
        family: its row of the table.
        encodings: the prompts whose backward pass is skipped.
    """
    senses = {sense for encoded in encodings for sense in encoded.senses}
    used = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and _is_used(tower_of(family, name), senses)
    ]
    return _Zero.apply(*used) if used else torch.zeros((), device=model.device)


def _is_used(tower: str, senses: set[str]) -> bool:
    if tower in ("vision", "audio"):
        return tower in senses
    return bool(senses) if tower == "projector" else True
