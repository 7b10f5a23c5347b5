"""Families that see a picture as one fixed square, and Mllama, whose text reads pictures by cross-attention."""

from typing import Any

import torch
import transformers

from .parts import finish, text_config, vision_config
from .text import template, tokenizer


def llava(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    words = tokenizer(("<image>",), {"image_token": "<image>"})
    config = transformers.LlavaConfig(
        text_config=text_config(len(words), hidden, layers, model_type="llama"),
        # One layer more: LLaVA reads the last but one.
        vision_config=vision_config(hidden, layers + 1, model_type="clip_vision_model", projection_dim=hidden),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    return finish(model, processor, seed, image_scale, "model.multi_modal_projector.linear_2.weight")


def gemma3(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer(("<bos>", *named.values()), named, bos="<bos>")
    ids = words.convert_tokens_to_ids
    text = text_config(len(words), hidden, layers, head_dim=hidden // 4, sliding_window=64, bos_token_id=ids("<bos>"))
    text["layer_types"] = ["sliding_attention"] * (layers - 1) + ["full_attention"]
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision_config(hidden, layers, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
        tie_word_embeddings=False,
    )
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        words,
        image_seq_length=4,
        chat_template=template("<start_of_image>", bos="<bos>"),
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    return finish(model, processor, seed, image_scale, "model.multi_modal_projector.mm_input_projection_weight")


def paligemma(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    words = tokenizer(("<bos>", "<image>"), {"image_token": "<image>"}, bos="<bos>")
    # Its processor writes <bos> itself, behind the last picture, and adds a thousand words for places.
    processor = transformers.PaliGemmaProcessor(
        transformers.SiglipImageProcessor(size={"height": 56, "width": 56}, image_seq_length=16),
        words,
        chat_template=template("<image>"),
    )
    text = text_config(len(words), hidden, layers, model_type="gemma", head_dim=hidden // 4)
    config = transformers.PaliGemmaConfig(
        text_config=text | {"bos_token_id": words.bos_token_id, "tie_word_embeddings": False},
        vision_config=vision_config(hidden, layers, model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=hidden,
        tie_word_embeddings=False,
    )
    model = transformers.PaliGemmaForConditionalGeneration(config)
    return finish(model, processor, seed, image_scale, "model.multi_modal_projector.linear.weight")


def aria(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    words = tokenizer(("<|img|>",), {"image_token": "<|img|>"})
    text = text_config(len(words), hidden, layers, model_type="aria_text", head_dim=hidden // 4)
    # Its processor makes every picture 980 pixels wide: large patches keep the tower small.
    vision = vision_config(hidden, layers, model_type="idefics3_vision", image_size=980, patch_size=70)
    config = transformers.AriaConfig(
        text_config=text | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        vision_config=vision,
        projector_patch_to_query_dict={49: 8, 196: 16},
        image_token_index=words.convert_tokens_to_ids("<|img|>"),
        tie_word_embeddings=False,
    )
    processor = transformers.AriaProcessor(
        transformers.AriaImageProcessor(),
        words,
        size_conversion={490: 8, 980: 16},
        chat_template=template("<|img|>"),
    )
    model = transformers.AriaForConditionalGeneration(config)
    projector = "model.multi_modal_projector.feed_forward.linear_out.weight"
    return finish(model, processor, seed, image_scale, projector)


def mllama(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    words = tokenizer(("<|bos|>", "<|image|>", "<|python_tag|>"), {"image_token": "<|image|>"}, bos="<|bos|>")
    ids = words.convert_tokens_to_ids
    text = text_config(len(words), hidden, layers + 1, cross_attention_layers=[1], bos_token_id=ids("<|bos|>"))
    tower = {"num_global_layers": 1, "attention_heads": 2, "max_num_tiles": 4, "vision_output_dim": 2 * hidden}
    config = transformers.MllamaConfig(
        text_config=text | {"tie_word_embeddings": False},
        vision_config=vision_config(hidden, layers, intermediate_layers_indices=[0], **tower)
        | {"supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]},
        image_token_index=ids("<|image|>"),
    )
    processor = transformers.MllamaProcessor(
        transformers.MllamaImageProcessor(size={"height": 56, "width": 56}, max_image_tiles=4),
        words,
        chat_template=template("<|image|>", bos="<|bos|>"),
    )
    model = transformers.MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):  # closed before training: no picture would get through
                parameter.fill_(1.0)
    return finish(model, processor, seed, image_scale, "model.multi_modal_projector.weight")
