"""Adapters of a 4- or 8-bit model keep the number type they have."""

from typing import Any

import torch
from torch import Tensor


def is_quantized(model: Any) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def trainable_data(model: Any) -> dict[str, Tensor]:
    """The adapter weights of a 4- or 8-bit model, which TRL is about to round to bf16."""
    if not is_quantized(model):
        return {}
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


def undo_bf16_adapters(model: Any, data: dict[str, Tensor]) -> None:
    """Back to what they were: bf16 has 8 bits, which lose a usual learning rate's updates, and CPUs lack it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = data[name] if name in data else parameter.data.float()
