"""The hooks of a model: what makes gradients reach every adapter under checkpointing, whatever a forward returns.

With reentrant checkpointing over a frozen model nothing requires a gradient until something makes it. The mark must sit
in front of the first checkpointed block of each trained stack: on the output of what embeds its tokens, patches or
sounds, or on the stack's own input. A mark on logits creates no adapter gradient.
"""

import weakref
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from .ledger import Patch

HOOK = "requires_grad_post_hook"
ORIGINAL = "_vlm_grpo_original"  # on what was wrapped: the function as it was
_NAMED = ("loss", "logits", "log_probs", "last_hidden_state")
_UNDO: list[Callable[[], None]] = []


def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    """Unsloth's function, after which every hook that it set is lenient, and every trained stack is hooked."""

    @wraps(original)
    def requires_grad_for_gradient_checkpointing(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model, *args, **kwargs)
        hook_model(model)
        return result

    setattr(requires_grad_for_gradient_checkpointing, ORIGINAL, original)
    return requires_grad_for_gradient_checkpointing


def hook_model(model: Any) -> int:
    """Mend Unsloth's hooks on a model, and hook what feeds each trained stack; how many hooks were set or mended."""
    before = len(_UNDO)
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__qualname__", "").endswith(HOOK) and not hasattr(hook, ORIGINAL):
                module._forward_hooks[key] = lenient(hook)
                _UNDO.append(_puts_back(module, key, hook))
    for source, at_entry in _sources(model):
        hooks = source._forward_pre_hooks if at_entry else source._forward_hooks
        if not any(hasattr(hook, ORIGINAL) for hook in hooks.values()):
            hook = source.register_forward_pre_hook(_entry(), with_kwargs=True) if at_entry else None
            _UNDO.append((hook or source.register_forward_hook(lenient(None))).remove)
    return len(_UNDO) - before


def unhook_models() -> None:
    """Take every hook back, and leave Unsloth's as they were. A handle holds its module weakly."""
    while _UNDO:
        _UNDO.pop()()


def _puts_back(module: nn.Module, key: int, hook: Callable[..., Any]) -> Callable[[], None]:
    holder = weakref.ref(module)

    def put_back() -> None:
        owner = holder()
        if owner is not None and key in owner._forward_hooks:
            owner._forward_hooks[key] = hook

    return put_back


def lenient(hook: Callable[..., Any] | None) -> Callable[..., Any]:
    """``hook`` for outputs it does not know as well. Its qualified name stays: Unsloth removes its hooks by it."""

    def requires_grad_post_hook(module: Any, inputs: Any, output: Any) -> Any:
        tensor = differentiable(output)
        if tensor is None:
            return hook(module, inputs, output) if hook is not None else None
        _mark(tensor)
        return None

    requires_grad_post_hook.__qualname__ = getattr(hook, "__qualname__", HOOK)
    setattr(requires_grad_post_hook, ORIGINAL, hook)
    return requires_grad_post_hook


def _entry() -> Callable[..., None]:
    def requires_grad_pre_hook(module: Any, args: Any, kwargs: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if _is_float(value)]
        if tensors and not any(tensor.requires_grad for tensor in tensors):
            named = [kwargs[name] for name in ("inputs_embeds", "hidden_states") if _is_float(kwargs.get(name))]
            _mark((named or tensors)[0])

    setattr(requires_grad_pre_hook, ORIGINAL, None)
    return requires_grad_pre_hook


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _mark(tensor: Tensor) -> None:
    if torch.is_grad_enabled() and not tensor.requires_grad:
        tensor.requires_grad_(True)


def differentiable(output: Any) -> Tensor | None:
    """What a loss would be made from: loss, logits, log-probabilities, last hidden state, then any other float."""
    if _is_float(output):
        return output
    by_name = output.get if isinstance(output, dict) else lambda name: getattr(output, name, None)
    named = [by_name(name) for name in _NAMED]
    rest = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return next((value for value in [*named, *rest] if _is_float(value)), None)


def _sources(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """``(module, whether its input is to be marked rather than its output)`` in front of each trained stack.

    A module that holds trained parameters marks its output by itself: adapters on a patch embedding need nothing.
    """
    for owner, before in _stacks(model):
        embedding = _embedding(owner)
        frozen = [part for part in [*before, embedding] if part is not None and _has(part, False)]
        for part in frozen:
            if not _has(part, True):
                yield part, False
        if embedding is None:  # what stands before the blocks need not be on the way to them
            yield owner, True


def _stacks(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """The owner of each outermost list of blocks that is trained, and its parts in front of the list."""
    before: list[nn.Module] = []
    for part in module.children():
        blocks = isinstance(part, nn.ModuleList) or (  # a projector is a sequence of other layers
            isinstance(part, nn.Sequential) and len({type(block) for block in part}) == 1
        )
        if blocks:
            if _has(part, True):
                yield module, before
                before = []
        else:
            yield from _stacks(part)
        before = [*before, part]


def _embedding(owner: Any) -> nn.Module | None:
    getter = getattr(owner, "get_input_embeddings", None)
    try:
        found = getter() if getter is not None else None
    except (NotImplementedError, AttributeError, RuntimeError):  # a tower without one
        return None
    return found if isinstance(found, nn.Module) and found is not owner else None


def _has(module: nn.Module, trained: bool) -> bool:
    return any(parameter.requires_grad == trained for parameter in module.parameters())


PATCHES: list[Patch] = []  # its record is in unsloth.py
