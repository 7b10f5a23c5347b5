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


class Moved:
    """The parameters that have had a gradient. Only these get a zero in the place of a skipped one: others may have no
    part in the loss, and an optimizer would let them decay."""

    def __init__(self, family: Family) -> None:
        self.family, self.names = family, set[str]()

    def note(self, model: Any) -> None:
        """Look at the gradients of a step."""
        self.names.update(name for name, p in plain_names(model) if p.grad is not None)

    def cover(self, model: Any, senses: tuple[str, ...]) -> bool:
        """Whether every trained tower that rows of these senses use has had a gradient, and there is one."""
        trained = {tower_of(self.family, name) for name, p in plain_names(model) if p.requires_grad}
        used = {tower for tower in trained if _is_used(tower, set(senses))}
        return bool(used) and used <= {tower_of(self.family, name) for name in self.names}


def plain_names(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters by the names that they have without wrappers around the model."""
    for name, parameter in model.named_parameters():
        yield name.removeprefix("module.").removeprefix("base_model.model."), parameter


def zero_gradients(model: Any, family: Family, encodings: list[EncodedPrompt], moved: set[str] | None = None) -> Tensor:
    """A zero that gives a zero gradient to the trained parameters of the towers that the rows' forward would have used.

    Args:
        model: the plain model.
        family: its row of the table.
        encodings: the prompts whose backward pass is skipped.
        moved: names of parameters that have had a gradient, to leave out the others; None takes all.
    """
    senses = {sense for encoded in encodings for sense in encoded.senses}
    used = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and _is_used(tower_of(family, name), senses) and (moved is None or name in moved)
    ]
    return _Zero.apply(*used) if used else torch.zeros((), device=model.device)


def _is_used(tower: str, senses: set[str]) -> bool:
    if tower in ("vision", "audio"):
        return tower in senses
    return bool(senses) if tower == "projector" else True
