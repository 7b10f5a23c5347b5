"""The media of a row as a request carries them: bytes and what they are, within a size."""

import asyncio
import base64
import hashlib
import io
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import MediaOptions
from ...data import MEDIA_COLUMNS, to_sample
from ...errors import DataFormatError, MediaError
from ...media import Kind, Medium
from .client import Problem
from .options import ApiOptions

# What servers and browsers can show as it is.
_PICTURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}
_HERTZ, _LEAST_HERTZ = 16_000, 8_000
_QUALITY = 90
_LEAST_PIXELS = 32 * 32


@dataclass(frozen=True)
class Sent:
    """A medium in a request.

    Attributes:
        kind: ``image``, ``video`` or ``audio``.
        mime: of the file, or of each of its frames.
        files: one, or the frames of a video in order.
        whole: whether a video is one file; else it is frames.
    """

    kind: Kind
    mime: str
    files: tuple[bytes, ...]
    whole: bool = True

    @property
    def base64(self) -> list[str]:
        return [base64.b64encode(file).decode("ascii") for file in self.files]

    @property
    def hashed(self) -> list[str]:
        """What stands for it in a cache's key."""
        return [self.kind, self.mime, *(hashlib.sha256(file).hexdigest() for file in self.files)]


class MediaReader:
    """The media of each completion of a call; those of a prompt are read once for its whole group.

    Args:
        options: of the reward.
        prompts: one a completion, or None.
        columns: of the rows, one value a completion.
    """

    def __init__(self, options: ApiOptions, prompts: list[Any] | None, columns: dict[str, Any]) -> None:
        self.options, self.prompts = options, prompts
        # As lists: a column of ``datasets`` makes its values anew each time, so that one could have the identity of
        # another that is gone.
        self.columns = {name: list(columns[name]) for name in MEDIA_COLUMNS if columns.get(name) is not None}
        self._read: dict[tuple[int, ...], asyncio.Task[list[Sent]]] = {}

    async def of(self, row: int) -> list[Sent]:
        """The media of a completion's prompt, in the order of their slots.

        Raises:
            Problem: a medium that cannot be opened, or is too large.
        """
        if not self.options.send_media:
            return []
        cells = {name: values[row] for name, values in self.columns.items() if row < len(values)}
        prompt = self.prompts[row] if self.prompts else None
        same = tuple(map(id, (prompt, *cells.values())))
        if same not in self._read:
            self._read[same] = reading = asyncio.ensure_future(asyncio.to_thread(self._open, prompt, cells))
            # Taken out here as well: at a deadline nobody waits for it any more, and asyncio would complain.
            reading.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._read[same])

    def _open(self, prompt: Any, cells: dict[str, Any]) -> list[Sent]:
        root = None if self.options.media_root is None else Path(self.options.media_root).expanduser()
        row = {**cells, "prompt": prompt or [{"role": "user", "content": ""}]}
        try:
            return [_sent(medium, self.options) for medium in to_sample(row, root).media]
        except (MediaError, DataFormatError) as error:
            raise Problem("media that cannot be sent", str(error)) from error


def _sent(medium: Medium, options: ApiOptions) -> Sent:
    if medium.kind == "image":
        return _image(medium, options)
    return _audio(medium, options) if medium.kind == "audio" else _video(medium, options)


def _file(medium: Medium) -> bytes | None:
    """The bytes of a medium that is a file."""
    if isinstance(medium.source, bytes):
        return medium.source
    if isinstance(medium.source, Path):
        try:
            return medium.source.read_bytes()
        except OSError as error:
            reason = error.strerror or str(error)
            raise MediaError(f'The {medium.kind} "{medium.label}" cannot be read ({reason}).') from error
    return None


def _image(medium: Medium, options: ApiOptions) -> Sent:
    file = _file(medium)
    mime = next((mime for magic, mime in _PICTURES.items() if file and file.startswith(magic)), None)
    if file and mime and len(file) <= options.max_media_bytes:
        return Sent("image", mime, (file,))
    if file and mime and not options.downscale:
        raise _too_large(medium, options)
    image = medium.open()
    if mime is None:  # a PIL image, or a file that not every server reads: without loss where that fits
        out = io.BytesIO()
        image.save(out, "PNG")
        if out.tell() <= options.max_media_bytes:
            return Sent("image", "image/png", (out.getvalue(),))
    return Sent("image", "image/jpeg", (_jpeg(image, options, options.max_media_bytes, medium),))


def _jpeg(image: Any, options: ApiOptions, limit: int, medium: Medium) -> bytes:
    """As JPEG; of half the pixels again and again until it fits."""
    while True:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=_QUALITY)
        if out.tell() <= limit:
            return out.getvalue()
        if not options.downscale or image.width * image.height <= _LEAST_PIXELS:
            raise _too_large(medium, options)
        image = image.resize((max(1, round(image.width * 0.7071)), max(1, round(image.height * 0.7071))))


def _audio(medium: Medium, options: ApiOptions) -> Sent:
    """As it is where it is WAV or MP3, which are what chat completions take; else WAV, mono, 16 bits, 16 kHz."""
    file = _file(medium)
    if file and len(file) <= options.max_media_bytes:
        if file[:4] == b"RIFF" and file[8:12] == b"WAVE":
            return Sent("audio", "audio/wav", (file,))
        if file[:3] == b"ID3" or (file[0] == 0xFF and file[1:2] > b"\xe0" and file[1] & 0x06 == 0x02):
            return Sent("audio", "audio/mpeg", (file,))
    for hertz in (_HERTZ, _LEAST_HERTZ) if options.downscale else (_HERTZ,):
        written = _wave(medium, hertz)
        if len(written) <= options.max_media_bytes:
            return Sent("audio", "audio/wav", (written,))
    raise _too_large(medium, options)


def _wave(medium: Medium, hertz: int) -> bytes:
    import numpy as np

    samples = (np.clip(medium.open_audio(hertz), -1, 1) * 32767).round().astype("<i2")
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(hertz)
        file.writeframes(samples.tobytes())
    return out.getvalue()


def _video(medium: Medium, options: ApiOptions) -> Sent:
    """The file, where the scoring protocol is to carry it and it fits; else frames as JPEG, evenly spread."""
    file = _file(medium) if options.protocol == "scores" else None
    if file and len(file) <= options.max_media_bytes:
        return Sent("video", _video_mime(file), (file,))
    if file and not options.downscale:
        raise _too_large(medium, options)
    from PIL import Image

    most = options.video_frames
    clip = medium.open_video(MediaOptions(min_frames=most, max_frames=most))
    share = max(1, options.max_media_bytes // max(1, len(clip.frames)))
    frames = tuple(_jpeg(Image.fromarray(frame), options, share, medium) for frame in clip.frames)
    return Sent("video", "image/jpeg", frames, whole=False)


def _video_mime(file: bytes) -> str:
    if file[:4] == b"\x1aE\xdf\xa3":
        return "video/webm"
    return "video/x-msvideo" if file[:4] == b"RIFF" else "video/mp4"


def _too_large(medium: Medium, options: ApiOptions) -> Problem:
    return Problem("media too large", f'the {medium.kind} "{medium.label}", max_media_bytes={options.max_media_bytes}')
