"""What a processor hears of a sound: its sampling rate, its longest clip, and a track for a silent video."""

import inspect
import struct
from typing import TYPE_CHECKING, Any

from ..config import MediaOptions
from ..errors import MediaError
from .medium import Medium

if TYPE_CHECKING:
    import numpy as np


def extractor_of(processor: Any) -> Any:
    """The part of a processor that takes sound, or None."""
    names = ("feature_extractor", "audio_processor")
    return next((part for name in names if (part := getattr(processor, name, None)) is not None), None)


def longest(processor: Any) -> int | None:
    """The samples that a processor takes of one sound; None where it takes them all."""
    extractor = extractor_of(processor)
    defaults = {name: p.default for name, p in inspect.signature(type(extractor).__call__).parameters.items()}
    chosen = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {}).get("audio_kwargs", {})
    if not chosen.get("truncation", defaults.get("truncation", False)):
        return None
    limit = chosen.get("max_length") or getattr(extractor, "n_samples", None) or defaults.get("max_length")
    return limit if isinstance(limit, int) else None


def hear(medium: Medium, processor: Any, options: MediaOptions) -> "np.ndarray":
    """(samples,) float32 at the processor's rate.

    Raises:
        MediaError: it cannot be opened, or is longer than the processor takes, which would drop its end silently.
    """
    rate = extractor_of(processor).sampling_rate
    sound, limit = medium.open_audio(rate, options), longest(processor)
    if limit is not None and len(sound) > limit:
        raise MediaError(
            f'The {medium.kind} "{medium.label}" sounds for {len(sound) / rate:.1f} s but '
            f"{type(processor).__name__} hears {limit / rate:.1f} s{medium.at}. Cut it, or set "
            f"media.max_audio_seconds={limit / rate:g} to keep the beginning."
        )
    return sound


def as_wav(sound: "np.ndarray", rate: int) -> bytes:
    """(samples,) float32 as the bytes of a WAV file of 32-bit floats, so without loss."""
    data = sound.astype("<f4").tobytes()
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, rate, 4 * rate, 4, 32) + struct.pack("<4sI", b"data", len(data))
    return struct.pack("<4sI4s", b"RIFF", 4 + len(head) + len(data), b"WAVE") + head + data
