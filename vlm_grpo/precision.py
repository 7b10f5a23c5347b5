"""What float16 needs: a model that does not overflow in it, and trained weights in float32."""

import logging
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from .errors import ConfigError
from .models.families import family_of
from .models.wrappers import is_peft_model

_LOG = logging.getLogger("vlm_grpo")


def leave_float16(args: Any, model: Any) -> None:
    """Train without float16 a model of a family that overflows in it, with one line that says so.

    Also where ``fp16=True`` was asked for: Unsloth does the same to such a model, so a run means the same on both
    backends, and its NaN would come only after the first rollout.

    Args:
        args: finished training arguments, from which no ``Accelerator`` has been made yet.
        model: the model, or its name or path.
    """
    if not args.fp16:
        return
    config: PretrainedConfig = AutoConfig.from_pretrained(model) if isinstance(model, str) else model.config
    family = family_of(config)
    if not family.float16_overflows:
        return
    why = "this GPU has no native bf16" if getattr(args, "fp16_by_machine", False) else "fp16=True is not followed"
    _LOG.warning("Training in float32 without mixed precision: %s overflows in float16 (%s).", family.model_type, why)
    args.fp16, args.mixed_precision = False, "no"


def float32_adapters(args: Any, model: Any) -> None:
    """Under fp16, trained adapter weights become float32: a loss scale cannot be taken out of 16-bit gradients.

    Raises:
        ConfigError: 16-bit weights of the model itself are trained; in float32 they take twice the memory.
    """
    if not args.fp16:
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            if not is_peft_model(model):
                number = str(parameter.dtype).removeprefix("torch.")
                raise ConfigError(
                    f'fp16 needs trained weights in float32, and "{name}" is {number}. Load the model with '
                    'dtype="float32", or train adapters (LoRA).'
                )
            parameter.data = parameter.data.float()  # the same parameter, which an optimizer may hold
