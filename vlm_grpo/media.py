"""One medium of a prompt: a lazy image that is opened when a step needs it and never copied."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image


# Pillow clips them to 0..255 without a word: a 16-bit scan becomes a white picture.
_WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class Medium:
    """An image by path, bytes or PIL object.

    Two media are the same only if they are the same object: identity is what lets the completions of a group share
    one encoding.

    Args:
        source: a path, the bytes of an image file, or a PIL image.
        where: how the user finds it again in an error message, such as ``train.jsonl row 17``.
    """

    kind: Literal["image"] = "image"
    __slots__ = ("source", "where")

    def __init__(self, source: "str | Path | bytes | Image", where: str = "") -> None:
        self.source = source
        self.where = where

    @classmethod
    def of(cls, value: Any, root: Path | None = None, where: str = "") -> "Medium":
        """Wrap whatever a row may hold: a path (relative to ``root``), bytes, a PIL image, datasets' bytes/path dict.

        Raises:
            MediaError: the value is none of these.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, dict):  # datasets' undecoded form
            value = next((value[key] for key in ("bytes", "path") if value.get(key) is not None), value)
        if isinstance(value, (str, Path)):
            path = Path(value).expanduser()
            return cls(path if root is None or path.is_absolute() else root / path, where)
        if isinstance(value, (bytes, bytearray)):
            return cls(bytes(value), where)
        if hasattr(value, "convert") and hasattr(value, "size"):
            return cls(value, where)
        raise MediaError(
            f"An image must be a path, bytes or a PIL image, but this one is of type {type(value).__name__}"
            f"{f' — {where}' if where else ''}. Give one of these three."
        )

    @property
    def label(self) -> str:
        """A short name for logs: the path, or the kind of data in memory."""
        if isinstance(self.source, Path):
            return str(self.source)
        if isinstance(self.source, bytes):
            return f"<{len(self.source)} bytes>"
        width, height = self.source.size  # type: ignore[union-attr]
        return f"<image {width}x{height}>"

    def open(self) -> "Image":
        """Decode to an upright RGB image.

        Raises:
            MediaError: missing, empty, truncated, not an image, or of more than 8 bits a channel.
        """
        from PIL import Image, ImageOps

        suffix = f" — {self.where}" if self.where else ""
        try:
            if isinstance(self.source, (Path, bytes)):
                with Image.open(self.source if isinstance(self.source, Path) else io.BytesIO(self.source)) as file:
                    image = ImageOps.exif_transpose(file)
            else:
                image: Any = self.source
            if image.mode in _WIDE_MODES:
                raise ValueError(f"its pixels are of mode {image.mode}, wider than 8 bits, and would be clipped")
            return image.convert("RGB")
        except FileNotFoundError as error:
            raise MediaError(f'The image "{self.label}" does not exist{suffix}. Correct the path.') from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = str(error).rstrip(".")
            raise MediaError(
                f'The image "{self.label}" cannot be read ({reason}){suffix}. Replace it or remove the row.'
            ) from error

    def __deepcopy__(self, memo: dict) -> "Medium":
        # TRL deep-copies every prompt, G times a step.
        return self

    def __repr__(self) -> str:
        return f"Medium({self.label})"
