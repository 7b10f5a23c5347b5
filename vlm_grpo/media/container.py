"""Files that hold video or sound, opened by PyAV."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from .problems import Unfit, check_file


def load_av() -> Any:
    """The PyAV module.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UnsupportedError(
            f"Videos and sounds are decoded by PyAV, which cannot be imported ({error}). Install it: pip install av."
        ) from error
    return av


@contextmanager
def opened(source: Path | bytes) -> Iterator[Any]:
    """A PyAV container for reading; raises whatever ``problems.read_errors`` lists."""
    av = load_av()
    check_file(source)
    # The "file:" keeps a name such as "a:b.mp4" from being taken for a protocol.
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}") as container:
        yield container


def video_stream(container: Any) -> Any:
    """The first stream of moving pictures; the cover of a song is none."""
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise Unfit("has no video stream" if len(container.streams) else "has no frames")
    _check(container, streams[0])
    return streams[0]


def audio_stream(container: Any) -> Any:
    """The stream that players take."""
    stream = container.streams.best("audio")
    if stream is None:
        raise Unfit("has no audio track")
    _check(container, stream)
    return stream


def _check(container: Any, stream: Any) -> None:
    """Raise where there is no decoder, and where the index (mp4, avi) points beyond the file: a torn download."""
    if stream.codec_context is None:
        raise Unfit("is torn, or of a codec that this FFmpeg cannot decode")
    entries = stream.index_entries
    if len(entries) and container.size > 0:
        last = entries[-1]
        if last.pos + last.size > container.size:
            raise Unfit(f"is truncated ({container.size} of at least {last.pos + last.size} bytes)")
