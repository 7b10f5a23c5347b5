"""A model looked into, and left as it was."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..media import KINDS
from ..randomness import same_random_states


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inference; afterwards the random states, modes and tensors that forwards leave behind are as before.

    Evaluation mode, since what varies by chance in training mode (dropout of attention, skipped layers, router
    jitter) would pass for a difference, and running statistics would be written. Checkpointing is off by its flag
    alone: the methods that switch it forget how it was configured.
    """
    kept = [(module, _changeable(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        with same_random_states(), torch.no_grad():
            model.eval()
            for module in model.modules():
                if "gradient_checkpointing" in vars(module):
                    vars(module)["gradient_checkpointing"] = False
            yield
    finally:
        for module, attributes, buffers in kept:
            vars(module).update(attributes)
            module._buffers.update(buffers)


def _changeable(attributes: dict[str, Any]) -> dict[str, Any]:
    """Modes, and what a forward may remember outside parameters and buffers, such as the last position offsets."""
    kinds = (bool, type(None), Tensor)
    return {name: value for name, value in attributes.items() if isinstance(value, kinds)}


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value``, for this instance only."""
    own = vars(owner).get(name)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if own is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = own


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts the features (rows of hidden size) that forwards inside make, by kind: those of transformers' own methods
    that make them. Families without such methods count nothing."""
    made: Counter[str] = Counter()
    depth = [0]

    def counted(method: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            try:
                output = method(*args, **kwargs)
            finally:
                depth[0] -= 1
            if not depth[0]:  # one of these methods may call another
                made[kind] += _features(output)
            return output

        return run

    with ExitStack() as stack:
        for module in model.modules():
            for kind in KINDS:
                name = f"get_{kind}_features"
                if callable(getattr(type(module), name, None)):
                    stack.enter_context(replaced(module, name, counted(getattr(module, name), kind)))
        yield made


def _features(output: Any) -> int:
    """Rows in what such a method returns: a tensor or one a medium, bare or as an output's ``pooler_output``, which is
    what the language model gets; where a tower projects by itself there is none."""
    value = getattr(output, "pooler_output", None)
    value = getattr(output, "last_hidden_state", output) if value is None else value
    if isinstance(value, Tensor):
        return value.numel() // value.size(-1)
    return sum(_features(part) for part in value) if isinstance(value, (list, tuple)) else 0
