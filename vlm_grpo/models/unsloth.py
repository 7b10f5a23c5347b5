"""``load_model`` through Unsloth: its kernels, its 4-bit uploads and its gradient checkpointing, on a GPU."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch

from ..errors import ConfigError, ExportError, UnsupportedError
from ..options import LoraOptions
from ..parts import Parts
from ..patches.unsloth import IMPORT_FAILURES, apply_unsloth_patch, why_not_unsloth
from . import is_adapter
from .families import family_of

_LOG = logging.getLogger("vlm_grpo")
_FULL_FINETUNING = "UNSLOTH_ENABLE_FULL_FINETUNING"
_SWITCHES = ("vision_layers", "language_layers", "attention_modules", "mlp_modules")


@contextmanager
def _banners_aside() -> Iterator[None]:
    """What Unsloth prints goes to stderr: among a command's answers its banners would be read as one."""
    with redirect_stdout(sys.stderr):
        yield


def why_not() -> str:
    """Why Unsloth cannot load a model here, as a clause, or an empty string. Imports Unsloth where that can succeed."""
    reason = why_not_unsloth()
    if reason:
        return reason
    try:
        with _banners_aside():
            from unsloth import FastVisionModel  # pyright: ignore[reportMissingImports] # noqa: F401
    except IMPORT_FAILURES as error:
        return f"Unsloth cannot be imported here ({str(error).strip().partition(chr(10))[0]})"
    return ""


@_banners_aside()
def load(
    name: str,
    load_in_4bit: bool,
    lora: LoraOptions | None,
    parts: Parts,
    dtype: str,
    max_seq_length: int | None,
    gradient_checkpointing: bool | str,
) -> tuple[Any, Any]:
    """As ``load_model``, by ``FastVisionModel``, which loads text-only models too. Call ``why_not`` first."""
    from unsloth import FastVisionModel  # pyright: ignore[reportMissingImports]

    from .hf import adapter_base, written_base  # transformers comes after Unsloth
    from .parts import check_same_adapter, finish_copies, train_in_place

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
    in_place = not adapter and not parts.apart and not load_in_4bit
    with _full_finetuning_forgotten():
        model, processor = _read(
            name,
            FastVisionModel.from_pretrained,
            load_in_4bit=load_in_4bit,
            dtype=_dtype(name, dtype),
            full_finetuning=in_place,
            device_map=_device_map(),
            **options,
        )
    if adapter:
        finish_copies(model, name)
        if lora is not None or parts.given:
            check_same_adapter(name, model, lora, parts)
        _hook_gradients(model)
    elif in_place and parts.given:
        train_in_place(model, parts)
        _hook_gradients(model)
    elif parts.apart:
        model = FastVisionModel.get_peft_model(
            model, **_adapter_arguments(model, lora or LoraOptions(), parts), **options
        )
        finish_copies(model)
    return model, processor


def _dtype(name: str, dtype: str) -> torch.dtype | None:
    """Unsloth chooses by itself where it may; which families overflow in float16 is said, and refused, as elsewhere."""
    from transformers import AutoConfig

    from .dtypes import family_dtype
    from .hf import adapter_base

    config = _read(adapter_base(name) if is_adapter(name) else name, AutoConfig.from_pretrained)
    resolved = family_dtype(family_of(getattr(config, "thinker_config", config)), dtype)
    return None if dtype == "auto" else resolved


@contextmanager
def _full_finetuning_forgotten() -> Iterator[None]:
    """Unsloth remembers for the whole process how it loaded last, and then adds no adapter to any model."""
    before = os.environ.get(_FULL_FINETUNING)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_FULL_FINETUNING, None)
        else:
            os.environ[_FULL_FINETUNING] = before


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


def _adapter_arguments(model: Any, lora: LoraOptions, parts: Parts) -> dict[str, Any]:
    from .parts import adapter_config

    config = adapter_config(model, lora, parts)
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        # Every switch on, or Unsloth would intersect them with the modules that are named here: those that the other
        # backend takes, and no experts beside them.
        **dict.fromkeys((f"finetune_{kind}" for kind in _SWITCHES), True),
        "target_modules": sorted(found) if isinstance(found := config.target_modules, set) else found,
        "target_parameters": [],
        "modules_to_save": config.modules_to_save,
        # Unsloth seeds every generator with it: keep the caller's seed.
        "random_state": torch.initial_seed() % 2**32,
    }


def _hook_gradients(model: Any) -> None:
    """Unsloth hooks a model when it adds adapters, not when it loads them."""
    from unsloth_zoo.peft_utils import (  # pyright: ignore[reportMissingImports]
        requires_grad_for_gradient_checkpointing,
    )

    requires_grad_for_gradient_checkpointing(model)


# ---- export ----------------------------------------------------------------------------------------------------------


def save_merged(model: Any, processor: Any, folder: str) -> None:
    """Write a model that Unsloth has loaded with its adapter merged, in the 16 bits of its base, and the processor.

    Raises:
        ExportError: Unsloth cannot.
    """
    try:
        model.save_pretrained_merged(folder, processor, save_method="merged_16bit")
    except torch.OutOfMemoryError:
        raise
    except (OSError, ImportError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"Unsloth cannot merge the adapter: {_first_line(error)}.") from error


def save_gguf(merged: str, folder: str, outtype: str) -> None:
    """Convert a saved 16-bit model to GGUF files by Unsloth, which fetches and builds llama.cpp where it has none yet.

    Raises:
        ExportError: Unsloth cannot.
    """
    from unsloth import FastVisionModel  # pyright: ignore[reportMissingImports]

    try:
        with _full_finetuning_forgotten():
            model, processor = FastVisionModel.from_pretrained(merged, load_in_4bit=False, device_map=_device_map())
        model.save_pretrained_gguf(folder, processor, quantization_method=outtype)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ImportError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(
            f"Unsloth cannot write GGUF files ({_first_line(error)}). Install llama.cpp and give --llama-cpp DIR."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")[:200] or type(error).__name__
