"""Where a NaN or an infinity comes from: a weight, or the first module of a forward or backward pass."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel

# 8-bit numbers know no infinity, and 4-bit weights are packed into bytes.
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def broken_weight(model: nn.Module, trainable: bool = False) -> str | None:
    """The first weight with a NaN or an infinity, as ``"visual.proj.weight" (3 of 64 values)``; None where all are.

    Args:
        model: the model without wrappers that keep a part of each weight only.
        trainable: look at the weights that are trained.
    """
    weights = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.dtype in _FLOATS and parameter.numel() and (parameter.requires_grad or not trainable)
    }
    # One number for all of them: the largest absolute value, which no number type can overflow in.
    if not weights or math.isfinite(get_total_norm(weights.values(), math.inf).item()):
        return None
    for name, weight in weights.items():
        count = weight.numel() - int(weight.isfinite().sum())
        if count:
            return f'"{name}" ({count} of {weight.numel()} values)'
    return None


def first_in_forward(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """Where a NaN or an infinity first comes up in ``run``, in words that follow "first seen"; None where it does not.

    That is the first module, in the order of execution, whose output is not finite while its inputs are.

    Args:
        model: what ``run`` calls, or what is inside of it.
        run: forward passes without gradient.
    """
    names = _names(model)
    found: list[str] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if found or _finite(output):
            return
        given = [args, {name: value for name, value in kwargs.items() if "mask" not in name}]
        if not _finite(given):
            outer = names[id(module)].rpartition(".")[0]
            found.append(f"in front of {_label(names, module)}" + (f", within {outer}" if outer else ""))
        elif (head := _head(module)) is not None:
            # Whose weight the log-probabilities are taken with, without a call of the module.
            found.append(f"in the head, {_label(names, head)}")
        else:
            found.append(f"in the output of {_label(names, module)}")

    handles = [module.register_forward_hook(look, with_kwargs=True) for module in model.modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@dataclass
class _Call:
    """One call of a module: whether the gradients that came to its output were all finite, None before any came."""

    name: str
    module: nn.Module
    finite: bool | None = None


def first_in_backward(model: nn.Module, run: Callable[[], Tensor]) -> str | None:
    """Where the backward pass of ``run`` first makes a NaN or an infinity; None where it does not.

    That is the module nearest to the loss which is given a finite gradient, and whose inputs or weights are not.

    Args:
        model: what ``run`` calls, or what is inside of it. Its gradients are those of ``run`` afterwards.
        run: the loss, with its graph.
    """
    found: list[str] = []
    with _listening(model, found):
        model.zero_grad()
        run().backward()
    return found[0] if found else None


@contextmanager
def _listening(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Hooks on the tensors between modules; what they find comes into ``found``, the place itself first."""
    names = _names(model)
    calls: dict[int, list[_Call]] = {}
    first: list[Tensor] = []  # the first gradient that is not finite; all hooks of a tensor are given one object

    def at_output(call: _Call, gradient: Tensor) -> None:
        call.finite = _finite(gradient) and call.finite is not False
        if not call.finite and not first:
            first.append(gradient)
            found.append(f"behind {call.name}, in what its output goes into")
        if first and gradient is first[0] and found[0].startswith("behind"):
            place = _behind(names, call, [other for same in calls.values() for other in same])
            found[:] = [place or found[0]]

    def at_input(call: _Call, gradient: Tensor) -> None:
        if not first and not _finite(gradient):
            first.append(gradient)
        if first and gradient is first[0] and call.finite:
            _nearest(found, call.name)

    def at_weight(name: str, owner: int, gradient: Tensor) -> None:
        if not first and not _finite(gradient):
            first.append(gradient)
            used = any(call.finite for call in calls.get(owner, ()))
            # A head's weight is used without a call of its module.
            found.append(f"in {calls[owner][0].name}" if used else f"in the gradient of {name}")

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call = _Call(_label(names, module), module)
        calls.setdefault(id(module), []).append(call)
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: at_output(call, gradient))
        for tensor in _tensors([args, kwargs]):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: at_input(call, gradient))

    handles: list[Any] = [module.register_forward_hook(look, with_kwargs=True) for module in model.modules()]
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad:
                listener = _of_weight(at_weight, name, id(module))
                handles.append(parameter.register_hook(listener))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _behind(names: dict[int, str], call: _Call, calls: list[_Call]) -> str | None:
    """What follows a module and is none: its outer module's own work, a head's weight, and the loss."""
    if _head(call.module) is not None:
        return "in the loss, behind the log-probabilities"
    for owner in calls:
        head = _head(owner.module)
        if head is not None and owner.finite and owner.module.base_model is call.module:
            return f"in the head, {_label(names, head)}"
    own = names[id(call.module)]
    outer = [c for c in calls if c.finite and own.startswith(names[id(c.module)] + ".")]
    return f"in {max(outer, key=_depth).name}, behind {call.name}" if outer else None


def _depth(call: _Call) -> int:
    return call.name.partition(" ")[0].count(".")


def _head(module: nn.Module) -> nn.Module | None:
    return module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None


def _of_weight(listener: Callable[[str, int, Tensor], None], name: str, owner: int) -> Callable[[Tensor], None]:
    return lambda gradient: listener(name, owner, gradient)


def _nearest(found: list[str], name: str) -> None:
    """Of the modules that were given the same input, the innermost; it comes before any place behind a module."""
    depth = name.partition(" ")[0].count(".")
    if not found or found[0].startswith("behind") or depth > found[0].split()[1].count("."):
        found[:] = [f"in {name}"]


def _names(model: nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


def _label(names: dict[int, str], module: nn.Module) -> str:
    return f"{names.get(id(module)) or 'the model'} ({type(module).__name__})"


def _finite(value: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of floating-point numbers in nested containers."""
    if isinstance(value, Tensor):
        if value.dtype in _FLOATS:
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
