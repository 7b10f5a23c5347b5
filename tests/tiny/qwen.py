"""Qwen's vision-language models, whose patches are packed, and Omni's thinker, which also hears."""

from typing import Any

import transformers

from .parts import WHISPER_FEATURES, finish, text_config, whisper_config
from .text import template, tokenizer

_NAMES = ("vision_start_token", "vision_end_token", "image_token", "video_token")
_VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TEMPLATE = template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")


def qwen2_vl(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    vision = {"depth": layers, "num_heads": 2, "patch_size": 14, "embed_dim": hidden, "hidden_size": hidden}
    return build_qwen("Qwen2VL", vision | {"mlp_ratio": 2}, seed, hidden, layers, image_scale)


def qwen2_5_vl(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    return build_qwen("Qwen2_5_VL", _windowed(hidden, layers), seed, hidden, layers, image_scale)


def qwen3_vl(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    vision = {"depth": layers, "num_heads": 2, "patch_size": 16, "hidden_size": hidden, "out_hidden_size": hidden}
    vision |= {"intermediate_size": 2 * hidden, "num_position_embeddings": 64}
    vision |= {"deepstack_visual_indexes": [0, layers - 1]}
    return build_qwen("Qwen3VL", vision, seed, hidden, layers, image_scale)


def _windowed(hidden: int, layers: int) -> dict[str, Any]:
    sizes = {"depth": layers, "num_heads": 2, "patch_size": 14, "hidden_size": hidden, "out_hidden_size": hidden}
    return {**sizes, "intermediate_size": 2 * hidden, "window_size": 56, "fullatt_block_indexes": [layers - 1]}


def _rope(hidden: int) -> dict[str, Any]:
    eighth = hidden // 32
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2 * eighth, eighth, eighth]}


def build_qwen(
    prefix: str, vision: dict[str, Any], seed: int, hidden: int, layers: int, image_scale: float, **more: Any
) -> tuple[Any, Any]:
    """A model of Qwen's vision-language kind and its processor; ``more`` goes to the text config."""
    words = tokenizer(_VISION, dict(zip(_NAMES, _VISION, strict=True)))
    ids = {f"{n}_id": words.convert_tokens_to_ids(s) for n, s in zip(_NAMES, _VISION, strict=True)}
    rope, head = _rope(hidden), {}
    third = prefix in ("Qwen3VL", "Qwen3_5")
    if third:
        rope["mrope_interleaved"], head = True, {"head_dim": hidden // 4}
    if prefix == "Qwen3_5":  # a part of every head turns
        rope["partial_rotary_factor"], head = 0.5, {"head_dim": hidden // 2}
    config_class = getattr(transformers, f"{prefix}Config")
    model_class = getattr(transformers, f"{prefix}ForConditionalGeneration")
    processor_class = getattr(transformers, "Qwen3VLProcessor" if third else f"{prefix}Processor")
    text = text_config(len(words), hidden, layers, rope_parameters=rope, **head, **more)
    model = model_class(config_class(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids))
    clips = transformers.Qwen3VLVideoProcessor if third else transformers.Qwen2VLVideoProcessor
    processor = processor_class(
        image_processor=transformers.Qwen2VLImageProcessor(**_pixels(vision["patch_size"], 1)),
        tokenizer=words,
        video_processor=clips(**_pixels(vision["patch_size"], 8)),
        chat_template=_TEMPLATE,
    )
    last = "linear_fc2" if third else "mlp.2"
    return finish(model, processor, seed, image_scale, f"model.visual.merger.{last}.weight")


def _pixels(patch: int, frames: int) -> dict[str, Any]:
    """At most 112 x 112 pixels a frame; four patches make a token."""
    size = {"shortest_edge": 28 * 28, "longest_edge": frames * 112 * 112}
    return {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "size": size}


def omni(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    named = {f"{kind}_token": f"<|{kind.upper()}|>" for kind in ("image", "video", "audio")}
    named |= {f"{kind}_{end}_token": f"<|{kind}_{end}|>" for kind in ("vision", "audio") for end in ("bos", "eos")}
    words = tokenizer(tuple(named.values()), named)
    ids = {f"{name}_id": words.convert_tokens_to_ids(token) for name, token in named.items()}
    for kind in ("vision", "audio"):
        ids[f"{kind}_start_token_id"], ids[f"{kind}_end_token_id"] = (
            ids.pop(f"{kind}_{end}_token_id") for end in ("bos", "eos")
        )
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=text_config(len(words), hidden, layers, rope_parameters=_rope(hidden)),
        vision_config=_windowed(hidden, layers),
        audio_config=whisper_config(hidden, layers, n_window=50, output_dim=hidden),
        tie_word_embeddings=False,
        **ids,
    )
    processor = transformers.Qwen2_5OmniProcessor(
        transformers.Qwen2VLImageProcessor(**_pixels(14, 1)),
        transformers.Qwen2VLVideoProcessor(**_pixels(14, 8)),
        transformers.WhisperFeatureExtractor(**WHISPER_FEATURES, return_attention_mask=True),
        words,
        chat_template=template(
            "<|vision_bos|><|IMAGE|><|vision_eos|>",
            "<|vision_bos|><|VIDEO|><|vision_eos|>",
            "<|audio_bos|><|AUDIO|><|audio_eos|>",
        ),
    )
    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    return finish(model, processor, seed, image_scale, "visual.merger.mlp.2.weight", "audio_tower.proj.weight")
