"""Tiny random multimodal models with their real processors, built in code, offline, in a fraction of a second.

The weights are scaled so that media matter: another picture, clip or sound moves the log-probs of a completion by far
more than any tolerance used in these tests. The tokenizer is exact: decoding what it encoded gives the text back.
"""

from pathlib import Path
from typing import Any

import torch

from .cases import cases, rows
from .hybrid import lfm2_vl, qwen3_5
from .images import aria, gemma3, llava, mllama, paligemma
from .media import audio, image, prompt, video
from .qwen import omni, qwen2_5_vl, qwen2_vl, qwen3_vl
from .sounds import gemma3n, phi4, qwen2_audio, voxtral
from .text import BOS, EOS, PAD, TAGS, TEMPLATE, WORDS, tokenizer
from .tiles import idefics3, internvl, llava_next, llava_onevision, smolvlm

__all__ = [
    "BOS",
    "CASES",
    "EOS",
    "FAMILIES",
    "KINDS",
    "PAD",
    "PREFIX_LM",
    "TAGS",
    "TEMPLATE",
    "WORDS",
    "audio",
    "build",
    "image",
    "prompt",
    "rows",
    "save",
    "tokenizer",
    "video",
]

PREFIX_LM = ("paligemma",)  # their prompts read what follows them: a prompt per completion, always
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "smolvlm", "llava", "gemma3")  # one of every mechanism, for images

_BUILDERS = {
    "qwen2_vl": (qwen2_vl, ("image", "video")),
    "qwen2_5_vl": (qwen2_5_vl, ("image", "video")),
    "qwen3_vl": (qwen3_vl, ("image", "video")),
    "qwen3_5": (qwen3_5, ("image", "video")),
    "qwen2_5_omni_thinker": (omni, ("image", "video", "audio")),
    "idefics3": (idefics3, ("image",)),
    "smolvlm": (smolvlm, ("image", "video")),
    "llava": (llava, ("image",)),
    "llava_next": (llava_next, ("image",)),
    "llava_onevision": (llava_onevision, ("image", "video")),
    "internvl": (internvl, ("image", "video")),
    "gemma3": (gemma3, ("image",)),
    "lfm2_vl": (lfm2_vl, ("image",)),
    "paligemma": (paligemma, ("image",)),
    "aria": (aria, ("image",)),
    "mllama": (mllama, ("image",)),
    "qwen2_audio": (qwen2_audio, ("audio",)),
    "phi4_multimodal": (phi4, ("image", "audio")),
    "gemma3n": (gemma3n, ("image", "audio")),
    "voxtral": (voxtral, ("audio",)),
}
KINDS = {family: kinds for family, (_, kinds) in _BUILDERS.items()}  # every family, and the media it takes
CASES = {family: cases(family, kinds) for family, kinds in KINDS.items()}  # for ``rows``


def build(
    family: str, *, seed: int = 0, hidden: int = 32, layers: int = 2, image_scale: float = 1.0
) -> tuple[Any, Any]:
    """A ``(model, processor)`` of ``family`` (a key of ``KINDS``): fp32, on the CPU, in eval mode.

    ``hidden``: width of the language model; the media towers have the same, and the feed-forward twice as much. 4-bit
    weights need a multiple of 64. ``image_scale`` multiplies what media add to the language model's input.
    """
    with torch.random.fork_rng(devices=[]):  # reproducible, and the caller's random state stays as it was
        torch.manual_seed(seed)
        return _BUILDERS[family][0](seed=seed, hidden=hidden, layers=layers, image_scale=image_scale)


def save(family: str, path: Path | str, **options: Any) -> str:
    """Write ``build(family, **options)`` to ``path`` as a published model looks, and return the path."""
    model, processor = build(family, **options)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)
