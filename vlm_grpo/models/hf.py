"""``load_model`` through transformers, PEFT and (4-bit) bitsandbytes: on any machine, with or without a GPU."""

import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    BitsAndBytesConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from ..errors import ConfigError, UnsupportedError
from ..options import LoraOptions
from ..parts import Parts, parts_of
from ..patches.bitsandbytes import CPU_PACKING
from . import is_adapter, looks_like_path
from .dtypes import family_dtype, in_one_dtype
from .dtypes import resolve_dtype as resolve_dtype
from .families import family_of
from .parts import adapter_config, check_same_adapter, finish_copies, train_in_place

# What files that are missing, torn or of another kind make the libraries raise.
_UNREADABLE = (OSError, ImportError, ValueError, KeyError, SafetensorError)

# Image models first: some text-only classes accept their configs too, and would drop the vision tower.
_AUTO_CLASSES = (
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    (MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM),
    (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
)


def load(
    name: str, load_in_4bit: bool, lora: LoraOptions | None, parts: Parts, dtype: str, gradient_checkpointing: bool
) -> tuple[Any, Any]:
    """As ``load_model``; ``name`` is an absolute folder or a name on the Hub."""
    if is_adapter(name):
        model, processor = _load_adapter(name, load_in_4bit, lora, parts, dtype)
    else:
        model, processor = _load_base(name, load_in_4bit, dtype), _load_processor(name)
        if parts.apart:
            model = _add_adapter(model, lora or LoraOptions(), parts)
        elif parts.given:
            train_in_place(model, parts)
    if gradient_checkpointing:
        # Not reentrant: that kind needs an input that requires a gradient, which a frozen embedding does not give.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, processor


# ---- a whole model ---------------------------------------------------------------------------------------------------


def _load_base(name: str, load_in_4bit: bool, dtype: str) -> Any:
    whole = _read(name, "model", AutoConfig.from_pretrained)
    config = getattr(whole, "thinker_config", whole)  # of a model that also speaks, the part that writes
    auto_class = next((auto for mapping, auto in _AUTO_CLASSES if type(config) in mapping), None)
    if auto_class is None:
        raise ConfigError(
            f"model: {name!r} is of type {config.model_type!r}, which does not generate text. "
            "Give a multimodal or text model."
        )
    weights = family_dtype(family_of(config), dtype)
    options: dict[str, Any] = {"dtype": weights, "device_map": _device_map(load_in_4bit)}
    already = getattr(config, "quantization_config", None) is not None
    if (load_in_4bit or already) and not torch.cuda.is_available():
        CPU_PACKING.ensure()
    if load_in_4bit and not already:
        options["quantization_config"] = _four_bit(config, weights)
    if config is not whole:
        options["config"] = config
    model = _read(name, "model", auto_class.from_pretrained, **options)
    if already:
        in_one_dtype(model, weights)
    return model


def _device_map(load_in_4bit: bool) -> dict[str, Any] | None:
    if torch.cuda.is_available():
        return {"": int(os.environ.get("LOCAL_RANK", "0"))}  # one process a GPU
    return {"": "cpu"} if load_in_4bit else None


def _four_bit(config: Any, compute: torch.dtype) -> BitsAndBytesConfig:
    family = family_of(config)
    kept = [*family.vision, *family.audio, *family.projector, "lm_head"]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=[rf"(?:.*\.)?{re.escape(name)}(?:\.|$)" for name in kept],  # for 4-bit too
    )


def read_processor(name: str) -> Any:
    """The processor of a model or a run folder; a tokenizer, for a text-only model."""
    own = any((Path(name) / file).is_file() for file in ("processor_config.json", "tokenizer_config.json"))
    return _load_processor(adapter_base(name) if is_adapter(name) and not own else name)


def _load_processor(name: str) -> Any:
    processor = _read(name, "processor", AutoProcessor.from_pretrained)
    if hasattr(processor, "tokenizer") and getattr(processor, "chat_template", None) is None:
        # Some processors do not take the template that lies in the folder, but their tokenizers do.
        processor.chat_template = getattr(processor.tokenizer, "chat_template", None)
    return processor


