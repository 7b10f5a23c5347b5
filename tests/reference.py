"""The slow path that everything is compared with: one row, no padding, no batching, the processor called directly."""

import base64
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEDIA = ("image", "video", "audio")


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row's messages with their media in the slots, in order; pictures as RGB."""
    waiting = {kind: list(row.get(f"{kind}s") or []) for kind in MEDIA}
    messages = []
    for message in row["prompt"]:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        filled = []
        for part in parts:
            if part["type"] in MEDIA:
                medium = waiting[part["type"]].pop(0)
                if part["type"] == "image":
                    medium = medium if isinstance(medium, Image.Image) else Image.open(medium)
                    medium = medium.convert("RGB")
                filled.append({"type": part["type"], part["type"]: medium})
            else:
                filled.append({"type": "text", "text": part["text"]})
        messages.append({"role": message["role"], "content": filled})
    assert not any(waiting.values()), "the row has more media than slots"
    return messages


def encode(processor: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The processor's own output for one row, with the model's other keyword arguments.

    ``images`` are PIL images and ``audios`` arrays at 16 kHz. ``videos`` are arrays (F, H, W, 3) at ``fps`` of the row,
    or have ``frames``, ``indices``, ``total``, ``fps`` and ``duration``, and ``sound`` (16 kHz) where the row says
    ``audio_in_video``.
    """
    clips = [_clip(video, row.get("fps", 2.0)) for video in row.get("videos") or []]
    messages = conversation({**row, "videos": clips})
    if type(processor).__name__ == "VoxtralProcessor":  # its template takes files only
        return _of_files(processor, messages)
    if not row.get("videos") and not row.get("audios"):
        return dict(
            processor.apply_chat_template(
                [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        )
    media = {kind: [p[kind] for m in messages for p in m["content"] if p["type"] == kind] for kind in MEDIA}
    slots = [
        {**m, "content": [p if p["type"] == "text" else {"type": p["type"]} for p in m["content"]]} for m in messages
    ]
    text = processor.apply_chat_template(slots, add_generation_prompt=True)
    arguments: dict[str, Any] = {"text": text, "return_tensors": "pt"}
    if processor.tokenizer.bos_token:
        arguments["add_special_tokens"] = False
    if media["image"]:
        arguments["images"] = [media["image"]]  # one row: several pictures of one are seen otherwise
    if media["video"]:
        arguments |= _clips(media["video"])
    heard = bool(row.get("audio_in_video"))
    sounds = [
        part["audio"] if part["type"] == "audio" else part["video"].sound
        for message in messages
        for part in message["content"]
        if part["type"] == "audio" or (part["type"] == "video" and heard)
    ]
    if sounds:
        arguments |= {"audio": sounds, "sampling_rate": 16_000}
    if heard:
        arguments["use_audio_in_video"] = True
    encoded = dict(processor(**arguments))
    if "video_second_per_grid" in encoded:  # the processor writes the first clip's rate for all
        encoded["video_second_per_grid"] = torch.tensor([2 * c.total / len(c.frames) / c.fps for c in media["video"]])
    return encoded | ({"use_audio_in_video": True} if heard else {})


def _clip(video: Any, fps: float) -> Any:
    if not isinstance(video, np.ndarray):
        return video
    frames = len(video)
    return SimpleNamespace(frames=video, indices=range(frames), total=frames, fps=fps, duration=frames / fps)


def _clips(clips: list[Any]) -> dict[str, Any]:
    times = [
        {"total_num_frames": c.total, "fps": c.fps, "duration": c.duration, "frames_indices": list(c.indices)}
        for c in clips
    ]
    rate = len(clips[0].frames) / clips[0].total * clips[0].fps
    return {"videos": [[c.frames for c in clips]], "video_metadata": times, "do_sample_frames": False, "fps": rate}


def _of_files(processor: Any, messages: list[dict[str, Any]]) -> dict[str, Any]:
    import soundfile

    def written(sound: Any) -> str:
        file = io.BytesIO()
        soundfile.write(file, sound, 16_000, format="WAV", subtype="FLOAT")
        return base64.b64encode(file.getvalue()).decode()

    parts = [
        [{"type": "audio", "base64": written(p["audio"])} if p["type"] == "audio" else p for p in m["content"]]
        for m in messages
    ]
    filled = [{**message, "content": content} for message, content in zip(messages, parts, strict=True)]
    return dict(processor.apply_chat_template([filled], tokenize=True, return_dict=True, return_tensors="pt"))


def logps(model: Any, encoded: dict[str, Any], completion: list[int], temperature: float = 1.0) -> Tensor:
    """(T,) log-probabilities of the completion after the prompt, from the model's plain logits."""
    prompt = encoded["input_ids"]
    tail = torch.tensor([completion])
    inputs = {key: value for key, value in encoded.items() if key not in ("input_ids", "attention_mask", "labels")}
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            follows = torch.full_like(tail, int(type(model.config).__name__ == "PaliGemmaConfig"))
            inputs[key] = torch.cat([inputs[key], follows], 1)
    if "cross_attention_mask" in inputs:  # what follows sees the pictures that the last token of the prompt sees
        mask = inputs["cross_attention_mask"]
        inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, len(completion), -1, -1)], 1)
    ids = torch.cat([prompt, tail], 1)
    seen = ("pixel_values", "image_pixel", "input_features", "audio_input")
    inputs = {k: v.to(model.dtype) if k.startswith(seen) and v.is_floating_point() else v for k, v in inputs.items()}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, use_cache=False).logits
    logits = logits[0, prompt.size(1) - 1 : -1]
    logits = (logits.float() if logits.dtype == torch.bfloat16 else logits) / temperature
    return logits.log_softmax(-1).gather(-1, tail[0, :, None])[:, 0]
