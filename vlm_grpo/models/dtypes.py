"""Fully trained modules in float32 within a model of half precision, and which dtype a family can be loaded in.

Half precision would round an optimizer's updates away. A module in float32 cannot take half-precision inputs by itself,
so two hooks cast what goes in and what comes out: generation and evaluation then need no autocast, and under one, as in
training, they change nothing.
"""

import copy
import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ..errors import ConfigError
from .families import Family

_LOG = logging.getLogger("vlm_grpo")
_HALF = (torch.float16, torch.bfloat16)


def resolve_dtype(dtype: str) -> torch.dtype:
    """The dtype of the weights; ``"auto"`` is bfloat16 where the GPU computes it natively, float16 on other GPUs."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def family_dtype(family: Family, dtype: str) -> torch.dtype:
    """``resolve_dtype``, but never float16 for a family that overflows in it: bfloat16 then, as Unsloth loads it.

    Raises:
        ConfigError: float16 was asked for by name. What comes out then is NaN, which serves no purpose.
    """
    resolved = resolve_dtype(dtype)
    if resolved is not torch.float16 or not family.float16_overflows:
        return resolved
    if dtype != "auto":
        raise ConfigError(
            f'dtype="float16": model type {family.model_type!r} exceeds what float16 holds and would give NaN. Leave '
            "dtype out, or give bfloat16 or float32."
        )
    say_overflow(family)
    return torch.bfloat16


def say_overflow(family: Family) -> None:
    """One line for a family whose weights are not in float16 where others' would be."""
    _LOG.warning(
        "Model type %r overflows in float16, and this GPU has no bfloat16 of its own: the weights are bfloat16, which "
        "it emulates, slowly.",
        family.model_type,
    )


def keep_float32(module: nn.Module, outside: torch.dtype | None = None) -> None:
    """Turn a module to float32. Beside half precision it still takes that, and returns it.

    Args:
        module: the one to train.
        outside: the dtype of the model around it; by default the module's own until now.
    """
    outside = outside or floating_dtype(module)
    module.float()
    if outside in _HALF:
        # No closure over the module: a copy of the model takes its hooks along.
        module.register_forward_pre_hook(_widen, with_kwargs=True)
        module.register_forward_hook(partial(_narrow, outside))


def floating_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's first weight that has one of its own; float32 without."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _widen(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return _cast(args, _HALF, torch.float32), _cast(kwargs, _HALF, torch.float32)


def _narrow(outside: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return _cast(output, (torch.float32,), outside)


def _cast(value: Any, found: tuple[torch.dtype, ...], wanted: torch.dtype) -> Any:
    """``value`` with its tensors of the dtypes ``found`` as ``wanted``, within tuples, lists, dicts and outputs."""
    if isinstance(value, Tensor):
        return value.to(wanted) if value.dtype in found else value
    if isinstance(value, ModelOutput):
        out = copy.copy(value)
        for name, inner in vars(value).items():  # some encoders write on theirs what it has no field for
            setattr(out, name, _cast(inner, found, wanted))
        return out
    if isinstance(value, dict):
        return {name: _cast(inner, found, wanted) for name, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(inner, found, wanted) for inner in value)
    return value


def in_one_dtype(model: Any, dtype: torch.dtype) -> None:
    """Give the weights of a checkpoint that is 4-bit already, and what its layers compute in, one number type.

    transformers leaves a part of them in the one that they were saved in, and their products then fail.
    """
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