def _read(name: str, what: str, function: Callable[..., Any], *before: Any, **options: Any) -> Any:
    """``function(*before, name, **options)``, with one sentence instead of the libraries' errors."""
    try:
        return function(*before, name, **options)
    except _UNREADABLE as error:
        if importlib.util.find_spec("torchvision") is None and "torchvision" in _all_said(error):
            raise ConfigError(
                f"{what}: {name!r} needs torchvision, which is not installed. Install it: pip install torchvision."
            ) from error
        reason = str(error).strip().partition("\n")[0].rstrip(".")[:200] or type(error).__name__
        if isinstance(error, ImportError):
            raise ConfigError(f"{what}: {name!r} needs a package that is missing: {reason}.") from error
        if Path(name).is_dir():
            raise ConfigError(
                f"{what}: the folder {name!r} cannot be read ({reason}). Check that it is complete."
            ) from error
        raise ConfigError(
            f"{what}: {name!r} is no folder here and cannot be fetched from the Hugging Face Hub ({reason}). "
            "Check the spelling, the network and HF_HUB_OFFLINE."
        ) from error


def _all_said(error: BaseException | None) -> str:
    """The messages of an error and its causes, in lower case: transformers' lazy imports hide what is missing there."""
    said = []
    while error is not None:
        said.append(str(error).lower())
        error = error.__cause__ or error.__context__
    return "\n".join(said)


# ---- adapters --------------------------------------------------------------------------------------------------------


def _add_adapter(model: Any, lora: LoraOptions, parts: Parts | None = None) -> Any:
    # Not prepare_model_for_kbit_training: its float32 copy of embeddings and head costs 4 GiB on a 7B model, and PEFT's
    # freezing and non-reentrant checkpointing make the rest of it needless.
    config = adapter_config(model, lora, parts or parts_of(lora, False, {}))
    model = get_peft_model(model, config)  # in float32, whatever the base: PEFT's default
    finish_copies(model)
    return model


def _load_adapter(
    folder: str, load_in_4bit: bool, lora: LoraOptions | None, parts: Parts, dtype: str
) -> tuple[Any, Any]:
    base_name = adapter_base(folder)
    base, processor = load(base_name, load_in_4bit, None, parts_of(None, False, {}), dtype, False)
    if isinstance(base, PeftModel):  # a run that started from a run
        if load_in_4bit:
            raise UnsupportedError(
                f"{folder}: its base {base_name!r} is an adapter too, which 4-bit weights cannot absorb exactly. "
                "Load it without 4-bit, or merge the base first."
            )
        base = base.merge_and_unload()
    model = _read(folder, "adapter", PeftModel.from_pretrained, base, is_trainable=True)
    model.peft_config["default"].base_model_name_or_path = base_name  # a path relative to this folder, saved elsewhere
    finish_copies(model, folder)
    if lora is not None or parts.given:
        check_same_adapter(folder, model, lora, parts)
    if any((Path(folder) / file).is_file() for file in ("processor_config.json", "tokenizer_config.json")):
        processor = _load_processor(folder)
    return model, processor


def adapter_base(folder: str) -> str:
    """The base model of an adapter folder: an absolute folder, also if written relative to it, or a name on the Hub.

    Raises:
        ConfigError: the adapter names no base model, or a folder that is gone.
    """
    written = written_base(folder)
    if written:
        for path in (Path(folder) / written, Path(written).expanduser()):
            if path.is_dir() and path.resolve() != Path(folder):
                return str(path.resolve())
    if not written or looks_like_path(written):
        raise ConfigError(
            f"{folder}: the base model of its adapter, {written!r}, does not exist. "
            "Put it back, or write where it is now as base_model_name_or_path into adapter_config.json."
        )
    return written


def written_base(folder: str) -> str:
    """The base model as an adapter folder names it; an empty string where it names none."""
    text = (Path(folder) / "adapter_config.json").read_text(encoding="utf-8")
    try:
        return json.loads(text).get("base_model_name_or_path") or ""
    except json.JSONDecodeError as error:
        raise ConfigError(f"{folder}: adapter_config.json is no JSON ({error}). Restore the file.") from error
