"""Why a run or a batch does its work once per completion after all."""

from typing import Any

from torch import nn


class Unshareable(Exception):
    """Sharing would not be exact here. The message is the reason, a clause that follows "because"."""


def reason_against(model: Any, aux_loss: bool) -> str | None:
    """What about the model as it is trained makes shared and repeated work differ, or None.

    Args:
        model: the plain model, adapters included.
        aux_loss: whether the router's load-balancing loss is part of the loss.
    """
    if aux_loss:
        return "the router's auxiliary loss counts the prompt's tokens once per completion"
    for name, module in model.named_modules():
        dropout = (
            module.p if isinstance(module, nn.modules.dropout._DropoutNd) else _chance(module, "attention_dropout")
        )
        if dropout > 0:
            return f"{name} has dropout {dropout}, drawn anew for every completion (set disable_dropout)"
        if (chance := _chance(module, "layerdrop")) > 0:
            return f"{name} drops layers with a chance of {chance}, drawn anew for every completion"
    return None


def _chance(module: Any, name: str) -> float:
    """Of a module that draws within its forward, where no layer of its own would show it."""
    value = getattr(module, name, 0.0)
    return float(value) if isinstance(value, (int, float)) else 0.0
