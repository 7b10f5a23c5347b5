"""The size of a row's picture, and the size at which a Qwen2-VL sees it."""

import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

from ..errors import RewardError
from ..media import Medium
from ..media.problems import reading

_EXIF_ORIENTATION = 0x0112


def picture_size(columns: dict[str, Any], row: int) -> tuple[int, int]:
    """(width, height) in pixels of the upright picture: the row's ``width`` and ``height``, or its first image.

    Raises:
        RewardError: the row has neither.
        MediaError: the image cannot be read.
    """
    width, height = (columns[name][row] if name in columns else None for name in ("width", "height"))
    if width and height:
        return int(width), int(height)
    image = _first_image(columns, row)
    if image is None:
        raise RewardError(
            'the scales differ, and the row has no image and no "width" and "height". Add the columns, or set scale '
            "and truth_scale to one that needs no size."
        )
    return _size(Medium.of(image))


def _first_image(columns: dict[str, Any], row: int) -> Any:
    for name in ("image", "images"):
        value = columns[name][row] if name in columns else None
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None:
            return value
    prompt = columns["prompts"][row] if "prompts" in columns else ""
    messages = prompt if isinstance(prompt, list) else []
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    parts = [part for content in contents for part in content if part.get("type") == "image"]
    return next((part["image"] for part in parts if part.get("image") is not None), None)


def _size(medium: Medium) -> tuple[int, int]:
    """Read from the file's head, so that a step does not decode every picture."""
    source = medium.source
    with reading(medium):
        if isinstance(source, Path | bytes):
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as file:
                return _upright(file)
        if isinstance(source, ImageFile.ImageFile):
            return _upright(source)
        return (source if isinstance(source, Image.Image) else medium.open()).size


def _upright(file: Image.Image) -> tuple[int, int]:
    turned = file.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
    return (file.height, file.width) if turned else file.size


def resized_size(
    size: tuple[int, int], processor: Any, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """(width, height) in pixels at which the processor of a Qwen2-VL or Qwen2.5-VL hands a picture to the model.

    Args:
        size: (width, height) of the picture.
        min_pixels, max_pixels: the run's or the row's; None: the processor's own.

    Raises:
        RewardError: no processor, or one that does not resize to patches within pixel bounds.
    """
    image_processor = getattr(processor, "image_processor", processor)
    own = getattr(image_processor, "size", None)
    lowest, highest = getattr(own, "shortest_edge", None), getattr(own, "longest_edge", None)
    if lowest is None or highest is None or not hasattr(image_processor, "merge_size"):
        name = "no processor" if processor is None else type(processor).__name__
        raise RewardError(
            f'the scale "resized" needs the processor of a Qwen2-VL or Qwen2.5-VL, and there is {name}. Pass it as '
            'processor, or name the scale in which the model answers: "pixels", 1000.'
        )
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    least, most = min_pixels or lowest, max_pixels or highest
    least = min(least, most) if min_pixels is None else least
    factor = image_processor.patch_size * image_processor.merge_size
    height, width = smart_resize(size[1], size[0], factor, min_pixels=least, max_pixels=max(least, most))
    return width, height
