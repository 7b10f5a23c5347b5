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
        drawn = (_chance(module, attribute) for attribute in _DROPOUTS)
        dropout = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else max(drawn)
        if dropout > 0:
            return f"{name} has dropout {dropout}, drawn anew for every completion (set disable_dropout)"
        if (chance := _chance(module, "layerdrop")) > 0:
            return f"{name} drops layers with a chance of {chance}, drawn anew for every completion"
    return None


# Of modules that draw within their forward, where no layer of its own would show it; of adapters by their names.
_DROPOUTS = ("attention_dropout", "module_dropout", "rank_dropout")


def _chance(module: Any, name: str) -> float:
    value = getattr(module, name, 0.0)
    values = value.values() if isinstance(value, dict) else [value]
    return max((float(v) for v in values if isinstance(v, (int, float))), default=0.0)
