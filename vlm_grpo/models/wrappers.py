"""What stands around a model: accelerate's and DDP's wrappers, a compiled module, PEFT."""

import sys
from typing import Any

from torch import nn


def unwrapped(model: Any) -> Any:
    """The model without the wrappers of accelerate and DDP: PEFT's, or the plain one."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def is_peft_model(model: Any) -> bool:
    """Whether it is PEFT's, wrapped or not. Asked many times a step: accelerate's own looks through all modules."""
    peft = sys.modules.get("peft")
    if peft is None:  # then nobody has made one
        return False
    own = unwrapped(model)
    compiled = own._modules.get("_orig_mod") if isinstance(own, nn.Module) else None  # PEFT hands on attributes
    return isinstance(own, peft.PeftModel) or isinstance(compiled, peft.PeftModel)


def plain_model(model: Any) -> Any:
    """The model without the wrappers of accelerate, DDP and PEFT; adapters are inside of it."""
    own = unwrapped(model)
    return own.get_base_model() if is_peft_model(own) else own
