"""Whatever a row may hold for a medium, as what ``Medium`` keeps: a path, bytes, a picture, an array or frames."""

import base64
import binascii
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from ..errors import MediaError
from .medium import Kind

_GIVE = {
    "image": "a path, bytes, a PIL image or an array of (height, width, 3)",
    "video": "a path, bytes, a list of frames or an array of (frames, height, width, 3)",
    "audio": "a path, bytes or an array of (samples,) or (channels, samples)",
}


def to_source(value: Any, kind: Kind, root: Path | None = None, where: str = "") -> tuple[Any, float | None]:
    """(source, rate) of a ``Medium``; nothing is opened or decoded.

    Args:
        value: a path, which starts from ``root`` where it is relative, or a ``file://`` or ``data:`` address; bytes;
            a PIL image; an array or tensor (pictures also with channels first, where no doubt is left); a list of
            frames for a video; a cell of a ``datasets`` Image, Video or Audio column, decoded or not, or a torchcodec
            decoder.
        where: how the user finds the row again.

    Raises:
        MediaError: the value is none of these.
    """
    if hasattr(value, "_hf_encoded"):  # a decoder that datasets made: what it was made from stays lazy
        value = value._hf_encoded
    if isinstance(value, dict):
        return _from_dict(value, kind, root, where)
    if isinstance(value, (str, Path)):
        return _path(value, kind, root, where), None
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value), None
    if kind == "video" and hasattr(value, "get_frames_at") or kind == "audio" and hasattr(value, "get_all_samples"):
        return value, None
    array = _array(value)
    if array is not None:
        return _shaped(array, kind, where), None
    if kind == "image" and hasattr(value, "convert") and hasattr(value, "size"):
        return value, None
    if kind == "video" and isinstance(value, (list, tuple)):
        return [to_source(frame, "image", root, where)[0] for frame in value], None
    raise _wrong(value, f"is of type {type(value).__name__}", kind, where)


def _wrong(value: Any, what: str, kind: Kind, where: str) -> MediaError:
    article = "An" if kind[0] in "aeiou" else "A"
    return MediaError(f"{article} {kind} must be {_GIVE[kind]}, but this one {what}{_at(where)}. Give one of these.")


def _at(where: str) -> str:
    return f" — {where}" if where else ""


def _from_dict(value: dict[str, Any], kind: Kind, root: Path | None, where: str) -> tuple[Any, float | None]:
    """``{"bytes", "path"}`` or, of a decoded sound, ``{"array", "sampling_rate"}``."""
    if kind == "audio" and value.get("array") is not None:
        rate = value.get("sampling_rate")
        array = _array(value["array"])
        return _shaped(np.asarray(value["array"]) if array is None else array, kind, where), rate and float(rate)
    for key in ("bytes", "path"):
        if value.get(key) is not None:
            return to_source(value[key], kind, root, where)
    raise _wrong(value, f'is a dict of {sorted(value) or "nothing"} without "bytes" or "path"', kind, where)


def _path(value: str | Path, kind: Kind, root: Path | None, where: str) -> Path | bytes:
    text = str(value)
    shown = text if len(text) <= 100 else text[:97] + "..."
    if not text.strip():
        raise MediaError(f"The path of {'an' if kind[0] in 'aeiou' else 'a'} {kind} is empty{_at(where)}. Fill it in.")
    if isinstance(value, str) and value.startswith("data:"):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise MediaError(f'The {kind} "{shown}" is not base64 ({error}){_at(where)}. Correct it.') from error
    if isinstance(value, str) and value.startswith("file://"):
        value = unquote(urlsplit(value).path)
    elif isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", value):
        raise MediaError(
            f'The {kind} "{shown}" is a network address, and those are not fetched{_at(where)}. '
            "Download it first, and give the file's path."
        )
    path = Path(value)
    path = path.expanduser() if path.parts[:1] == ("~",) else path  # a file may be called ~draft.png
    return path if root is None or path.is_absolute() else root / path


def _array(value: Any) -> np.ndarray | None:
    """A numpy array or a torch tensor (by its methods: torch stays unloaded) as an array that shares its memory."""
    if isinstance(value, np.ndarray):
        return value
    if not (hasattr(value, "detach") and hasattr(value, "is_floating_point")):
        return None
    tensor = value.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _shaped(array: np.ndarray, kind: Kind, where: str) -> Any:
    from .image import channels_last, to_image
    from .problems import Unfit

    shape = "x".join(map(str, array.shape))
    if kind == "audio" and array.ndim in (1, 2):
        # soundfile gives (samples, channels). No sound has more channels than samples.
        return array.T if array.ndim == 2 and array.shape[1] <= 8 < array.shape[0] else array
    if kind == "video" and array.ndim == 4 and (frames := channels_last(array)) is not None:
        return frames
    if kind == "image" and array.ndim in (2, 3):
        pixels = array if array.ndim == 2 else channels_last(array)
        if pixels is not None:
            try:
                return to_image(pixels)
            except Unfit as error:
                raise _wrong(array, str(error), kind, where) from error
    raise _wrong(array, f"is an array of {shape or 'no dimensions'}", kind, where)
