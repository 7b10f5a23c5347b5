"""Pictures: whatever the file holds becomes upright RGB of 8 bits within the pixel bounds."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from ..config import MediaOptions
from .medium import Medium
from .problems import Unfit, check_file, reading

# Pillow's convert("RGB") clips them to 0..255 without a word: a 16-bit scan becomes a white picture.
_WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_FILTER = Image.Resampling.BICUBIC


def open_image(medium: Medium, options: MediaOptions) -> Image.Image:
    """The picture as upright RGB whose width * height lies within ``min_pixels`` and ``max_pixels``.

    Transparent pictures are laid on white, as browsers and viewers show them; dropping the alpha channel would uncover
    whatever colour lies under transparent pixels, often black on black.

    Raises:
        MediaError: missing, empty, truncated, a decompression bomb, of 0 pixels, or no image.
    """
    with reading(medium):
        return read_image(medium.source, options)


def read_image(source: "Path | bytes | Image.Image", options: MediaOptions) -> Image.Image:
    """``open_image`` without the medium's name: raises whatever ``problems.read_errors`` lists."""
    if isinstance(source, (Path, bytes)):
        check_file(source)
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as file:
            check_size(*file.size)
            if file.format == "JPEG" and options.max_pixels:
                # The decoder halves a photograph for a third of the time; bicubic still has a factor 2 to filter.
                width, height = fit(*file.size, options)
                file.draft(None, (2 * width, 2 * height))
            file.load()
            ImageOps.exif_transpose(file, in_place=True)
            return resize(to_rgb(file), options)
    if isinstance(source, ImageFile.ImageFile):  # straight from Image.open, which turns nothing
        check_size(*source.size)
        source = ImageOps.exif_transpose(source)
    return resize(to_rgb(source), options)


def check_size(width: int, height: int) -> None:
    """Raise on 0 pixels, and on more than ``PIL.Image.MAX_IMAGE_PIXELS`` (None: any), at which Pillow only warns."""
    if width < 1 or height < 1:
        raise Unfit(f"has 0 pixels ({width}x{height})")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise Unfit(
            f"has {width}x{height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS = {limit} (a decompression bomb?)"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image; transparency becomes white, more than 8 bits a channel are scaled by ``eight_bits``."""
    if not (image.width and image.height):
        raise Unfit(f"has 0 pixels ({image.width}x{image.height})")
    if image.mode in _WIDE_MODES:
        return Image.fromarray(eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def eight_bits(values: np.ndarray) -> np.ndarray:
    """uint8 of the same shape: scaled, never clipped.

    16-bit unsigned values are divided by 257, so that 65535 becomes 255. Other numbers have no stated depth: their
    white is the smallest of 1 (floats only), 255 and 65535 that none exceeds, or their largest value; negative numbers
    move black down to the smallest value.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "uif":
        raise Unfit(f"holds {values.dtype} values, which are no pixels")
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if not values.size:
        return values.astype(np.uint8)
    low, high = float(min(values.min(), 0)), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise Unfit("holds NaN or infinite pixels")
    if low == 0:
        whites = (1, 255, 65535) if values.dtype.kind == "f" else (255, 65535)
        high = next((white for white in whites if high <= white), high)
    return np.rint((values.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)


def to_image(values: np.ndarray) -> Image.Image:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) numbers as a picture."""
    values = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
    if not values.size:
        return Image.new("RGB", (values.shape[1], values.shape[0]))
    return Image.fromarray(np.ascontiguousarray(eight_bits(values)))


def channels_last(values: np.ndarray) -> np.ndarray | None:
    """(..., H, W, C) of an array that may be (..., C, H, W), as torch has it; None where neither has 1, 3 or 4."""
    if values.shape[-1] in (1, 3, 4):
        return values
    return np.moveaxis(values, -3, -1) if values.shape[-3] in (1, 3, 4) else None


def resize(image: Image.Image, options: MediaOptions) -> Image.Image:
    """``image`` within the pixel bounds, by Pillow's bicubic filter (antialiased where it reduces)."""
    size = fit(*image.size, options)
    return image if size == image.size else image.resize(size, _FILTER)


def fit(width: int, height: int, options: MediaOptions) -> tuple[int, int]:
    """(width, height) of the same proportions, as near as whole numbers allow, whose product lies in the bounds.

    Where both bounds leave no such product, ``max_pixels`` holds: it is there to save memory.
    """
    least, most = options.min_pixels or 1, options.max_pixels
    if most is not None and width * height > most:
        return _below(width, height, most)
    if width * height < least:
        # The ceilings of two numbers whose product is `least`.
        wide = math.isqrt(-(-least * width // height) - 1) + 1
        high = math.isqrt(-(-least * height // width) - 1) + 1
        return (wide, high) if most is None or wide * high <= most else _below(width, height, most)
    return width, height


def _below(width: int, height: int, pixels: int) -> tuple[int, int]:
    wide = max(1, math.isqrt(pixels * width // height))
    high = max(1, math.isqrt(pixels * height // width))
    return min(wide, pixels // high or 1), min(high, pixels // wide or 1)  # a side of a thin picture was raised to 1
