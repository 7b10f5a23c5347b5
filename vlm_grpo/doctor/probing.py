"""The questions of ``asking.ask``, answered in its process: one line of JSON before and after each.

The order is a run's own: the backend is chosen before anything imports transformers, as Unsloth asks.
"""

import importlib
import json
import os
from collections.abc import Callable
from typing import Any

from .packages import module_of

_GIB = 2**30


def main(packages: list[str]) -> None:
    """Answer every question on the standard output, which no library can write to meanwhile."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def put(question: str, function: Callable[..., Any], *arguments: Any) -> None:
        print(json.dumps({"asked": question}), file=answers, flush=True)
        try:
            answer = {"value": function(*arguments)}
        except Exception as error:  # a broken installation may raise anything, and what it raises is the answer
            answer = {"failure": reason_of(error)}
        print(json.dumps({"question": question, **answer}), file=answers, flush=True)

    put("backend", backend)
    put("torch", torch)
    for name in packages:
        if not name.startswith("unsloth") or _unsloth_may_be_imported():
            put(f"import {name}", imported, name)
    put("precision", precision)
    put("trainer", trainer)
    put("patches", patches)


def reason_of(error: BaseException) -> str:
    """The first line of what was raised first: transformers' lazy imports hide it behind their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = str(error).strip().partition("\n")[0].strip()
    kind = type(error).__name__
    return f"{kind}: {line[:300]}" if line else kind


def backend() -> dict[str, str]:
    """What ``load_model(backend="auto")`` takes for a model with adapters. Imports Unsloth where it would."""
    from ..models import _choose

    name, reason = _choose("auto", True)
    return {"name": name, "reason": reason}


def torch() -> dict[str, Any]:
    """torch's build and its GPUs."""
    import torch

    available = torch.cuda.is_available()
    build = torch.version.cuda or getattr(torch.version, "hip", None) or ""
    gpus = [_gpu(torch, number) for number in range(torch.cuda.device_count())] if available else []
    return {"version": str(torch.__version__), "cuda": build, "available": available, "gpus": gpus}


def _gpu(torch: Any, number: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(number)
    gpu = {
        "name": properties.name,
        "total_gib": properties.total_memory / _GIB,
        "free_gib": 0.0,
        "capability": [properties.major, properties.minor],
        "native_bf16": False,
        "failure": "",
    }
    try:
        with torch.cuda.device(number):
            gpu["native_bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
            gpu["free_gib"] = torch.cuda.mem_get_info(number)[0] / _GIB
            assert (torch.ones(2, device="cuda") + 1).sum().item() == 4, "it adds wrongly"
    except Exception as error:  # a build without kernels for it, a card in use by one process only, a card at its end
        gpu["failure"] = reason_of(error)
    return gpu


def imported(name: str) -> str | None:
    """The version that the module of a distribution gives itself, "unknown" without one, None without a module."""
    module = module_of(name)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return None
        raise
    if getattr(found, "__file__", None) is None:
        return None  # a folder of that name, such as a clone in the current one
    return str(getattr(found, "__version__", "unknown"))


def _unsloth_may_be_imported() -> bool:
    from ..patches.unsloth import why_not_unsloth

    try:
        return not why_not_unsloth()
    except Exception:  # torch itself is broken, which is an answer of its own
        return False


def precision() -> dict[str, Any]:
    """What a run computes in here."""
    from torch.utils._triton import has_triton
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.utils.import_utils import is_flash_attn_2_available

    from ..models.families import FAMILIES
    from ..models.hf import resolve_dtype
    from ..trainer_config import native_precision

    class Open(PreTrainedModel):
        config_class = PreTrainedConfig
        _supports_sdpa = True

    return {
        "weights": str(resolve_dtype("auto")).removeprefix("torch."),
        "training": native_precision(),
        "attention": Open(PreTrainedConfig()).config._attn_implementation,
        "flash_attention": bool(is_flash_attn_2_available()),
        "flex_attention": bool(has_triton()),
        "overflowing": [name for name, family in FAMILIES.items() if family.float16_overflows],
    }


def trainer() -> None:
    """Importing what trains, which is where a library of the wrong version is noticed."""
    importlib.import_module("vlm_grpo.run")


def patches() -> list[dict[str, str]]:
    """Every record of the ledger, and how its library stands now."""
    from ..patches import ledger

    return [{"name": p.name, "file": file, "why": p.why, "state": _state(p)} for file, p in ledger.patches()]


def _state(patch: Any) -> str:
    try:
        return patch.state()
    except Exception as error:  # a place that is gone upstream: the record's own sentence says what to do
        return f"cannot be probed ({reason_of(error)})"
