"""Unsloth: gradients for every adapter, whatever a forward returns.

With reentrant gradient checkpointing over a frozen model, nothing requires a gradient until something makes it:
Unsloth hooks one module's output for that. Its hook knows a loss, logits and a last hidden state (older ones less) and
raises on anything else; older ones hook only the tower of the first adapter, so the others silently stay untrained. And
marking logits alone never creates an adapter gradient: the mark must sit in front of the first checkpointed block, on
the output of each tower's embedding.
"""

import importlib
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from vlm_grpo.errors import UnsupportedError

from .ledger import Patch
from .transformers import answered_by

# What importing Unsloth raises where it does not work; NotImplementedError (no GPU) is a RuntimeError.
IMPORT_FAILURES = (ImportError, RuntimeError, OSError, AttributeError)

_ZOO = "unsloth_zoo.peft_utils"
_TARGET = "requires_grad_for_gradient_checkpointing"
_HOOK = "requires_grad_post_hook"
_ORIGINAL = "_vlm_grpo_original"  # on what we wrapped: the function as it was
_LOCK = threading.RLock()


@dataclass(frozen=True)
class PatchReport:
    """What ``apply_unsloth_patch`` found and did.

    Attributes:
        applied: whether the patch is in place now.
        needed: whether the installed Unsloth showed the fault.
        reason: one clause, why it was applied or why not.
        versions: installed versions of ``unsloth`` and ``unsloth_zoo``; None where not installed.
        patched: module attributes that were rebound.
    """

    applied: bool
    needed: bool
    reason: str
    versions: dict[str, str | None] = field(default_factory=dict)
    patched: tuple[str, ...] = ()

    def __str__(self) -> str:
        installed = ", ".join(f"{name} {number}" for name, number in self.versions.items() if number)
        what = f"applied to {' and '.join(self.patched)}" if self.applied else "not applied"
        return f"Unsloth patch: {what}, because {self.reason}{f' ({installed})' if installed else ''}."


def apply_unsloth_patch() -> PatchReport:
    """Let every adapter of an Unsloth model get its gradient; call it before the adapters are added.

    Explicit, decided by trying the installed functions on toy models, idempotent and undoable. Without a working
    Unsloth nothing is imported or changed and the report says why. Models whose adapters were added before keep
    Unsloth's own hooks.

    Returns:
        the report; printing it gives one line.

    Raises:
        UnsupportedError: an Unsloth that no longer has the function to wrap.
    """
    with _LOCK:
        reason = _import()
        if reason:
            return PatchReport(False, False, reason, _versions())
        if hasattr(_target(), _ORIGINAL):  # rebind modules that were imported since
            return PatchReport(True, True, "it is already in place", _versions(), _rebind())
        faults = _faults(_target())
        if not faults:
            return PatchReport(False, False, "every adapter gets its gradient without it", _versions())
        return PatchReport(True, True, "without it " + " and ".join(faults), _versions(), _rebind())


def undo_unsloth_patch() -> None:
    """Put Unsloth's own functions back. Hooks that models got meanwhile stay with them, and do no harm."""
    with _LOCK:
        for module in _holders(lambda held: hasattr(held, _ORIGINAL)):
            setattr(module, _TARGET, getattr(vars(module)[_TARGET], _ORIGINAL))


