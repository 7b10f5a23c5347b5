"""Small copies of media that a browser shows: for every page that this package writes (``data inspect``, reports).

All of them are files in memory, ``(data, mime)``, to be written beside a page or put into it as ``uri``. Whatever
cannot be opened raises ``MediaError``, as everywhere.
"""

import base64
import io
import wave
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..config import MediaOptions
from .container import opened
from .medium import Medium, Video
from .problems import is_file, read_errors

_SUFFIXES = {
    **{"image/png": ".png", "image/jpeg": ".jpg", "audio/wav": ".wav"},
    **{"video/mp4": ".mp4", "video/webm": ".webm"},
}
_QUALITY = 85
# What Chromium, Firefox and Safari all play, by the container's first name at FFmpeg.
_PLAYED = {
    "mov": ("video/mp4", ("h264",), ("aac", "mp3")),
    "matroska": ("video/webm", ("vp8", "vp9"), ("opus", "vorbis")),
}


class Preview(NamedTuple):
    """A file in memory, and its type."""

    data: bytes
    mime: str

    @property
    def uri(self) -> str:
        """As the address of a picture or player inside a page."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"

    @property
    def suffix(self) -> str:
        """Of a file's name, such as ``.png``."""
        return _SUFFIXES[self.mime]


def preview_image(medium: Medium, max_side: int = 480, options: MediaOptions | None = None) -> Preview:
    """The picture as the model gets it, no side above ``max_side`` pixels; small ones are not enlarged.

    PNG where that is no larger than JPEG (drawings, text, small pictures), JPEG otherwise.
    """
    return preview_picture(medium.open(options), max_side)


def preview_picture(picture: Image.Image, max_side: int = 480) -> Preview:
    """As ``preview_image``, of an RGB picture that is open already."""
    picture = picture.copy()
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    png = _saved(picture, "PNG", optimize=True)
    jpeg = _saved(picture, "JPEG", quality=_QUALITY)
    return Preview(png, "image/png") if len(png) <= len(jpeg) else Preview(jpeg, "image/jpeg")


def preview_video(
    medium: Medium | Video, height: int = 120, columns: int = 8, options: MediaOptions | None = None
) -> Preview:
    """The frames that the model gets, ``columns`` a line, each at most ``height`` pixels high."""
    video = medium if isinstance(medium, Video) else medium.open_video(options)
    frames = [Image.fromarray(frame) for frame in np.ascontiguousarray(video.frames)]
    for frame in frames:
        frame.thumbnail((2 * height, height), Image.Resampling.LANCZOS)
    gap, columns = 2, min(columns, len(frames))
    width, high = frames[0].size
    lines = -(-len(frames) // columns)
    # Transparent between the frames: the page may be light or dark.
    strip = Image.new("RGBA", (columns * (width + gap) - gap, lines * (high + gap) - gap))
    for number, frame in enumerate(frames):
        strip.paste(frame, ((number % columns) * (width + gap), (number // columns) * (high + gap)))
    png = _saved(strip, "PNG", optimize=True)
    if len(frames) == columns * lines and len(png) > 100_000:
        jpeg = _saved(_on_grey(strip), "JPEG", quality=_QUALITY)
        return Preview(jpeg, "image/jpeg")
    return Preview(png, "image/png")


def preview_sound(
    medium: Medium, max_seconds: float = 30.0, rate: int = 16000, options: MediaOptions | None = None
) -> Preview:
    """The first ``max_seconds`` as the model hears them: mono, ``rate`` samples a second, a WAV file of 16 bits."""
    return preview_samples(medium.open_audio(rate, options), rate, max_seconds)


def preview_samples(samples: np.ndarray, rate: int, max_seconds: float = 30.0) -> Preview:
    """As ``preview_sound``, of (samples,) floats in [-1, 1] that are decoded already; what exceeds that is clipped."""
    kept = np.clip(samples[: round(max_seconds * rate)], -1, 1)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((kept * 32767).round().astype("<i2").tobytes())
    return Preview(buffer.getvalue(), "audio/wav")


def playable(medium: Medium, max_bytes: int = 4_000_000) -> Preview | None:
    """A video's own file where every browser plays it (H.264 in mp4, VP8 or VP9 in webm) and it is small; else None."""
    source = medium.source
    if not is_file(source):
        return None
    try:
        if (len(source) if isinstance(source, bytes) else source.stat().st_size) > max_bytes:
            return None
        with opened(source) as container:
            mime, *known = _PLAYED.get(container.format.name.partition(",")[0], ("", (), ()))
            streams = [(s.codec_context.name if s.codec_context else "", s) for s in container.streams]
            names = {kind: [name for name, s in streams if s.type == kind] for kind in ("video", "audio")}
            pictures = all(s.codec_context.pix_fmt in ("yuv420p", "yuvj420p") for s in container.streams.video)
    except read_errors():
        return None
    fits = names["video"] and all(set(names[kind]) <= set(codecs) for kind, codecs in zip(names, known, strict=True))
    if not mime or not fits or not pictures:
        return None
    return Preview(source if isinstance(source, bytes) else source.read_bytes(), mime)


def _saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _on_grey(strip: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", strip.size, "#808080"), strip).convert("RGB")
