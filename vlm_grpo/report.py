"""Pictures of a run: learning curves from metrics.jsonl, and contact sheets of answered images.

matplotlib is imported inside the functions and only ever through ``Figure`` objects: no pyplot, so no global state,
no display, and nothing to close.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from PIL import Image, ImageFont

INK, MUTED, RULE, PAPER = "#22272e", "#7a828c", "#e3e6ea", "#ffffff"
RIGHT, WRONG, NEUTRAL = "#2e9e6b", "#d6404b", "#c3c8ce"
HUES = ("#2563c9", "#d97706", "#0f9d8a", "#a23fb8", "#b0413e", "#5b6b7a")


class Panel(NamedTuple):
    """One panel: the metric drawn, and the metrics that band it (from ``low`` to ``high``, or ± ``spread``)."""

    title: str
    key: str
    low: str = ""
    high: str = ""
    spread: str = ""
    smooth: bool = True


PANELS = (
    Panel("reward", "reward", spread="reward_std"),
    Panel("completion length (tokens)", "completions/mean_length", "completions/min_length", "completions/max_length"),
    Panel("loss", "loss"),
    Panel("entropy (nats)", "entropy"),
    Panel("KL to the reference (nats)", "kl"),
    Panel("groups with equal rewards (share)", "frac_reward_zero_std"),
    Panel("gradient norm", "grad_norm"),
    Panel("learning rate", "learning_rate", smooth=False),
)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; a line torn by a kill is left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield record


def draw_curves(metrics_file: Path, out: Path, title: str = "") -> bool:
    """Draw the learning curves of a run.

    A panel appears when its metric has at least one finite value; ``eval_`` values are drawn as points on the panel of
    their metric. Faint lines are the raw values, strong lines a centred moving average.

    Args:
        metrics_file: metrics.jsonl, one object a logging step; a missing file counts as empty.
        out: the PNG, written beside its name and renamed, so that a kill never leaves half a picture.
        title: heading; the name of the run's folder when empty.

    Returns:
        Whether there was anything to draw; if not, ``out`` is not touched.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    records = list(read_jsonl(metrics_file)) if metrics_file.exists() else []
    panels = [panel for panel in PANELS if _series(records, panel.key)[0] or _series(records, f"eval_{panel.key}")[0]]
    if not panels:
        return False
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    # The first panel is the one people look for: it takes the cells that the last row would leave empty.
    spare = rows * columns - len(panels)
    style: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.edgecolor": RULE}
    style |= {"xtick.color": MUTED, "ytick.color": MUTED, "axes.labelcolor": MUTED}
    with rc_context(style):
        figure = Figure(figsize=(4.1 * columns, 2.6 * rows + 0.7), dpi=120, facecolor=PAPER, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.10, hspace=0.04, wspace=0.04)  # type: ignore[union-attr]
        figure.suptitle(_heading(records, title or metrics_file.resolve().parent.name), x=0.012, ha="left", fontsize=12)
        grid = figure.add_gridspec(rows, columns)
        for index, panel in enumerate(panels):
            place = 0 if index == 0 else index + spare
            row, column = divmod(place, columns)
            width = 1 + spare if index == 0 else 1
            _draw_panel(figure.add_subplot(grid[row, column : column + width]), panel, records)
        _draw_legends(figure.axes)
        _save(figure.savefig, out)
    return True


