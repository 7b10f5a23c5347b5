"""Small media files, written for the tests: every video frame says its number, every sound is a sine."""

import io
import struct
import wave
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def numbered_frame(number: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """(H, W, 3) uint8: the left half's grey is the number's sixteens, the right half's its ones; below 256."""
    width, height = size
    frame = np.full((height, width, 3), 16 * (number // 16), np.uint8)
    frame[:, width // 2 :] = 16 * (number % 16)
    return frame


def number_of(frame: np.ndarray) -> int:
    """The number that a frame says, whatever codec and size it went through."""
    height, width = frame.shape[:2]
    rows = slice(height // 4, height - height // 4)
    left = frame[rows, width // 8 : width * 3 // 8].mean()
    right = frame[rows, width * 5 // 8 : width * 7 // 8].mean()
    return 16 * round(left / 16) + round(right / 16)


def sine(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    """(samples,) float32, half of full scale."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def write_video(
    path: Path,
    frames: int = 40,
    fps: int | Fraction = 10,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    gop: int | None = None,
    audio: np.ndarray | None = None,
    audio_rate: int = 16000,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """A clip of numbered frames; the suffix names the container. ``audio`` is (samples,), an AAC track."""
    with av.open(str(path), "w", options=container or {}) as out:
        video = out.add_stream(codec, rate=fps, options=options or {})
        video.width, video.height = size
        video.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if gop:
            video.gop_size = gop
        if rotation:
            video.set_display_rotation(rotation)
        sound = out.add_stream("aac", rate=audio_rate, layout="mono") if audio is not None else None
        out.start_encoding()  # a file even of no frames
        for number in range(frames):
            out.mux(video.encode(av.VideoFrame.from_ndarray(numbered_frame(number, size), "rgb24")))
        out.mux(video.encode(None))
        if sound is not None:
            _write_audio(out, sound, audio, audio_rate)
    return path


def write_audio(path: Path, samples: np.ndarray, rate: int = 16000, codec: str = "aac") -> Path:
    """A compressed sound of (samples,) float32."""
    with av.open(str(path), "w") as out:
        _write_audio(out, out.add_stream(codec, rate=rate, layout="mono"), samples, rate)
    return path


def _write_audio(out, stream, samples: np.ndarray, rate: int) -> None:
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None], np.float32), "fltp", "mono")
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    resampler = av.AudioResampler(
        stream.format, stream.layout, rate, frame_size=stream.codec_context.frame_size or None
    )
    for piece in [*resampler.resample(frame), *resampler.resample(None)]:
        out.mux(stream.encode(piece))
    out.mux(stream.encode(None))


def write_wav(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    """A 16-bit wave file of (samples,) or (channels, samples) floats."""
    samples = np.atleast_2d(samples)
    with wave.open(str(path), "wb") as out:
        out.setnchannels(len(samples))
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((samples.T * 32767).round().astype("<i2").tobytes())
    return path


def write_float_wav(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    """A 32-bit float wave file of (samples,): the kind that can hold NaN. The standard library writes none."""
    data = samples.astype("<f4").tobytes()
    format = struct.pack("<HHIIHH", 3, 1, rate, 4 * rate, 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(format)) + format + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end
