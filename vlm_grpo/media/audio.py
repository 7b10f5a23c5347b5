"""Sounds: files, audio tracks and arrays become mono float32 at the rate that the model hears."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MediaOptions
from .container import audio_stream, load_av, opened
from .medium import Medium
from .problems import Unfit, is_file, reading


def open_audio(medium: Medium, options: MediaOptions, rate: int) -> np.ndarray:
    """(samples,) float32 at ``rate`` samples a second, the mean of all channels; of a video, its audio track.

    An array without a rate of its own is taken to be at ``rate`` already. Whole numbers are scaled by their type's
    largest value to [-1, 1]; floats are not changed, and may exceed it.

    Raises:
        MediaError: missing, empty, torn, damaged, without an audio track or samples, or with NaN.
        UnsupportedError: PyAV is not installed.
    """
    with reading(medium):
        return read_audio(medium.source, medium.rate, options, rate)


def read_audio(source: Any, own_rate: float | None, options: MediaOptions, rate: int) -> np.ndarray:
    """``open_audio`` without the medium's name: raises whatever ``problems.read_errors`` lists."""
    limit = None if options.max_audio_seconds is None else max(1, round(options.max_audio_seconds * rate))
    if is_file(source):
        samples = _from_file(source, rate, limit)
    elif hasattr(source, "get_all_samples"):  # torchcodec's AudioDecoder, as datasets gives for an Audio column
        heard = source.get_all_samples()
        samples = _resampled(to_mono(np.asarray(heard.data)), float(heard.sample_rate), rate)
    elif isinstance(source, np.ndarray) and source.ndim <= 2:
        samples = _resampled(to_mono(source), float(own_rate or rate), rate)
    else:
        raise Unfit("is a list of frames, which have no audio track")
    samples = samples[:limit]
    if not samples.size:
        raise Unfit("has no samples")
    if not np.isfinite(samples).all():
        raise Unfit("holds NaN or infinite samples")
    return samples


def to_mono(samples: np.ndarray) -> np.ndarray:
    """(samples,) float32 of (samples,) or (channels, samples) in any type that sounds are kept in."""
    kind, bits = samples.dtype.kind, 8 * samples.dtype.itemsize
    if kind == "f":
        samples = samples.astype(np.float32, copy=False)
    elif kind == "u" and bits == 8:  # 8-bit wave files are unsigned
        samples = (samples.astype(np.float32) - 128) / 128
    elif kind == "i" and bits <= 32:
        samples = samples.astype(np.float32) / 2.0 ** (bits - 1)
    else:
        # 64-bit integers are what Python lists become; their scale is anybody's guess.
        raise Unfit(f"holds {samples.dtype} samples, whose scale is not known; give float32 or int16")
    return samples.mean(axis=0) if samples.ndim == 2 else samples


def _from_file(source: Path | bytes, rate: int, limit: int | None) -> np.ndarray:
    pieces: list[np.ndarray] = []
    length = 0
    with opened(source) as container:
        for piece in _decoded(container, rate):
            pieces.append(piece)
            length += piece.size
            if limit is not None and length >= limit:
                break
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def _decoded(container: Any, rate: int) -> Iterator[np.ndarray]:
    stream = audio_stream(container)
    stream.thread_type = "AUTO"
    # The layout stays: FFmpeg's own mix to mono weighs the channels of 5.1 differently and drops one.
    resampler = load_av().AudioResampler(format="fltp", rate=rate)
    for frame in container.decode(stream):
        for out in resampler.resample(frame):
            yield out.to_ndarray().mean(axis=0)
    for out in resampler.resample(None):
        yield out.to_ndarray().mean(axis=0)


def _resampled(samples: np.ndarray, own_rate: float, rate: int) -> np.ndarray:
    if own_rate == rate or not samples.size:
        return samples
    if own_rate < 1 or own_rate != int(own_rate):
        raise Unfit(f"has a rate of {own_rate:g} samples a second, which must be a whole number")
    av = load_av()
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
    pieces = []
    second = int(own_rate)
    for start in range(0, samples.size, second):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None, start : start + second]), "fltp", "mono")
        frame.sample_rate, frame.pts = second, start
        pieces += [out.to_ndarray()[0] for out in resampler.resample(frame)]
    pieces += [out.to_ndarray()[0] for out in resampler.resample(None)]
    return np.concatenate(pieces)
