"""The slow path that everything is compared with: one row, no padding, no batching, the processor called directly."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row's messages with PIL images in their slots, in order."""
    images = list(row.get("images") or [])
    messages = []
    for message in row["prompt"]:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        filled = []
        for part in parts:
            if part["type"] == "image":
                picture = images.pop(0)
                picture = picture if isinstance(picture, Image.Image) else Image.open(picture)
                filled.append({"type": "image", "image": picture.convert("RGB")})
            else:
                filled.append({"type": "text", "text": part["text"]})
        messages.append({"role": message["role"], "content": filled})
    assert not images, "the row has more images than slots"
    return messages


def encode(processor: Any, row: dict[str, Any]) -> dict[str, Tensor]:
    """The processor's own output for one row."""
    return dict(
        processor.apply_chat_template(
            [conversation(row)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


def logps(model: Any, encoded: dict[str, Tensor], completion: list[int], temperature: float = 1.0) -> Tensor:
    """(T,) log-probabilities of the completion after the prompt, from the model's plain logits."""
    prompt = encoded["input_ids"]
    tail = torch.tensor([completion])
    inputs = {key: value for key, value in encoded.items() if key not in ("input_ids", "attention_mask")}
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.zeros_like(tail)], 1)
    ids = torch.cat([prompt, tail], 1)
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, use_cache=False).logits
    logits = logits[0, prompt.size(1) - 1 : -1]
    logits = (logits.float() if logits.dtype == torch.bfloat16 else logits) / temperature
    return logits.log_softmax(-1).gather(-1, tail[0, :, None])[:, 0]
