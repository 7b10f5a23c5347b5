"""Prompts of a wanted length: pictures, clips and sounds made in code, as the files they would be, and a text."""

import io
import math
import wave
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .options import BenchOptions
from .shapes import FRAMES, LONGEST, MERGE, PATCH, RATE, build_processor

_CELL = PATCH * MERGE  # pixels of one token, each way
_PICTURE, _CLIP = (1280, 960), (480, 360)
_CLIP_FPS = 2  # of which one a second is taken
_AUDIO_RATE = 25  # tokens a second


@dataclass(frozen=True)
class Prompts:
    """Rows for both trainers.

    Attributes:
        dataset: one row a step: ``prompt`` and a media column that holds encoded files.
        processor: resizes the media to ``media_tokens``.
        prompt_tokens: P of every row.
        media_tokens: of them the medium's.
        source: the medium before it is resized, in words.
    """

    dataset: Any
    processor: Any
    prompt_tokens: int
    media_tokens: int
    source: str


def build_prompts(options: BenchOptions, count: int) -> Prompts:
    """``count`` rows of equal length and different media and texts.

    Raises:
        ConfigError: no medium has so many tokens, or they leave no room for a text.
    """
    import numpy as np

    bare = len(_encode(build_processor(options, _CELL**2).tokenizer, options, "")) - 1  # the slot gives way to tokens
    least_text = options.text_words
    wanted = options.media_tokens or (options.target or 0) - bare - least_text
    exact = options.media_tokens is not None
    make, media_tokens, pixels, source = _medium(options, wanted, exact)
    words = least_text if options.target is None else options.target - bare - media_tokens
    if words < 1:
        raise ConfigError(
            f"prompt_tokens={options.target}: the {options.modality} takes {media_tokens} tokens and the template "
            f"{bare}, which leaves none for a text. Give {media_tokens + bare + 1} or more."
        )
    processor = build_processor(options, pixels)
    draw = np.random.RandomState(options.seed)
    usual = processor.tokenizer.vocab_size - len(processor.tokenizer.all_special_ids) - 2
    texts = [" ".join(f"w{number}" for number in draw.randint(0, usual, words)) for _ in range(count)]
    dataset = _dataset(options.modality, texts, [make(draw) for _ in range(count)])
    return Prompts(dataset, processor, bare + media_tokens + words, media_tokens, source)


def _encode(tokenizer: Any, options: BenchOptions, text: str) -> list[int]:
    content = [{"type": options.modality}, {"type": "text", "text": text}]
    template = build_processor(options, _CELL**2).chat_template
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]


def _dataset(modality: str, texts: list[str], files: list[bytes]) -> Any:
    from datasets import Dataset, Image

    prompts = [[{"role": "user", "content": text}] for text in texts]
    if modality != "image":
        return Dataset.from_dict({"prompt": prompts, modality: files})
    pictures = [{"bytes": file, "path": None} for file in files]
    return Dataset.from_dict({"prompt": prompts, "image": pictures}).cast_column("image", Image())


def _medium(options: BenchOptions, wanted: int, exact: bool) -> tuple[Any, int, int, str]:
    """(maker of files, tokens, pixels of the processor, the source in words)."""
    if options.modality == "audio":
        most = LONGEST * _AUDIO_RATE
        if exact and wanted > most:
            raise ConfigError(f"media_tokens={wanted}: {LONGEST} s of sound have {most} tokens. Give that or less.")
        tokens = max(1, min(wanted, most))
        samples = tokens * RATE // _AUDIO_RATE
        return (lambda draw: _sound(draw, samples)), tokens, 0, f"{samples / RATE:.1f} s at {RATE // 1000} kHz"
    if options.modality == "video":
        pairs = FRAMES // 2
        if exact and wanted % pairs:
            near = max(1, round(wanted / pairs)) * pairs
            raise ConfigError(f"media_tokens={wanted}: {FRAMES} frames need a multiple of {pairs}. Give {near}.")
        (width, height), tokens, pixels = _resized(_CLIP, max(1, wanted // pairs), exact, pairs)
        what = f"{width}x{height}, {FRAMES * _CLIP_FPS} frames of which {FRAMES} are taken"
        return (lambda draw: _clip(draw, width, height)), tokens * pairs, pixels, what
    (width, height), tokens, pixels = _resized(_PICTURE, max(1, wanted), exact)
    return (lambda draw: _picture(draw, width, height)), tokens, pixels, f"{width}x{height}"


def _resized(source: tuple[int, int], wanted: int, exact: bool, each: int = 1) -> tuple[tuple[int, int], int, int]:
    """A source's size, the tokens it is resized to, and the processor's pixels.

    The usual source stays as it is where some limit gives the wanted tokens (or, unless exact, a few less); it is
    enlarged where it has too few pixels, and else cropped to the proportions of a grid of exactly so many.
    """
    larger = max(1.0, math.sqrt(1.2 * wanted * _CELL**2 / math.prod(source)))
    width, height = (round(side * larger) for side in source)
    for tokens in [wanted] if exact else range(wanted, 0, -1):
        for limit in range(tokens, tokens + tokens // 4 + 2):
            if _tokens(width, height, limit) == tokens:
                return (width, height), tokens, limit * _CELL**2
    grids = [(wanted // rows, rows) for rows in range(1, math.isqrt(wanted) + 1) if wanted % rows == 0]
    columns, rows = grids[-1]
    if columns > 2 * rows:
        near = max(1, round(math.sqrt(wanted))) ** 2
        raise ConfigError(
            f"media_tokens={wanted * each}: no grid between 1:1 and 2:1 has so many. Give {near * each}, for instance."
        )
    scale = min(width / columns, height / rows)
    # A hair above: the sides are rounded down to whole tokens.
    return (round(columns * scale), round(rows * scale)), wanted, math.ceil(wanted * 1.02 * _CELL**2)


def _tokens(width: int, height: int, limit: int) -> int:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    pixels = limit * _CELL**2
    high, wide = smart_resize(height, width, _CELL, pixels, pixels)
    return high * wide // _CELL**2


def _blobs(draw: Any, width: int, height: int) -> Any:
    from PIL import Image

    coarse = draw.randint(0, 256, (height // 16 + 1, width // 16 + 1, 3)).astype("uint8")
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _picture(draw: Any, width: int, height: int) -> bytes:
    file = io.BytesIO()
    _blobs(draw, width, height).save(file, "JPEG", quality=90)
    return file.getvalue()


def _clip(draw: Any, width: int, height: int) -> bytes:
    """A view that wanders over a larger picture, as MP4."""
    import av

    length = FRAMES * _CLIP_FPS
    scene, (wide, high) = _blobs(draw, width + 4 * length, height), (width + width % 2, height + height % 2)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as out:
        stream = out.add_stream("libx264", rate=_CLIP_FPS, options={"crf": "20", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = wide, high, "yuv420p"
        for number in range(length):
            view = scene.crop((4 * number, 0, 4 * number + wide, high))
            out.mux(stream.encode(av.VideoFrame.from_image(view)))
        out.mux(stream.encode())
    return file.getvalue()


def _sound(draw: Any, samples: int) -> bytes:
    """A melody of a tone every fifth of a second, as WAV."""
    import numpy as np

    steps = np.repeat(draw.uniform(100, 2000, samples * 5 // RATE + 1), RATE // 5)[:samples]
    tones = 0.4 * np.sin(2 * np.pi * np.cumsum(steps) / RATE) + 0.02 * draw.randn(samples)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, RATE, 0, "NONE", ""))
        out.writeframes((tones.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()
