"""Unsloth: gradients for every adapter, whatever a forward returns.

With reentrant gradient checkpointing over a frozen model, nothing requires a gradient until something makes it:
Unsloth hooks one module's output for that. Its hook knows a loss, logits and a last hidden state (older ones less) and
raises on anything else; older ones hook only the tower of the first adapter, so the others silently stay untrained.
What is set on a model instead is in ``unsloth_hooks.py``, and what decides in ``unsloth_probe.py``.
"""

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from vlm_grpo.errors import UnsupportedError

from .ledger import Patch
from .unsloth_hooks import ORIGINAL, hook_model, unhook_models, wrap

# What importing Unsloth raises where it does not work; NotImplementedError (no GPU) is a RuntimeError.
IMPORT_FAILURES = (ImportError, RuntimeError, OSError, AttributeError)

_ZOO = "unsloth_zoo.peft_utils"
_TARGET = "requires_grad_for_gradient_checkpointing"
_LIBRARIES = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft")
_LOCK = threading.RLock()


@dataclass(frozen=True)
class PatchReport:
    """What ``apply_unsloth_patch`` found and did. Its text has one line for each of these.

    Attributes:
        applied: whether the patch is in place now.
        needed: whether the installed Unsloth showed a fault.
        reason: one clause, why it was applied or why not.
        probed: what was tried on Unsloth's own function, and ``fine``, ``fails``, or how many adapters of how many.
        patched: module attributes that were rebound.
        hooks: hooks set or mended on the model that was given.
        versions: installed versions; None where not installed.
    """

    applied: bool
    needed: bool
    reason: str
    probed: dict[str, str] = field(default_factory=dict)
    patched: tuple[str, ...] = ()
    hooks: int = 0
    versions: dict[str, str | None] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"Unsloth patch: {'applied' if self.applied else 'not applied'}, because {self.reason}."]
        if self.probed:
            lines.append("  tried: " + ", ".join(f"{what}: {result}" for what, result in self.probed.items()))
        if self.patched:
            lines.append("  rebound: " + ", ".join(self.patched))
        if self.hooks:
            lines.append(f"  hooks set or mended on the model: {self.hooks}")
        installed = [f"{name} {number}" for name, number in self.versions.items() if number]
        return "\n".join([*lines, f"  installed: {', '.join(installed)}"] if installed else lines)


_probed: dict[Callable[..., Any], dict[str, str]] = {}  # of each function of Unsloth, what it does


def apply_unsloth_patch(model: Any = None) -> PatchReport:
    """Let every adapter of an Unsloth model get its gradient; ``load_model`` calls it before it adds adapters.

    Explicit, decided by trying the installed function on toy models, idempotent, thread-safe and undoable. Without a
    working Unsloth nothing is imported or changed, and the report says why.

    Args:
        model: one whose adapters were added before; where the patch is needed it is hooked now. Others keep Unsloth's
            own hooks.

    Returns:
        the report; print it.

    Raises:
        UnsupportedError: an Unsloth that no longer has the function to wrap.
    """
    with _LOCK:
        reason = _import()
        if reason:
            return PatchReport(False, False, reason, versions=_versions())
        target = _target()
        in_place = hasattr(target, ORIGINAL)
        probed = _probe(getattr(target, ORIGINAL, target))
        if in_place:  # rebind modules that were imported since
            reason = "it is already in place"
        elif found := _faults(probed):
            reason = "without it " + " and ".join(found)
        else:
            return PatchReport(False, False, "every adapter gets its gradient without it", probed, versions=_versions())
        patched = _rebind()
        return PatchReport(True, True, reason, probed, patched, hook_model(model) if model else 0, _versions())


def undo_unsloth_patch() -> None:
    """Put Unsloth's own functions back, and its own hooks on the models that were hooked meanwhile."""
    with _LOCK:
        for module in _holders(lambda held: hasattr(held, ORIGINAL)):
            setattr(module, _TARGET, getattr(vars(module)[_TARGET], ORIGINAL))
        unhook_models()


@contextmanager
def unsloth_patch(model: Any = None) -> Iterator[PatchReport]:
    """``apply_unsloth_patch(model)``, undone at the end unless it was in place before.

    Raises:
        UnsupportedError: as ``apply_unsloth_patch``.
    """
    with _LOCK:
        before = _in_place()
        report = apply_unsloth_patch(model)
    try:
        yield report
    finally:
        if not before:
            undo_unsloth_patch()


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
    for name in _LIBRARIES:
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


def _in_place() -> bool:
    return hasattr(getattr(sys.modules.get(_ZOO), _TARGET, None), ORIGINAL)


def _holders(wanted: Callable[[Any], bool]) -> list[ModuleType]:
    """Loaded modules of Unsloth that hold the function under its own name: each imported a reference."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("unsloth") and module]
    return [module for module in modules if _TARGET in vars(module) and wanted(vars(module)[_TARGET])]


def _rebind() -> tuple[str, ...]:
    target = _target()
    original = getattr(target, ORIGINAL, target)
    wrapped = target if hasattr(target, ORIGINAL) else wrap(original)
    for module in _holders(lambda held: held is original):
        setattr(module, _TARGET, wrapped)
    return tuple(sorted(f"{module.__name__}.{_TARGET}" for module in _holders(lambda held: held is wrapped)))


def _probe(function: Callable[..., Any]) -> dict[str, str]:
    from .unsloth_probe import probe  # its models' outputs are transformers', which comes after Unsloth

    if function not in _probed:
        _probed[function] = probe(function)
    return _probed[function]


def _faults(probed: dict[str, str]) -> list[str]:
    from .unsloth_probe import faults

    return faults(probed)


def _shows_fault() -> bool | None:
    """Toy towers hooked by Unsloth's function: an output kind it does not know, or an adapter without a gradient."""
    if _import():
        return None
    target = getattr(sys.modules[_ZOO], _TARGET, None)
    return target is None or bool(_faults(_probe(target)))  # gone: ``apply`` says so


ADAPTER_GRADIENTS = Patch(
    name="unsloth-adapter-gradients",
    why="Unsloth's requires-grad hook fails on a forward without a loss (logits only up to zoo 2025.6.2; log-probs, a "
    "tuple or a dict still), and up to zoo 2026.4 only the first adapter's tower is hooked: the others silently stay "
    "untrained.",
    reference="unsloth_zoo.peft_utils.requires_grad_for_gradient_checkpointing",
    remove_when="the oldest supported Unsloth handles every output and hooks every trained tower.",
    probe=_shows_fault,
    in_place=_in_place,
    apply=apply_unsloth_patch,
    undo=undo_unsloth_patch,
)
PATCHES = [ADAPTER_GRADIENTS]
