"""Is a medium fit for training? Asked of every one before it starts: by its header, or by decoding it whole."""

import io
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageFile

from ..config import MediaOptions
from ..errors import DataFormatError, UnsupportedError
from .audio import read_audio
from .container import audio_stream, opened, video_stream
from .frames import spread
from .image import check_size, eight_bits, read_image
from .medium import Medium
from .problems import Unfit, check_file, is_file, problem, read_errors
from .video import decode_whole, read_video, segment_lengths

# What a sound is decoded at where no model asks: it is only looked through.
_RATE = 16000
# Cameras append previews and whole videos to a JPEG; its end marker is first looked for in so many last bytes.
_TAIL = 1024


def check_medium(
    medium: Medium, level: Literal["headers", "full"], options: MediaOptions, audio_in_video: bool = False
) -> str | None:
    """What is wrong, to go on from the medium's name (``does not exist``, ``has no frames``), or None.

    ``headers`` opens the file, reads format, size, streams and whether its end is there; ``full`` decodes it whole.
    Arrays in memory are looked through by both.

    Args:
        options: of the run; the medium's own come on top.
        audio_in_video: a video needs an audio track too.

    Raises:
        UnsupportedError: PyAV is not installed.
    """
    try:
        options = medium.options(options)
        if medium.kind == "image":
            (_image_header if level == "headers" else read_image)(medium.source, options)
        elif medium.kind == "audio":
            _check_audio(medium, level, options)
        else:
            _check_video(medium, level, options, audio_in_video)
    except UnsupportedError:
        raise
    except DataFormatError as error:
        return f"has options that cannot be ({error})"
    except read_errors() as error:
        return problem(error)
    return None


def _check_audio(medium: Medium, level: str, options: MediaOptions) -> None:
    source = medium.source
    if not is_file(source):
        if level == "full" or isinstance(source, np.ndarray):
            read_audio(source, None if level == "headers" else medium.rate, options, _RATE)
    elif level == "full":
        read_audio(source, medium.rate, options, _RATE)
    else:
        with opened(source) as container:
            _has_packets(container, audio_stream(container), "samples")


def _check_video(medium: Medium, level: str, options: MediaOptions, heard: bool) -> None:
    source = medium.source
    segment_lengths(medium)
    if not is_file(source):
        if level == "full":
            read_video(medium, options)
        elif isinstance(source, list):
            _frame_headers(source, options)
        elif hasattr(source, "shape"):
            _array_header(source)
        elif not source.metadata.num_frames:
            raise Unfit("has no frames")
        if heard:
            raise Unfit("has no audio track")
        return
    if level == "full":
        decode_whole(source)
        if heard:
            read_audio(source, None, options, _RATE)
        return
    with opened(source) as container:
        stream = video_stream(container)
        check_size(stream.codec_context.width, stream.codec_context.height)
        if heard:
            audio_stream(container)
        _has_packets(container, stream, "frames")


def _has_packets(container: Any, stream: Any, what: str) -> None:
    if not any(packet.size for packet in container.demux(stream)):
        raise Unfit(f"has no {what}")


def _frame_headers(frames: list[Any], options: MediaOptions) -> None:
    if not frames:
        raise Unfit("has no frames")
    for index in spread(len(frames), min(len(frames), options.max_frames)):  # no other is ever opened
        try:
            _image_header(frames[index], options)
        except read_errors() as error:
            name = f' ("{frames[index]}")' if isinstance(frames[index], Path) else ""
            raise Unfit(f"has a frame, number {index}{name}, that {problem(error)}") from error


def _array_header(frames: np.ndarray) -> None:
    if not len(frames):
        raise Unfit("has no frames")
    check_size(frames.shape[2], frames.shape[1])
    if frames.dtype.kind == "f" and not np.isfinite(frames).all():
        raise Unfit("holds NaN or infinite pixels")


def _image_header(source: Any, options: MediaOptions) -> None:
    if isinstance(source, np.ndarray):
        eight_bits(source)
    elif not is_file(source):
        check_size(*source.size)
        if source.mode == "F":
            eight_bits(np.asarray(source))
    else:
        check_file(source)
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            with Image.open(file) as image:
                check_size(*image.size)
                whole = ImageFile.LOAD_TRUNCATED_IMAGES or _ends(file, image.format or "")
            if not whole:  # an unusual end, or a missing one: the decoder knows
                read_image(source, options)


def _ends(file: BinaryIO, format: str) -> bool:
    """Does the file go on to its format's end marker, or to the length that its header says? True where unknown."""
    size = file.seek(0, io.SEEK_END)
    if format in ("JPEG", "MPO"):
        return _jpeg_ends(file, size)
    file.seek(0)
    head = file.read(12)
    if format == "PNG":
        file.seek(max(0, size - 12))
        return file.read(8)[4:] == b"IEND"
    if format == "GIF":
        file.seek(size - 1)
        return file.read(1) == b";"
    if format == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    if format == "BMP":
        return int.from_bytes(head[2:6], "little") <= size
    return format != "TIFF"


def _jpeg_ends(file: BinaryIO, size: int) -> bool:
    """Is there an end marker after the picture's data? One before it belongs to the thumbnail."""
    start, marker = 2, b""
    while marker != b"\xff\xda":
        file.seek(start)
        marker = file.read(2)
        length = int.from_bytes(file.read(2), "big")
        if marker[:1] != b"\xff" or length < 2:
            return False
        start += 2 + length
    for begin in (max(start, size - _TAIL), start):
        file.seek(begin)
        if b"\xff\xd9" in file.read():
            return True
    return False