@contextmanager
def own_generate(model: Any, autocast: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Within it, ``model.generate`` is transformers' own, where Unsloth has put one that makes caches of its own.

    Args:
        model: the plain model, adapters included.
        autocast: the precision to compute in, which Unsloth's would have chosen.
    """
    original = getattr(model, "_old_generate", None)
    if original is None:
        yield
        return
    with answered_by(model, "generate", original), autocast():
        yield


def why_not_unsloth() -> str:
    """Why Unsloth cannot be imported here, as a clause, or an empty string. Imports nothing but torch."""
    if importlib.util.find_spec("unsloth") is None or importlib.util.find_spec("unsloth_zoo") is None:
        return "Unsloth is not installed"
    import torch

    # Its import on a machine without a GPU fails halfway and leaves changed libraries and environment variables behind.
    if not torch.cuda.is_available() and os.environ.get("UNSLOTH_ALLOW_CPU") != "1":
        return "there is no CUDA device, which Unsloth needs"
    return ""


def _import() -> str:
    """Make sure Unsloth's function is loaded; why that is impossible, or an empty string."""
    if _ZOO in sys.modules:
        return ""
    reason = why_not_unsloth()
    if reason:
        return reason
    try:
        importlib.import_module("unsloth")  # first, or unsloth_zoo refuses
        importlib.import_module(_ZOO)
    except IMPORT_FAILURES as error:
        return f"Unsloth cannot be imported here ({str(error).strip().partition(chr(10))[0]})"
    return ""


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("unsloth", "unsloth_zoo"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _target() -> Callable[..., Any]:
    target = getattr(sys.modules[_ZOO], _TARGET, None)
    if target is None:
        raise UnsupportedError(
            f"{_ZOO} has no {_TARGET} any more (unsloth_zoo {_versions()['unsloth_zoo']}), so adapter gradients cannot "
            'be guaranteed. Install an Unsloth of the tested window, or load with backend="hf".'
        )
    return target


def _holders(wanted: Callable[[Any], bool]) -> list[ModuleType]:
    """Loaded modules of Unsloth that hold the function under its own name: each imported a reference."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("unsloth") and module]
    return [module for module in modules if _TARGET in vars(module) and wanted(vars(module)[_TARGET])]


def _rebind() -> tuple[str, ...]:
    target = _target()
    original = getattr(target, _ORIGINAL, target)
    wrapped = target if hasattr(target, _ORIGINAL) else _wrap(original)
    for module in _holders(lambda held: held is original):
        setattr(module, _TARGET, wrapped)
    return tuple(sorted(f"{module.__name__}.{_TARGET}" for module in _holders(lambda held: held is wrapped)))


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def requires_grad_for_gradient_checkpointing(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model, *args, **kwargs)
        for module in model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__qualname__", "").endswith(_HOOK) and not hasattr(hook, _ORIGINAL):
                    module._forward_hooks[key] = _lenient(hook)
        _hook_embeddings(model)
        return result

    setattr(requires_grad_for_gradient_checkpointing, _ORIGINAL, original)
    return requires_grad_for_gradient_checkpointing


def _lenient(hook: Callable[..., Any] | None) -> Callable[..., Any]:
    """``hook`` for outputs it does not know as well. Its qualified name stays: Unsloth removes its hooks by it."""

    def requires_grad_post_hook(module: Any, inputs: Any, output: Any) -> Any:
        import torch

        tensor = _differentiable(output)
        if tensor is None:
            return hook(module, inputs, output) if hook is not None else None
        if torch.is_grad_enabled() and not tensor.requires_grad:
            tensor.requires_grad_(True)
        return None

    requires_grad_post_hook.__qualname__ = getattr(hook, "__qualname__", _HOOK)
    setattr(requires_grad_post_hook, _ORIGINAL, hook)
    return requires_grad_post_hook


def _differentiable(output: Any) -> Any:
    """The tensor of a forward's output that a loss would be made from, or None."""
    import torch

    def usable(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.is_floating_point()

    if usable(output):
        return output
    named = [getattr(output, name, None) for name in ("loss", "logits", "last_hidden_state")]
    listed = (
        list(output.values()) if isinstance(output, dict) else list(output) if isinstance(output, tuple | list) else []
    )
    return next((value for value in [*named, *listed] if usable(value)), None)


def _hook_embeddings(model: Any) -> None:
    """Mark the output of each trained tower's frozen embedding: what reentrant checkpointing needs as its input."""
    for tower in model.modules():
        getter = getattr(tower, "get_input_embeddings", None)
        if getter is None or not any(parameter.requires_grad for parameter in tower.parameters()):
            continue
        try:
            embedding = getter()
        except (NotImplementedError, AttributeError):  # a tower without one takes its input from another tower
            continue
        if embedding is None or any(parameter.requires_grad for parameter in embedding.parameters()):
            continue
        if not any(hasattr(hook, _ORIGINAL) for hook in embedding._forward_hooks.values()):
            embedding.register_forward_hook(_lenient(None))


# ---- the probe: what does the installed function do to toy models? ---------------------------------------------------


def _faults(function: Callable[..., Any]) -> list[str]:
    """Clauses naming what goes wrong with ``function`` as it is; none means that the patch is not needed."""
    unknown = [name for name, output in _outputs() if not _handles(function, output)]
    faults = [f"a forward that returns {' or '.join(unknown)} fails"] if unknown else []
    trained, adapters = _trained_adapters(function)
    if trained < adapters:
        faults.append(f"{trained} of {adapters} adapters under checkpointing get a gradient")
    return faults


def _outputs() -> list[tuple[str, Any]]:
    import torch
    from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

    def tensor() -> Any:
        return torch.zeros(1, 1, 2)

    return [
        ("logits without a loss", CausalLMOutput(logits=tensor())),
        ("a last hidden state", BaseModelOutput(last_hidden_state=tensor())),
        ("a tuple", (tensor(),)),
        ("a dict", {"logits": tensor()}),
    ]


def _handles(function: Callable[..., Any], output: Any) -> bool:
    """Does a module hooked by ``function`` return ``output`` with a gradient?"""
    import torch
    from torch import nn

    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.zeros(1))])

        def forward(self) -> Any:
            return output

    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.middle = Middle()

        def forward(self) -> Any:
            return self.middle()

    top = Top()
    function(top)
    if not any(module._forward_hooks for module in top.modules()):
        return True  # nothing was hooked, so nothing can fail
    try:
        with torch.enable_grad():
            return bool(_differentiable(top()).requires_grad)
    except (RuntimeError, ValueError, AttributeError, TypeError):  # however this version fails
        return False


