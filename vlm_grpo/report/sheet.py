"""Pictures of media: contact sheets of answered images, the frames of a clip in a row, a sound as a spectrogram."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .style import INK, MUTED, NEUTRAL, PAPER, RIGHT, WRONG, save

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageFont


def contact_sheet(
    images: "Sequence[Image.Image]",
    captions: Sequence[str],
    correct: Sequence[bool] | None,
    out: Path,
    columns: int = 10,
    title: str = "",
    cell: tuple[int, int] = (120, 120),
) -> None:
    """Draw images in a grid, each framed green (right) or red (wrong), with its caption underneath.

    Args:
        images: N pictures of any size and mode; small ones are enlarged, large ones reduced, none distorted.
        captions: N texts, wrapped to at most two lines of the cell; line breaks are kept.
        correct: N truth values, or ``None`` for grey frames and no score.
        out: the PNG, written beside its name and renamed.
        columns: pictures in a row.
        title: heading, followed by the score.
        cell: width and height that a picture is scaled into, in pixels.
    """
    from PIL import Image, ImageDraw

    assert images and len(images) == len(captions), f"{len(images)} images need as many captions, got {len(captions)}"
    assert correct is None or len(correct) == len(images), f"{len(images)} images, {len(correct or [])} truth values"
    (wide, high), gap, margin, line, frame = cell, 18, 32, 22, 5
    columns = min(columns, len(images))
    small, large = _font(16), _font(24)
    texts = [_wrap(caption, small, wide + gap - 6) for caption in captions]
    pitch = high + 2 * frame + 8 + line * max(len(text) for text in texts) + gap
    header = 64 if title or correct is not None else 0
    width = 2 * margin + columns * (wide + 2 * frame + gap) - gap
    height = 2 * margin + header + math.ceil(len(images) / columns) * pitch - gap
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _sheet_heading(draw, margin, width - margin, title, correct, large, small)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left, top = margin + column * (wide + 2 * frame + gap), margin + header + row * pitch
        right = None if correct is None else bool(correct[index])
        hue = NEUTRAL if right is None else RIGHT if right else WRONG
        outer = (left, top, left + wide + 2 * frame - 1, top + high + 2 * frame - 1)
        draw.rounded_rectangle(outer, radius=6, fill="#f4f5f7", outline=hue, width=frame if right is False else 3)
        picture = _fit(image, cell)
        sheet.paste(picture, (left + frame + (wide - picture.width) // 2, top + frame + (high - picture.height) // 2))
        for number, text in enumerate(texts[index]):
            place = (left + frame + wide / 2, top + high + 2 * frame + 8 + number * line)
            draw.text(place, text, font=small, fill=WRONG if right is False else INK, anchor="ma")
    save(sheet.save, out)


def filmstrip(frames: "np.ndarray", gap: int = 2) -> "Image.Image":
    """Frames (F, H, W, 3) uint8 side by side, ``gap`` pixels of paper between them."""
    from PIL import Image

    count, height, width = frames.shape[:3]
    strip = Image.new("RGB", (count * (width + gap) - gap, height), PAPER)
    for number, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame), (number * (width + gap), 0))
    return strip


def spectrogram(samples: "np.ndarray", rate: int, size: tuple[int, int] = (300, 180)) -> "Image.Image":
    """Samples (N,) in [-1, 1] as a picture: time rightwards, frequency upwards to 8 kHz, 60 dB from dark to light."""
    import numpy as np
    from matplotlib import colormaps
    from PIL import Image

    window, hop = rate // 40, max(1, len(samples) // size[0])  # 25 ms
    padded = np.pad(samples, window // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop] * np.hanning(window)
    power = np.abs(np.fft.rfft(windows))[:, : 8000 * window // rate] ** 2
    loudness = 10 * np.log10(power / max(power.max(), 1e-12) + 1e-12)
    colours = colormaps["magma"](np.clip(1 + loudness.T[::-1] / 60, 0, 1), bytes=True)
    return Image.fromarray(colours[..., :3].copy()).resize(size, Image.Resampling.BICUBIC)


def _sheet_heading(draw, left: int, right: int, title: str, correct: Sequence[bool] | None, large, small) -> None:
    """The title at the left, the score at the right; a title too long for the sheet is cut."""
    score = "" if correct is None else f"{sum(map(bool, correct))} of {len(correct)} right"
    room = right - left - (small.getlength(score) + 20 if score else 0)
    draw.text((left, left + 4), _cut(title, large, room), font=large, fill=INK, anchor="la")
    draw.text((right, left + 10), score, font=small, fill=MUTED, anchor="ra")


def _fit(image: "Image.Image", cell: tuple[int, int]) -> "Image.Image":
    """Scale to the cell, keeping the proportions; transparency is laid on white."""
    from PIL import Image

    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, PAPER), clear)
    scale = min(cell[0] / image.width, cell[1] / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _font(size: int) -> "ImageFont.FreeTypeFont":
    """DejaVu Sans as matplotlib ships it: the same letters on every machine, with arrows and accents."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _wrap(text: str, font: "ImageFont.FreeTypeFont", width: float, lines: int = 2) -> list[str]:
    """Break a caption into at most ``lines`` lines of ``width`` pixels; what does not fit ends in an ellipsis."""
    wrapped: list[str] = []
    for paragraph in text.strip().splitlines() or [""]:
        current = ""
        for word in paragraph.split():
            longer = f"{current} {word}".strip()
            if current and font.getlength(longer) > width:
                wrapped.append(current)
                longer = word
            current = longer
        wrapped.append(current)
    shown = wrapped[:lines]
    if len(wrapped) > lines:
        shown[-1] += "…"
    return [_cut(line, font, width) for line in shown]


def _cut(line: str, font: "ImageFont.FreeTypeFont", width: float) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"
