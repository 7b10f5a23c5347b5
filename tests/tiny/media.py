"""Media with something to see and to hear, and prompts with slots for them."""

from typing import Any

import numpy as np
from PIL import Image


def image(seed: int = 0, size: tuple[int, int] = (56, 56)) -> Image.Image:
    """A picture of ``size`` (width, height) in pixels: coarse random blocks, so that resizing does not grey it out."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def video(seed: int = 0, frames: int = 4, size: tuple[int, int] = (56, 56)) -> np.ndarray:
    """``(frames, height, width, 3)`` uint8 of ``size`` (width, height): a picture a frame, none like another."""
    return np.stack([np.asarray(image(1000 * (seed + 1) + i, size)) for i in range(frames)])


def audio(seed: int = 0, seconds: float = 0.5, rate: int = 16_000) -> np.ndarray:
    """``(seconds * rate,)`` float32 in [-1, 1]: every tenth of a second another chord of three tones."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    chords = generator.uniform(200, 3000, (int(seconds * 10) + 1, 3))[(time * 10).astype(int)]
    return (np.sin(2 * np.pi * chords * time[:, None]).sum(1) / 3).astype(np.float32)


def prompt(text: str = "what color is this", images: int = 1, videos: int = 0, audios: int = 0) -> list[dict[str, Any]]:
    """One user turn with slots for media in front of ``text``, in TRL's conversational form."""
    slots = ["image"] * images + ["video"] * videos + ["audio"] * audios
    return [{"role": "user", "content": [*({"type": kind} for kind in slots), {"type": "text", "text": text}]}]
