"""Families that cut a picture into tiles, and those of them that take a video as a row of pictures."""

from typing import Any

import transformers

from .parts import finish, text_config, vision_config
from .text import template, tokenizer

_TILE, _PATCH, _SHUFFLE = 64, 16, 2  # pixels, pixels, and how many patches become one token on either axis
_GRID = [[56, 112], [112, 56], [112, 112]]


def idefics3(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    return _shuffled("Idefics3", seed, hidden, layers, image_scale)


def smolvlm(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    return _shuffled("SmolVLM", seed, hidden, layers, image_scale)


def _shuffled(prefix: str, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    tiles = tuple(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    }
    if prefix == "SmolVLM":
        named["video_token"] = "<video>"
    words = tokenizer((*named.values(), *tiles), named)
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text_config(len(words), hidden, layers, model_type="llama"),
        vision_config=vision_config(hidden, layers, image_size=_TILE, patch_size=_PATCH),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=_SHUFFLE,
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=False,
    )
    edge = {"longest_edge": _TILE}
    parts = [
        getattr(transformers, f"{prefix}ImageProcessor")(size={"longest_edge": 2 * _TILE}, max_image_size=edge),
        words,
    ]
    if prefix == "SmolVLM":
        sampling = {"video_size": edge, "max_frames": 4, "fps": 1}
        parts.append(transformers.SmolVLMVideoProcessor(size=edge, max_image_size=edge, video_sampling=sampling))
    processor = getattr(transformers, f"{prefix}Processor")(
        *parts,
        image_seq_len=(_TILE // _PATCH) ** 2 // _SHUFFLE**2,
        chat_template=template("<image>", "<video>" if prefix == "SmolVLM" else ""),
    )
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    return finish(model, processor, seed, image_scale, "model.connector.modality_projection.proj.weight")


def llava_next(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    words = tokenizer(("<image>",), {"image_token": "<image>"})
    config = transformers.LlavaNextConfig(
        text_config=text_config(len(words), hidden, layers, model_type="llama"),
        # One layer more: LLaVA reads the last but one.
        vision_config=vision_config(hidden, layers + 1, model_type="clip_vision_model", projection_dim=hidden),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=_GRID,
        tie_word_embeddings=False,
    )
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=_GRID
        ),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    model = transformers.LlavaNextForConditionalGeneration(config)
    return finish(model, processor, seed, image_scale, "model.multi_modal_projector.linear_2.weight")


def llava_onevision(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    words = tokenizer(("<image>", "<video>"), {"image_token": "<image>", "video_token": "<video>"})
    config = transformers.LlavaOnevisionConfig(
        text_config=text_config(len(words), hidden, layers, model_type="qwen2"),
        vision_config=vision_config(hidden, layers, model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_GRID,
        tie_word_embeddings=False,
    )
    square = {"height": 56, "width": 56}
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=_GRID),
        words,
        transformers.LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>", "<video>"),
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    return finish(model, processor, seed, image_scale, "model.multi_modal_projector.linear_2.weight")


def internvl(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(tuple(named.values()), named)
    square = {"height": 56, "width": 56}
    config = transformers.InternVLConfig(
        text_config=text_config(len(words), hidden, layers, model_type="qwen2"),
        vision_config=vision_config(hidden, layers, image_size=[56, 56], patch_size=[14, 14]),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=square, crop_to_patches=True, min_patches=1, max_patches=4),
        words,
        transformers.InternVLVideoProcessor(size=square),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>", "<video>"),
    )
    model = transformers.InternVLForConditionalGeneration(config)
    return finish(model, processor, seed, image_scale, "model.multi_modal_projector.linear_2.weight")