def _trained_adapters(function: Callable[..., Any]) -> tuple[int, int]:
    """``(with a gradient, all)`` of the adapters of a frozen two-tower toy under reentrant checkpointing."""
    import torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(2, 2).requires_grad_(False)
            self.adapter = nn.Linear(2, 2)

        def forward(self, hidden: Any) -> Any:
            return self.base(hidden) + self.adapter(hidden)

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(3, 2).requires_grad_(False)
            self.layers = nn.ModuleList([Block(), Block()])

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def forward(self, ids: Any) -> Any:
            hidden = self.embedding(ids)
            for layer in self.layers:
                hidden = checkpoint(layer, hidden, use_reentrant=True)
            return hidden

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = Tower()
            self.language = Tower()

        def forward(self, ids: Any) -> Any:
            return self.vision(ids) + self.language(ids)

    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the missing gradient; here it is the question
        model = Model()
        function(model)
        output = model(torch.tensor([0, 1, 2]))
        if output.requires_grad:
            output.sum().backward()
    adapters = [weight for name, weight in model.named_parameters() if name.endswith("adapter.weight")]
    return sum(weight.grad is not None for weight in adapters), len(adapters)


def _shows_fault() -> bool | None:
    """Toy towers hooked by Unsloth's function: an output kind it does not know, or an adapter without a gradient."""
    return None if _import() else bool(_faults(_target()))


ADAPTER_GRADIENTS = Patch(
    name="unsloth-adapter-gradients",
    why="Unsloth's requires-grad hook fails on a forward without a loss (logits only up to zoo 2025.6.2; a tuple or a "
    "dict still), and up to zoo 2026.4 only the first adapter's tower is hooked: the others silently stay untrained.",
    reference="unsloth_zoo.peft_utils.requires_grad_for_gradient_checkpointing",
    remove_when="the oldest supported Unsloth handles every output and hooks every trained tower.",
    probe=_shows_fault,
    apply=apply_unsloth_patch,
    undo=undo_unsloth_patch,
)
PATCHES = [ADAPTER_GRADIENTS]
