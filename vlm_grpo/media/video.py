"""Videos: a clip is measured without decoding, then only the chosen frames are kept."""

import random
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MediaOptions
from .container import opened, video_stream
from .frames import frame_indices, spread
from .image import channels_last, check_size, eight_bits, fit, read_image, to_image
from .medium import Medium, Video
from .problems import Unfit, is_file, problem, read_errors, reading

# Of frames that come without one; Qwen's processors assume the same.
DEFAULT_FPS = 2.0


@dataclass(frozen=True)
class Clip:
    """What the packets of a clip tell, without decoding one.

    Attributes:
        total: its number of frames.
        duration: ``total / fps`` seconds: a sound may be longer, and a header wrong.
        fps: frames a second, on average where the rate varies.
        times: each frame's presentation time, in the stream's unit; empty where the container does not give them.
        keys: the numbers of the frames that decoding can start from.
    """

    total: int
    duration: float
    fps: float
    times: list[int]
    keys: list[int]


class _Lost(Exception):
    """The frames do not come at the times that their packets announced."""


def open_video(medium: Medium, options: MediaOptions, draw: random.Random | None = None) -> Video:
    """The frames of a clip that ``frames.frame_indices`` chooses, upright RGB within the pixel bounds.

    A list or an array of frames was chosen already by the user: it is only thinned, evenly, to ``max_frames``. Its
    rate is the medium's ``rate``, or its row's ``fps``, or 2 frames a second.

    Raises:
        MediaError: missing, empty, torn, damaged, or without frames.
        UnsupportedError: PyAV is not installed.
    """
    with reading(medium):
        return read_video(medium, options, draw)


def read_video(medium: Medium, options: MediaOptions, draw: random.Random | None = None) -> Video:
    """``open_video`` without the medium's name: raises whatever ``problems.read_errors`` lists."""
    frame_cnts = segment_lengths(medium)
    if is_file(medium.source):
        return _from_file(medium.source, options, frame_cnts, draw)
    if hasattr(medium.source, "get_frames_at"):
        return _from_decoder(medium.source, options, frame_cnts, draw)
    return _from_frames(medium, options)


def segment_lengths(medium: Medium) -> list[int] | None:
    """The row's ``frame_cnts``, checked."""
    lengths = medium.overrides.get("frame_cnts")
    if lengths is None:
        return None
    lengths = list(lengths) if hasattr(lengths, "__iter__") else [lengths]
    if not lengths or not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in lengths):
        raise Unfit(f"has frame_cnts={lengths}, which must be whole numbers above 0")
    return [int(n) for n in lengths]


def _from_file(
    source: Path | bytes, options: MediaOptions, frame_cnts: list[int] | None, draw: random.Random | None
) -> Video:
    clip = measure(source)
    indices = frame_indices(clip.total, clip.duration, options, frame_cnts, draw)
    try:
        frames = list(_jump(source, clip, indices, options))
    except _Lost:
        frames, total = _walk(source, indices, options)
        if len(frames) < len(indices):  # fewer can be decoded than the packets announced
            if not total:
                raise Unfit("has no frames that can be decoded") from None
            clip = Clip(total, total / clip.fps, clip.fps, [], [])
            indices = frame_indices(total, clip.duration, options, frame_cnts, draw)
            frames, _ = _walk(source, indices, options)
    return Video(np.stack(frames), indices, clip.total, clip.fps, clip.duration)


def measure(source: Path | bytes) -> Clip:
    """Count and time the frames by reading the packets: headers may say nothing, or not the truth."""
    times, keys, total = [], [], 0
    with opened(source) as container:
        stream, _ = _prepared(container, MediaOptions())
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            total += 1
            if packet.pts is not None:
                times.append(packet.pts)
                keys += [packet.pts] if packet.is_keyframe else []
        rate = Fraction(stream.average_rate or stream.guessed_rate or 0)
        unit = Fraction(stream.time_base)
    if not total:
        raise Unfit("has no frames")
    times = sorted(set(times))
    if len(times) < total:
        times, keys = [], []
    elif total > 1:
        seen = (total - 1) / ((times[-1] - times[0]) * unit)
        # Files that browsers record announce 1000 frames a second; times rounded to milliseconds are a little off.
        rate = rate if rate and abs(seen / rate - 1) < Fraction(1, 10) else seen
    rate = rate or Fraction(DEFAULT_FPS)
    number = {time: number for number, time in enumerate(times)}
    return Clip(total, float(total / rate), float(rate), times, sorted(number[key] for key in keys))


