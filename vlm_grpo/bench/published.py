"""Models of published shapes with random weights, written to disk as a download would lie there.

Seconds and bytes depend on the shape alone. Nothing is fetched, and the processor is the bench's own small one.
"""

import gc
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from ..errors import ConfigError
from .options import BenchOptions, Modality, ShapeName
from .shapes import build_model, build_processor

_MROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
_SIGHT = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
_SIGHT |= {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}
_HEARING = {"model_type": "qwen2_audio_encoder", "d_model": 1280, "encoder_layers": 32, "encoder_ffn_dim": 5120}
_HEARING |= {"encoder_attention_heads": 20, "num_mel_bins": 128, "max_source_positions": 1500}
_SPREAD = 0.02  # of every matrix: logits of standard deviation about 1 at these widths


@dataclass(frozen=True)
class Shape:
    """A published model's sizes.

    Attributes:
        title: its name.
        modality: what its prompts hold here.
        classes: prefix of transformers' classes.
        text: its language model's config.
        tower: its vision or audio tower's.
        tied: whether its head is its embedding.
        parameters: as published.
    """

    title: str
    modality: Modality
    classes: str
    text: dict[str, Any]
    tower: dict[str, Any]
    tied: bool
    parameters: int

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.text["vocab_size"]


def _text(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocabulary: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": 32768}


SHAPES: dict[str, Shape] = {
    "qwen2.5-vl-3b": Shape(
        "Qwen2.5-VL-3B",
        "image",
        "Qwen2_5_VL",
        {**_text(2048, 11008, 36, 16, 2, 151936), "rope_parameters": _MROPE},
        {**_SIGHT, "out_hidden_size": 2048},
        True,
        3_754_622_976,
    ),
    "qwen2.5-vl-7b": Shape(
        "Qwen2.5-VL-7B",
        "image",
        "Qwen2_5_VL",
        {**_text(3584, 18944, 28, 28, 4, 152064), "rope_parameters": _MROPE},
        {**_SIGHT, "out_hidden_size": 3584},
        False,
        8_292_166_656,
    ),
    "qwen2-audio-7b": Shape(
        "Qwen2-Audio-7B",
        "audio",
        "Qwen2Audio",
        {**_text(4096, 11008, 32, 32, 32, 156032), "model_type": "qwen2"},
        _HEARING,
        False,
        8_397_094_912,
    ),
}


def shaped(options: BenchOptions, name: str) -> BenchOptions:
    """``options`` with the modality and vocabulary of a shape; ``tiny`` has those of the options themselves.

    Raises:
        ConfigError: there is no such shape, or it does not take the options' medium.
    """
    if name not in get_args(ShapeName):
        raise ConfigError(f"shape={name!r}: there is none such. Use {', '.join(get_args(ShapeName))}.")
    if name == "tiny":
        return options
    shape = SHAPES[name]
    takes = ("image", "video") if shape.modality == "image" else (shape.modality,)
    if options.modality not in takes:
        raise ConfigError(f"shape={name!r}: it takes no {options.modality}. Give --modality {shape.modality}.")
    return replace(options, vocab_size=shape.vocabulary)


def meta_model(name: str, words: Any) -> Any:
    """A published shape on the meta device: sizes without weights. ``words`` is the tokenizer."""
    import torch
    import transformers

    shape = SHAPES[name]
    token = words.convert_tokens_to_ids
    ends = {"pad_token_id": words.pad_token_id, "bos_token_id": None, "eos_token_id": words.eos_token_id}
    text = {**shape.text, **ends, "tie_word_embeddings": shape.tied, "dtype": "bfloat16"}
    if shape.modality == "audio":
        parts: dict[str, Any] = {"audio_config": shape.tower, "audio_token_index": token("<|AUDIO|>")}
    else:
        names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
        slots = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        parts = {f"{name}_id": token(slot) for name, slot in zip(names, slots, strict=True)}
        parts["vision_config"] = shape.tower
    config = getattr(transformers, f"{shape.classes}Config")(
        text_config=text, tie_word_embeddings=shape.tied, dtype="bfloat16", **parts
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = getattr(transformers, f"{shape.classes}ForConditionalGeneration")(config)
    finally:
        torch.set_default_dtype(before)
    for name in ends:
        setattr(model.generation_config, name, getattr(words, name))
    return model


def write_model(name: str, options: BenchOptions, folder: Path, device: str) -> Path:
    """Write a shape with random weights and a processor to ``folder``, unless it is there already.

    Args:
        name: of the shape; ``tiny`` is of the options' sizes.
        options: its seed, and the sizes of ``tiny``.
        folder: holds one folder a shape.
        device: where the weights are drawn: seconds on a GPU, minutes on a CPU.

    Returns:
        the model's folder.

    Raises:
        ConfigError: as ``shaped``, or the disk has not enough room.
    """
    options = shaped(options, name)
    folder = folder.resolve()  # processes with another current folder load from it
    sizes = (options.modality, options.hidden_size, options.num_hidden_layers, options.vocab_size)
    more = (options.vision_hidden_size, options.vision_depth, options.seed)
    final = folder / ("-".join(map(str, ("tiny", *sizes, *more))) if name == "tiny" else name)
    if final.is_dir():
        return final
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error.strerror}). Give another folder for models.") from error
    needed = 0 if name == "tiny" else 2 * SHAPES[name].parameters
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{folder}: {needed / 1e9:.1f} GB are needed for {name} and {free / 1e9:.1f} GB are free. "
            "Make room, or give another folder."
        )
    beside = Path(tempfile.mkdtemp(dir=folder, prefix=f".{final.name}."))
    try:
        _write(name, options, beside, device)
        os.replace(beside, final)
    except OSError:
        if not final.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        _give_back()
    return final


def _write(name: str, options: BenchOptions, folder: Path, device: str) -> None:
    processor = build_processor(options, 512 * 28 * 28)
    model = build_model(options, processor) if name == "tiny" else _drawn(name, processor.tokenizer, options, device)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _give_back() -> None:
    """The GPU memory of the weights, which other processes load now."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _drawn(name: str, words: Any, options: BenchOptions, device: str) -> Any:
    import torch

    model = meta_model(name, words).to_empty(device=device)
    model.tie_weights()
    draw = torch.Generator(device).manual_seed(options.seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, _SPREAD, generator=draw)
            else:
                parameter.fill_(float(parameter_name.endswith("weight")))  # norms; the rest are biases
    return model
