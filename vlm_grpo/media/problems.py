"""What keeps a medium from being used, in a few words; and one error for whatever Pillow and FFmpeg raise."""

import stat
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..errors import MediaError, VLMGRPOError
from .medium import Medium, refuse


class Unfit(Exception):
    """A medium that cannot be used. The text goes on from the medium's name: ``has no frames``."""


# What the two libraries let through on damaged files, beside their own errors.
_ERRORS: tuple[type[BaseException], ...] = (
    *(Unfit, OSError, ValueError, SyntaxError, EOFError, LookupError, ArithmeticError, MemoryError, RuntimeError),
    *(TypeError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning),
)


def read_errors() -> tuple[type[BaseException], ...]:
    """The exceptions that speak of a medium. PyAV's base class is one of them once PyAV is imported."""
    known = getattr(sys.modules.get("av"), "FFmpegError", None)  # absent too while another thread imports it
    return _ERRORS if known is None else (*_ERRORS, known)


@contextmanager
def reading(medium: Medium) -> Iterator[None]:
    """Raise what goes wrong inside as one ``MediaError`` that names the medium and its row."""
    try:
        yield
    except VLMGRPOError:
        raise
    except FileNotFoundError as error:
        raise MediaError(f'The {medium.kind} "{medium.label}" does not exist{medium.at}. Correct the path.') from error
    except read_errors() as error:
        raise refuse(medium, f"it {error}" if isinstance(error, Unfit) else reason(error)) from error


def problem(error: BaseException) -> str:
    """What is wrong, to go on from the medium's name: ``has no frames``, ``cannot be read (Permission denied)``."""
    if isinstance(error, Unfit):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    return f"cannot be read ({reason(error)})"


def reason(error: BaseException) -> str:
    """A library's error in one short line, without the path (the medium's name is said already)."""
    name = type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture that Pillow knows"
    if name == "InvalidDataError":
        return "it is damaged, or no sound or video that FFmpeg knows"
    if isinstance(error, EOFError):
        return "it is torn: its end is missing"
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:200].rstrip(".") or name


def check_file(source: Path | bytes) -> None:
    """Raise on what no library says well: a folder, an empty file, a pipe (opening one would wait for ever)."""
    if isinstance(source, bytes):
        size = len(source)
    else:
        status = source.stat()
        if stat.S_ISDIR(status.st_mode):
            raise Unfit("is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise Unfit("is not a regular file")
        size = status.st_size
    if not size:
        raise Unfit("is empty (0 bytes)")


def is_file(source: Any) -> bool:
    """A path or the bytes of a file, and no object in memory."""
    return isinstance(source, (Path, bytes))
