"""Families whose decoder mixes most of its tokens without attention: by a state, or by a short convolution."""

from typing import Any

import torch
import transformers

from .parts import finish, text_config, vision_config
from .qwen import build_qwen
from .text import template, tokenizer


def qwen3_5(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    vision = {"depth": layers, "num_heads": 2, "patch_size": 16, "hidden_size": hidden, "out_hidden_size": hidden}
    vision |= {"intermediate_size": 2 * hidden, "num_position_embeddings": 64}
    linear = {f"linear_{kind}_head_dim": hidden // 4 for kind in ("key", "value")}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= _mixed(layers, "linear_attention")
    model, processor = build_qwen("Qwen3_5", vision, seed, hidden, layers, image_scale, **linear)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # heads that remember the whole prompt, and one that forgets at once
                parameter.copy_(torch.linspace(-5.0, 1.0, len(parameter)))
    return model, processor


def lfm2_vl(*, seed: int, hidden: int, layers: int, image_scale: float) -> tuple[Any, Any]:
    named = {"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
    named["image_thumbnail_token"] = "<|img_thumbnail|>"
    tiles = tuple(f"<|img_row_{r}_col_{c}|>" for r in range(1, 5) for c in range(1, 5))
    words = tokenizer(("<|startoftext|>", *named.values(), *tiles), named, bos="<|startoftext|>")
    text = text_config(len(words), hidden, layers, model_type="lfm2", block_auto_adjust_ff_dim=False)
    vision = vision_config(hidden, layers, num_patches=16, vision_use_head=False)
    config = transformers.Lfm2VlConfig(
        text_config=text | {"tie_word_embeddings": False} | _mixed(layers, "conv"),
        vision_config={key: value for key, value in vision.items() if key != "image_size"},
        projector_hidden_size=2 * hidden,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    # Four tokens a tile; a picture of more than twice that is cut into tiles.
    sizes = {"encoder_patch_size": 14, "tile_size": 56, "min_image_tokens": 1, "max_image_tokens": 4, "max_tiles": 4}
    processor = transformers.Lfm2VlProcessor(
        transformers.Lfm2VlImageProcessor(**sizes), words, chat_template=template("<image>", bos="<|startoftext|>")
    )
    model = transformers.Lfm2VlForConditionalGeneration(config)
    return finish(model, processor, seed, image_scale, "model.multi_modal_projector.linear_2.weight")


def _mixed(layers: int, kind: str) -> dict[str, Any]:
    """As published, attention has the last word."""
    return {"layer_types": [kind] * (layers - 1) + ["full_attention"]}