def _draw_panel(axes: "Axes", panel: Panel, records: list[dict[str, Any]]) -> None:
    """Fill one panel: band, raw line, smoothed line, reward parts, evaluation points."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps, values = _series(records, panel.key)
    _draw_band(axes, panel, records)
    parts = _reward_parts(records, values) if panel.key == "reward" else {}
    smoothed = _smooth(values) if panel.smooth else values
    if smoothed != values:
        axes.plot(steps, values, color=HUES[0], linewidth=0.8, alpha=0.28)
    marker = "o" if len(values) < 20 else ""
    axes.plot(
        steps,
        smoothed,
        marker=marker,
        markersize=3.5,
        color=HUES[0],
        linewidth=1.9,
        zorder=4,
        label="total" if parts else None,
    )
    for hue, (name, (part_steps, part_values)) in zip(cycle(HUES[1:]), parts.items(), strict=False):
        axes.plot(part_steps, _smooth(part_values), color=hue, linewidth=1.3, label=name)
    eval_steps, eval_values = _series(records, f"eval_{panel.key}")
    if eval_steps:
        point = {"markersize": 5.5, "markeredgecolor": PAPER, "markeredgewidth": 1.2, "zorder": 5}
        axes.plot(eval_steps, eval_values, "o-", color=INK, linewidth=0.9, label="evaluation", **point)
    axes.set_title(panel.title, loc="left", fontsize=10, color=INK, pad=6)
    axes.yaxis.set_major_formatter(FuncFormatter(_number))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    positive = [value for value in values if value > 0]
    if panel.key == "grad_norm" and len(positive) == len(values) > 1 and max(positive) > 100 * min(positive):
        axes.set_yscale("log")
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.margins(x=0.015)
    axes.set_xlabel("step", fontsize=8)


def _draw_legends(panels: "list[Axes]") -> None:
    """Explain every kind of line once, on the first panel that has it."""
    explained: set[str] = set()
    for axes in panels:
        named = zip(*axes.get_legend_handles_labels(), strict=True)
        handles = {label: handle for handle, label in named if label not in explained}
        explained.update(handles)
        if handles:
            look = {"frameon": False, "fontsize": 8, "labelcolor": INK, "handlelength": 1.4}
            axes.legend(handles.values(), handles.keys(), ncols=min(len(handles), 4), loc="best", **look)


def _draw_band(axes: "Axes", panel: Panel, records: list[dict[str, Any]]) -> None:
    """Shade mean ± spread, or low to high, where both ends are known; smoothed like the line between them."""
    ends: list[tuple[float, float, float]] = []
    for record in records:
        step, middle = _finite(record.get("step")), _finite(record.get(panel.key))
        low, high, spread = (_finite(record.get(key)) for key in (panel.low, panel.high, panel.spread))
        if middle is not None and spread is not None:
            low, high = middle - spread, middle + spread
        if step is not None and low is not None and high is not None:
            ends.append((step, low, high))
    if len(ends) > 1:
        steps, lows, highs = (list(column) for column in zip(*ends, strict=True))
        if panel.spread:
            lows, highs = _smooth(lows), _smooth(highs)
        else:  # the mean of extremes is not an extreme: an envelope
            lows = [min(lows[window]) for window in _windows(len(lows))]
            highs = [max(highs[window]) for window in _windows(len(highs))]
        axes.fill_between(steps, lows, highs, color=HUES[0], alpha=0.11, linewidth=0)


def _reward_parts(records: list[dict[str, Any]], total: list[float]) -> dict[str, tuple[list[float], list[float]]]:
    """The mean of every reward function by name; none when the only one is the total itself."""
    keys = dict.fromkeys(key for record in records for key in record if key.startswith("rewards/"))
    names = [key.split("/", 1)[1].removesuffix("/mean") for key in keys if key.endswith("/mean")]
    parts = {name: _series(records, f"rewards/{name}/mean") for name in names}
    parts = {name: series for name, series in parts.items() if series[0]}
    if len(parts) == 1:
        (only,) = parts.values()
        same = len(only[1]) == len(total) and all(
            math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(only[1], total, strict=True)
        )
        return {} if same else parts
    return parts


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """The steps and values of one metric, where both are finite numbers."""
    pairs = ((_finite(record.get("step")), _finite(record.get(key))) for record in records)
    known = [(step, value) for step, value in pairs if step is not None and value is not None]
    return [step for step, _ in known], [value for _, value in known]


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _windows(count: int) -> list[slice]:
    """Around every point about a fifteenth of the run, centred (so without lag) and cut off at both ends."""
    half = min(count // 30, 50) if count >= 20 else 0
    return [slice(max(0, index - half), index + half + 1) for index in range(count)]


def _smooth(values: list[float]) -> list[float]:
    """A moving average."""
    return [fmean(values[window]) for window in _windows(len(values))]


def _number(value: float, _position: object = None) -> str:
    """``0.25``, ``1e-5``: short, the same on every panel, and no offset text above the axis."""
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def _heading(records: list[dict[str, Any]], title: str) -> str:
    steps = [step for record in records if (step := _finite(record.get("step"))) is not None]
    seconds = [second for record in records if (second := _finite(record.get("seconds"))) is not None]
    parts = [
        title,
        f"{max(steps):.0f} step{'s' * (max(steps) != 1)}" if steps else "",
        duration(max(seconds)) if seconds else "",
    ]
    return "  ·  ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """``0:07``, ``12:30``, ``3:05:00``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _save(save: Callable[..., Any], out: Path) -> None:
    """Write a PNG beside its final name, then rename: a kill or a reader never meets half a file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.new")
    save(beside, format="png")
    os.replace(beside, out)


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
    _save(sheet.save, out)


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
