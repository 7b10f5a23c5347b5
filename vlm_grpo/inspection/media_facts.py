"""Sizes and lengths of media, from their headers, and what they come to over a file."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..config import MediaOptions
from ..errors import VLMGRPOError
from ..media import Kind, Medium
from ..media.check import check_medium
from ..media.container import audio_stream, opened, video_stream
from ..media.frames import frame_indices
from ..media.problems import is_file, read_errors
from ..media.video import DEFAULT_FPS, measure, segment_lengths
from .figures import Spread


@dataclass(frozen=True)
class Facts:
    """What one medium is; 0 is unknown.

    Attributes:
        width, height: pixels, of a picture or of a video's frames.
        seconds: length of a video or sound.
        fps, frames, taken: of a video: frames a second, all of them, and those that a run takes.
        rate, channels: of a sound: samples a second.
        codec: of a sound's file, by FFmpeg's name.
    """

    kind: Kind
    width: int = 0
    height: int = 0
    seconds: float = 0.0
    fps: float = 0.0
    frames: int = 0
    taken: int = 0
    rate: int = 0
    channels: int = 0
    codec: str = ""


def look_at(
    medium: Medium, level: Literal["headers", "full", "off"], options: MediaOptions
) -> tuple[str | None, Facts | None]:
    """(what is wrong, to go on from the medium's name; what it is), each None where there is nothing to say.

    Raises:
        UnsupportedError: PyAV is not installed.
    """
    if level == "off":
        return None, None
    problem = check_medium(medium, level, options, options.audio_in_video)
    facts = None if problem else facts_of(medium, options)
    if level == "headers" and facts is not None and facts.codec.startswith("pcm_f"):
        problem = check_medium(medium, "full", options)  # the one kind of sound that can hold NaN; quickly decoded
    return problem, None if problem else facts


def facts_of(medium: Medium, options: MediaOptions) -> Facts | None:
    """Size and length of a medium, decoding none of it; None where its kind of object does not say."""
    try:
        if medium.kind == "image":
            return _image(medium)
        return _audio(medium) if medium.kind == "audio" else _video(medium, medium.options(options))
    except VLMGRPOError:
        raise
    except read_errors():
        return None


def _image(medium: Medium) -> Facts:
    from PIL import Image

    source = medium.source
    if not is_file(source):
        return Facts("image", *source.size)
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
        return Facts("image", *picture.size)


def _video(medium: Medium, options: MediaOptions) -> Facts | None:
    source: Any = medium.source
    if is_file(source):
        with opened(source) as container:
            stream = video_stream(container)
            width, height = stream.codec_context.width, stream.codec_context.height
            total, fps = stream.frames, float(stream.average_rate or 0)
        if not total or not fps:  # the header does not say
            clip = measure(source)
            total, fps = clip.total, clip.fps
        taken = len(frame_indices(total, total / fps, options, segment_lengths(medium)))
    elif isinstance(source, (list, np.ndarray)):
        first = source[0]
        shape = first.shape if isinstance(first, np.ndarray) else ()
        height, width = shape[:2] if shape else (0, 0)
        total, fps = len(source), float(medium.rate or medium.overrides.get("fps") or DEFAULT_FPS)
        taken = min(total, options.max_frames)
    else:
        return None
    return Facts("video", width, height, total / fps, fps, total, taken)


def _audio(medium: Medium) -> Facts | None:
    source: Any = medium.source
    if is_file(source):
        with opened(source) as container:
            stream = audio_stream(container)
            length = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
            name = stream.codec_context.name
            return Facts("audio", seconds=float(length), rate=stream.rate, channels=stream.channels, codec=name)
    if not isinstance(source, np.ndarray):
        return None
    rate = int(medium.rate or 0)
    samples = source.shape[-1]
    channels = source.shape[0] if source.ndim == 2 else 1
    return Facts("audio", seconds=samples / rate if rate else 0.0, rate=rate, channels=channels)


_WORDS = {"width": "width (pixels)", "height": "height (pixels)", "pixels": "pixels", "seconds": "length (s)"}
_WORDS |= {"fps": "frames a second", "frames": "frames", "taken": "frames taken", "media a row": "how many a row"}


class MediaTally:
    """The media of one kind: how many, in how many rows, and their sizes and lengths."""

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self.count = self.rows = 0
        self.spreads: dict[str, Spread] = {}
        self.rates: Counter[int] = Counter()
        self.channels: Counter[int] = Counter()

    def add_row(self, media: int) -> None:
        """A row with so many media of the kind."""
        if media:
            self.rows += 1
            self.count += media
            self._add("media a row", media)

    def add(self, facts: Facts) -> None:
        """One of them."""
        if facts.width:
            self._add("width", facts.width)
            self._add("height", facts.height)
            self._add("pixels", facts.width * facts.height)
        for name in ("seconds", "fps", "frames", "taken"):
            if value := getattr(facts, name):
                self._add(name, value)
        if facts.rate:
            self.rates[facts.rate] += 1
        if facts.channels:
            self.channels[facts.channels] += 1

    def _add(self, name: str, value: float) -> None:
        if name not in self.spreads:
            self.spreads[name] = Spread()
        self.spreads[name].add(value)

    def figures(self) -> Iterator[tuple[str, Spread]]:
        """(what in words, its spread), in a fixed order."""
        return ((word, self.spreads[name]) for name, word in _WORDS.items() if name in self.spreads)

    def as_dict(self) -> dict[str, Any]:
        figures: dict[str, Any] = {name: spread.as_dict() for name, spread in self.spreads.items()}
        known = {"sample_rates": self.rates, "channels": self.channels}
        return {"count": self.count, "rows": self.rows, **figures, **{k: dict(v) for k, v in known.items() if v}}
