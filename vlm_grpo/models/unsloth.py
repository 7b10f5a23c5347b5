"""``load_model`` through Unsloth: its kernels, its 4-bit uploads and its gradient checkpointing, on a GPU."""

import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, UnsupportedError
from ..patches.unsloth import IMPORT_FAILURES, apply_unsloth_patch, why_not_unsloth
from . import is_adapter
from .families import family_of, lora_targets

if TYPE_CHECKING:
    from ..config import LoraOptions

_LOG = logging.getLogger("vlm_grpo")


def why_not() -> str:
    """Why Unsloth cannot load a model here, as a clause, or an empty string. Imports Unsloth where that can succeed."""
    reason = why_not_unsloth()
    if reason:
        return reason
    try:
        from unsloth import FastVisionModel  # pyright: ignore[reportMissingImports] # noqa: F401
    except IMPORT_FAILURES as error:
        return f"Unsloth cannot be imported here ({str(error).strip().partition(chr(10))[0]})"
    return ""


def load(
    name: str,
    load_in_4bit: bool,
    lora: "LoraOptions | None",
    dtype: str,
    max_seq_length: int | None,
    gradient_checkpointing: bool | str,
) -> tuple[Any, Any]:
    """As ``load_model``, by ``FastVisionModel``, which loads text-only models too. Call ``why_not`` first."""
    from unsloth import FastVisionModel  # pyright: ignore[reportMissingImports]

    from .hf import adapter_base, check_same_adapter, written_base  # transformers comes after Unsloth

    _LOG.info("%s", apply_unsloth_patch())
    adapter = is_adapter(name)
    if adapter and adapter_base(name) != written_base(name):
        raise ConfigError(
            f"{name}: the base model of its adapter, {written_base(name)!r}, is a relative path, which Unsloth cannot "
            f'follow. Write {adapter_base(name)!r} into adapter_config.json, or use backend="hf".'
        )
    options: dict[str, Any] = {"use_gradient_checkpointing": gradient_checkpointing}
    if max_seq_length is not None:
        options["max_seq_length"] = max_seq_length
    model, processor = _read(
        name,
        FastVisionModel.from_pretrained,
        load_in_4bit=load_in_4bit,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        full_finetuning=lora is None and not adapter and not load_in_4bit,
        device_map=_device_map(),
        **options,
    )
    if adapter:
        if lora is not None:
            check_same_adapter(name, model, lora)
        _hook_gradients(model)
    elif lora is not None:
        model = FastVisionModel.get_peft_model(model, **_lora_arguments(model, lora), **options)
    return model, processor


def _read(name: str, function: Any, **options: Any) -> Any:
    try:
        return function(name, **options)
    except torch.OutOfMemoryError:
        raise
    except NotImplementedError as error:
        raise UnsupportedError(f'model: Unsloth cannot load {name!r} here ({error}). Use backend="hf".') from error
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")[:200]
        raise ConfigError(
            f'model: Unsloth cannot load {name!r} ({reason}). Check the name, or try backend="hf".'
        ) from error


def _device_map() -> dict[str, Any]:
    return {"": int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"}


def _lora_arguments(model: Any, lora: "LoraOptions") -> dict[str, Any]:
    targets = lora_targets(family_of(model.config), model, lora)  # checked here, whichever way they are given
    named = bool(lora.targets)
    return {
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        # Named targets stand instead of the switches, which Unsloth would intersect them with.
        "finetune_vision_layers": named or lora.vision,
        "finetune_language_layers": named or lora.language,
        "finetune_attention_modules": named or lora.attention,
        "finetune_mlp_modules": named or lora.mlp,
        "target_modules": targets if named else None,
        # Unsloth seeds every generator with it: keep the caller's seed.
        "random_state": torch.initial_seed() % 2**32,
    }


def _hook_gradients(model: Any) -> None:
    """Unsloth hooks a model when it adds adapters, not when it loads them."""
    from unsloth_zoo.peft_utils import (  # pyright: ignore[reportMissingImports]
        requires_grad_for_gradient_checkpointing,
    )

    requires_grad_for_gradient_checkpointing(model)