def _jump(source: Path | bytes, clip: Clip, indices: list[int], options: MediaOptions) -> Iterator[np.ndarray]:
    """Decode from the last key frame before each wanted frame, and know frames by their times."""
    if not clip.times:
        raise _Lost
    with opened(source) as container:
        stream, size = _prepared(container, options)
        frames, following = container.decode(stream), 0  # following: the number of the frame that comes next
        for index in indices:
            key = clip.keys[bisect_right(clip.keys, index) - 1] if clip.keys and clip.keys[0] <= index else 0
            if key > following:
                container.seek(clip.times[key], stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                if frame.pts is None or frame.pts > clip.times[index]:
                    raise _Lost
                if frame.pts == clip.times[index]:
                    yield _pixels(frame, size)
                    break
            else:
                raise _Lost
            following = index + 1


def _walk(source: Path | bytes, indices: list[int], options: MediaOptions) -> tuple[list[np.ndarray], int]:
    """Decode from the start and count: (the wanted frames, the number of frames seen)."""
    wanted, found, seen = set(indices), [], 0
    with opened(source) as container:
        stream, size = _prepared(container, options)
        for frame in container.decode(stream):
            if seen in wanted:
                found.append(_pixels(frame, size))
            seen += 1
            if len(found) == len(indices):
                break
    return found, seen


def decode_whole(source: Path | bytes) -> None:
    """Decode every frame and keep none; raises like ``read_video``."""
    with opened(source) as container:
        stream, _ = _prepared(container, MediaOptions())
        if not sum(1 for _ in container.decode(stream)):
            raise Unfit("has no frames that can be decoded")


def _prepared(container: Any, options: MediaOptions) -> tuple[Any, tuple[int, int]]:
    stream = video_stream(container)
    stream.thread_type = "AUTO"
    width, height = stream.codec_context.width, stream.codec_context.height
    check_size(width, height)
    return stream, fit(width, height, options)


def _pixels(frame: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8, scaled by FFmpeg before a full-size RGB copy exists, and turned as its telephone was held."""
    # One thread: FFmpeg would start one a core for every frame, which takes longer than the scaling itself.
    options: dict[str, Any] = {"format": "rgb24", "interpolation": "BICUBIC", "threads": 1}
    rgb = frame.reformat(width=size[0], height=size[1], **options).to_ndarray()
    return np.rot90(rgb, round(frame.rotation / 90)) if frame.rotation else rgb


def _from_decoder(
    decoder: Any, options: MediaOptions, frame_cnts: list[int] | None, draw: random.Random | None
) -> Video:
    """A torchcodec ``VideoDecoder``, as ``datasets`` gives for a Video column."""
    facts = decoder.metadata
    total = facts.num_frames or 0
    if not total:
        raise Unfit("has no frames")
    fps = float(facts.average_fps or DEFAULT_FPS)
    duration = float(getattr(facts, "duration_seconds", None) or total / fps)
    indices = frame_indices(total, duration, options, frame_cnts, draw)
    data = channels_last(np.asarray(decoder.get_frames_at(indices).data))
    if data is None:
        raise Unfit("is decoded to frames of neither 1, 3 nor 4 channels")
    return Video(_stack(list(data), options), indices, total, fps, duration)


def _from_frames(medium: Medium, options: MediaOptions) -> Video:
    source, total = medium.source, len(medium.source)
    if not total:
        raise Unfit("has no frames")
    indices = spread(total, min(total, options.max_frames))
    fps = float(medium.rate or medium.overrides.get("fps") or DEFAULT_FPS)
    chosen = [source[i] for i in indices] if isinstance(source, list) else list(eight_bits(source[indices]))
    return Video(_stack(chosen, options, indices), indices, total, fps, total / fps)


def _stack(frames: list[Any], options: MediaOptions, indices: list[int] | None = None) -> np.ndarray:
    """(F, H, W, 3) uint8 of arrays, pictures, paths or bytes."""
    pictures = []
    for frame, index in zip(frames, indices or range(len(frames)), strict=True):
        try:
            picture = read_image(to_image(frame) if isinstance(frame, np.ndarray) else frame, options)
        except read_errors() as error:
            name = f' ("{frame}")' if isinstance(frame, Path) else ""
            raise Unfit(f"has a frame, number {index}{name}, that {problem(error)}") from error
        if pictures and picture.size != (pictures[0].shape[1], pictures[0].shape[0]):
            first = f"{pictures[0].shape[1]}x{pictures[0].shape[0]}"
            raise Unfit(f"has frames of different sizes ({first} and {picture.width}x{picture.height})")
        pictures.append(np.asarray(picture))
    return np.stack(pictures)
