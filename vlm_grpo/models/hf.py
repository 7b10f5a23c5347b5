"""``load_model`` through transformers, PEFT and (4-bit) bitsandbytes: on any machine, with or without a GPU."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
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
from ..patches.bitsandbytes import CPU_PACKING
from . import is_adapter, looks_like_path
from .families import family_of, is_target, lora_targets

if TYPE_CHECKING:
    from ..config import LoraOptions

# What files that are missing, torn or of another kind make the libraries raise.
_UNREADABLE = (OSError, ImportError, ValueError, KeyError, SafetensorError)

# Image models first: some text-only classes accept their configs too, and would drop the vision tower.
_AUTO_CLASSES = (
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    (MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM),
    (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
)


def load(
    name: str, load_in_4bit: bool, lora: "LoraOptions | None", dtype: str, gradient_checkpointing: bool
) -> tuple[Any, Any]:
    """As ``load_model``; ``name`` is an absolute folder or a name on the Hub."""
    if is_adapter(name):
        model, processor = _load_adapter(name, load_in_4bit, lora, dtype)
    else:
        model, processor = _load_base(name, load_in_4bit, dtype), _load_processor(name)
        if lora is not None:
            model = _add_adapter(model, lora)
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
    weights = resolve_dtype(dtype)
    options: dict[str, Any] = {"dtype": weights, "device_map": _device_map(load_in_4bit)}
    if load_in_4bit:
        if not torch.cuda.is_available():
            CPU_PACKING.ensure()
        if getattr(config, "quantization_config", None) is None:  # else the checkpoint is 4-bit already
            options["quantization_config"] = _four_bit(config, weights)
    if config is not whole:
        options["config"] = config
    return _read(name, "model", auto_class.from_pretrained, **options)


def resolve_dtype(dtype: str) -> torch.dtype:
    """The dtype of the weights; ``"auto"`` is bfloat16 where the GPU computes it natively, float16 on other GPUs."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


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


def _load_processor(name: str) -> Any:
    """The processor; a tokenizer, for a text-only model."""
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


# ---- adapters --------------------------------------------------------------------------------------------------------


def _add_adapter(model: Any, lora: "LoraOptions") -> Any:
    # Not prepare_model_for_kbit_training: its float32 copy of embeddings and head costs 4 GiB on a 7B model, and PEFT's
    # freezing and non-reentrant checkpointing make the rest of it needless.
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora_alpha(lora),
        lora_dropout=lora.dropout,
        target_modules=lora_targets(family_of(model.config), model, lora),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # in float32, whatever the base: PEFT's default


def lora_alpha(lora: "LoraOptions") -> Any:
    """The scale of the adapters as PEFT writes it: an integer where it is one."""
    return int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha


def _load_adapter(folder: str, load_in_4bit: bool, lora: "LoraOptions | None", dtype: str) -> tuple[Any, Any]:
    base_name = adapter_base(folder)
    base, processor = load(base_name, load_in_4bit, None, dtype, False)
    if isinstance(base, PeftModel):  # a run that started from a run
        if load_in_4bit:
            raise UnsupportedError(
                f"{folder}: its base {base_name!r} is an adapter too, which 4-bit weights cannot absorb exactly. "
                "Load it without 4-bit, or merge the base first."
            )
        base = base.merge_and_unload()
    model = _read(folder, "adapter", PeftModel.from_pretrained, base, is_trainable=True)
    if lora is not None:
        check_same_adapter(folder, model, lora)
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


def check_same_adapter(folder: str, model: Any, lora: "LoraOptions") -> None:
    """Raise ``ConfigError`` when the options would make other adapters than the ones that were loaded."""
    saved = model.peft_config["default"]
    pairs = (("r", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout"))
    found = [(name, getattr(saved, attribute, None), getattr(lora, name)) for name, attribute in pairs]
    differ = [f"lora.{name} is {here} but {there} in the adapter" for name, there, here in found if here != there]
    targets = lora_targets(family_of(model.config), model.get_base_model(), lora)
    if targets != "all-linear":
        names = {name: module for name, module in model.get_base_model().named_modules()}
        chosen = {name for name in names if is_target(name, targets)}
        adapted = {name for name, module in names.items() if hasattr(module, "lora_A")}
        if chosen != adapted:
            example = min(chosen ^ adapted)
            where = "chosen here only" if example in chosen else "in the adapter only"
            differ.append(
                f"the options choose {len(chosen)} modules but the adapter has {len(adapted)} ({example}: {where})"
            )
    if differ:
        raise ConfigError(
            f"{folder}: {'; '.join(differ)}. Leave lora out to continue this adapter, or start from its base model."
        )
