"""Weights to the disk: an adapter as it is, or merged in 16 or 4 bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import ExportError, UnsupportedError
from ..models import load_model
from ..models.parts import finish_copies
from .source import Source

_TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def write_adapter(source: Source, processor: Any, folder: Path) -> None:
    """Copy the adapter, which names its base model absolutely then, and save the processor beside it.

    Raises:
        UnsupportedError: its base is an adapter itself, which PEFT alone cannot load.
    """
    base = source.base or ""
    if (Path(base) / "adapter_config.json").is_file():
        raise UnsupportedError(
            f"export: the base of {source.folder} is an adapter too ({base}), which PEFT cannot load below another. "
            "Use --to merged_16bit, which merges both."
        )
    for name in _ADAPTER_FILES:
        if (source.folder / name).is_file():
            shutil.copy2(source.folder / name, folder / name)
    config = json.loads((source.folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    processor.save_pretrained(folder)


def load_for_merge(source: Source, dtype: str) -> tuple[Any, Any]:
    """The run over unquantized weights, through PEFT; a base that was published in 4 bits is dequantized."""
    base = source.base if source.is_adapter else None
    if base is None or not _is_quantized(base):
        return load_model(source.folder, backend="hf", dtype=dtype)  # pyright: ignore[reportArgumentType]
    model, processor = load_model(base, backend="hf", load_in_4bit=True, dtype=dtype)  # pyright: ignore[reportArgumentType]
    plain = model.dequantize().to(getattr(torch, dtype))
    # What would make saving look for the 4-bit parts that are gone.
    plain.hf_quantizer = plain._weight_conversions = None
    vars(plain.config).pop("quantization_config", None)
    adapted = PeftModel.from_pretrained(plain, str(source.folder))
    finish_copies(adapted, str(source.folder))
    return adapted, processor


def _is_quantized(base: str) -> bool:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base) if not (Path(base) / "adapter_config.json").is_file() else None
    return getattr(config, "quantization_config", None) is not None


def merge(model: Any) -> Any:
    """The plain model with the adapter in its weights, parts that were trained whole included; a plain one as it is.

    Raises:
        ExportError: a merged weight is not finite.
    """
    if not isinstance(model, PeftModel):
        return model
    _untie_adapted(model.get_base_model())
    try:
        merged: Any = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ExportError(f"The adapter cannot be merged: {str(error).strip().rstrip('.')}.") from error
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if embedding is not None and head is not None and head.weight is not embedding.weight:
        for config in (merged.config, merged.config.get_text_config()):
            if getattr(config, "tie_word_embeddings", None):
                config.tie_word_embeddings = False  # or loading would tie them again
    return merged


def _untie_adapted(model: Any) -> None:
    """An adapter on one of two tied weights changes that one alone, but merging it in place would change both."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or head.weight is not embedding.weight:
        return
    if isinstance(head, BaseTunerLayer) or isinstance(embedding, BaseTunerLayer):
        plain: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        plain.weight = torch.nn.Parameter(plain.weight.detach().clone(), requires_grad=False)


def write_model(model: Any, processor: Any, folder: Path, dtype: str) -> None:
    """Save a plain model in ``dtype``, with its processor, tokenizer, chat template and generation config."""
    model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_4bit(merged: Path, folder: Path, dtype: str) -> None:
    """Quantize a saved 16-bit model as ``load_model`` does: NF4, the towers of media and the head as they are."""
    model, processor = load_model(merged, backend="hf", load_in_4bit=True, dtype=dtype)  # pyright: ignore[reportArgumentType]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def stored_dtypes(folder: Path) -> str:
    """The number types of the saved floating-point weights by torch's names, joined by "and"."""
    found = set()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        found |= {_TYPES[entry["dtype"]] for entry in header.values() if entry.get("dtype") in _TYPES}
    return " and ".join(sorted(found))
