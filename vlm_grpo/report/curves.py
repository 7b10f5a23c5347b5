"""The learning curves of a run, from metrics.jsonl: one picture of all of them, and drawings for a page.

matplotlib is imported inside the functions and only ever through ``Figure`` objects: no pyplot, so no global state,
no display, and nothing to close.
"""

import io
import math
import re
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from .records import duration, finite, number, read_jsonl, series
from .style import HUES, INK, MUTED, PAPER, RULE, VARIABLES, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {"dead_low": "all lowest", "dead_high": "all highest"}
_MOST_POINTS = 1200  # of one line; a picture is not wider
Series = tuple[list[float], list[float]]


class Panel(NamedTuple):
    """One panel: the metric drawn, and the metrics that band it (from ``low`` to ``high``, or ± ``spread``).

    Metrics whose names begin with ``parts`` (and end with ``/mean``, where some do) are drawn into it by their names.
    ``otherwise`` is drawn where a run has not logged the metric itself.
    """

    title: str
    key: str
    low: str = ""
    high: str = ""
    spread: str = ""
    smooth: bool = True
    parts: str = ""
    otherwise: str = ""


PANELS = (
    Panel("reward", "reward", spread="reward_std", parts="rewards/"),
    Panel("completion length (tokens)", "completions/mean_length", "completions/min_length", "completions/max_length"),
    Panel("loss", "loss"),
    Panel("entropy (nats)", "entropy"),
    Panel("KL to the reference (nats)", "kl"),
    Panel("groups with equal rewards (share)", "groups/dead", parts="groups/dead_", otherwise="frac_reward_zero_std"),
    Panel("completions cut at the limit (share)", "completions/clipped_ratio"),
    Panel("gradient norm", "grad_norm"),
    Panel("learning rate", "learning_rate", smooth=False),
)


class Drawing(NamedTuple):
    """One panel for a page.

    Attributes:
        title: what it shows.
        story: its first and last value in words, for those who do not see it.
        svg: the picture, whose colours are CSS variables (``style.VARIABLES``) and whose ids are its own.
        lines: name and CSS variable of each line, where there are several kinds.
    """

    title: str
    story: str
    svg: str
    lines: list[tuple[str, str]]


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
    panels = _panels(records)
    if not panels:
        return False
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    # The first panel is the one people look for: it takes the cells that the last row would leave empty.
    spare = rows * columns - len(panels)
    with rc_context(_style()):
        figure = Figure(figsize=(4.1 * columns, 2.6 * rows + 0.7), dpi=120, facecolor=PAPER, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.10, hspace=0.04, wspace=0.04)  # type: ignore[union-attr]
        figure.suptitle(_heading(records, title or metrics_file.resolve().parent.name), x=0.012, ha="left", fontsize=12)
        grid = figure.add_gridspec(rows, columns)
        for index, panel in enumerate(panels):
            place = 0 if index == 0 else index + spare
            row, column = divmod(place, columns)
            width = 1 + spare if index == 0 else 1
            axes = figure.add_subplot(grid[row, column : column + width])
            axes.set_title(panel.title, loc="left", fontsize=10, color=INK, pad=6)
            _draw_panel(axes, panel, records)
        _draw_legends(figure.axes)
        save(figure.savefig, out)
    return True


def curve_drawings(records: list[dict[str, Any]]) -> list[Drawing]:
    """The panels of ``draw_curves`` one by one, for a page.

    Args:
        records: the lines of metrics.jsonl.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawings = []
    with rc_context({**_style(), "svg.fonttype": "none", "svg.hashsalt": "vlm-grpo"}):
        for place, panel in enumerate(_panels(records)):
            figure = Figure(figsize=(4.1, 2.3), layout="constrained")
            axes = figure.add_subplot()
            _draw_panel(axes, panel, records)
            text = io.StringIO()
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            svg = _for_page(text.getvalue(), f"curve-{place}")
            named = [(str(line.get_label()), VARIABLES[str(line.get_color())]) for line in axes.lines]
            lines = [(label, colour) for label, colour in named if not label.startswith("_")]
            drawings.append(Drawing(panel.title, _story(panel, records), svg, lines))
    return drawings


def _for_page(svg: str, name: str) -> str:
    """matplotlib's file as an element of a page: no prologue, no comments, ids of its own, colours by variable."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(f": {colour}", f": var({variable})")
    head, rest = svg.split(">", 1)
    size = re.search(r'viewBox="([^"]*)"', head)
    assert size, "matplotlib writes a viewBox"
    return f'<svg viewBox="{size[1]}" aria-hidden="true" focusable="false">{rest}'


def _story(panel: Panel, records: list[dict[str, Any]]) -> str:
    steps, values = series(records, panel.key)
    if not values:
        return ""
    first, last = (f"{number(values[at])} at step {steps[at]:.0f}" for at in (0, -1))
    return last if len(values) == 1 else f"{first}, {last}"


def _style() -> dict[Any, Any]:
    style = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.edgecolor": RULE}
    # A reward may be called anything, and between two dollar signs matplotlib would read a formula.
    return style | {"xtick.color": MUTED, "ytick.color": MUTED, "axes.labelcolor": MUTED, "text.parse_math": False}


def _panels(records: list[dict[str, Any]]) -> list[Panel]:
    """The panels that have a value."""
    return [
        panel
        for panel in (_in_use(panel, records) for panel in PANELS)
        if series(records, panel.key)[0] or series(records, f"eval_{panel.key}")[0] or _parts(records, panel, [])
    ]


def _in_use(panel: Panel, records: list[dict[str, Any]]) -> Panel:
    return panel._replace(key=panel.otherwise) if panel.otherwise and not series(records, panel.key)[0] else panel


def _draw_panel(axes: "Axes", panel: Panel, records: list[dict[str, Any]]) -> None:
    """Fill one panel: band, raw line, smoothed line, parts, evaluation points."""
    steps, values = series(records, panel.key)
    _draw_band(axes, panel, records)
    parts = _parts(records, panel, values)
    smoothed = _smooth(values) if panel.smooth else values
    if smoothed != values:
        axes.plot(*_thinned(steps, values), color=HUES[0], linewidth=0.8, alpha=0.28)
    if values:
        line = {"marker": "o" if len(values) < 20 else "", "markersize": 3.5, "linewidth": 1.9, "zorder": 4}
        axes.plot(*_thinned(steps, smoothed), color=HUES[0], label="total" if parts else None, **line)
    for hue, (name, (part_steps, part_values)) in zip(cycle(HUES[1:]), parts.items(), strict=False):
        marker = "o" if len(part_values) == 1 else ""
        line = {"linewidth": 1.3, "marker": marker, "markersize": 3.5}
        axes.plot(*_thinned(part_steps, _smooth(part_values)), color=hue, label=_label(name), **line)
    eval_steps, eval_values = series(records, f"eval_{panel.key}")
    if eval_steps:
        point = {"markersize": 5.5, "markeredgecolor": PAPER, "markeredgewidth": 1.2, "zorder": 5}
        axes.plot(eval_steps, eval_values, "o-", color=INK, linewidth=0.9, label="evaluation", **point)
    positive = [value for value in values if value > 0]
    if panel.key == "grad_norm" and len(positive) == len(values) > 1 and max(positive) > 100 * min(positive):
        axes.set_yscale("log")
    _dress(axes)


def _dress(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_formatter(FuncFormatter(number))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)
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
            look = {"frameon": False, "fontsize": 8, "labelcolor": INK, "handlelength": 1.4, "loc": "best"}
            place = axes.get_subplotspec()
            letters = 52 * (len(place.colspan) if place is not None else 1)
            columns = min(len(handles), 4, max(1, letters // (6 + max(len(label) for label in handles))))
            lines = math.ceil(len(handles) / columns)
            if lines > 1:  # no corner is empty enough: they get room of their own above the curves
                low, high = axes.get_ylim()
                axes.set_ylim(low, high + (high - low) * 0.11 * lines)
                look |= {"loc": "upper left", "fontsize": 7.5, "borderaxespad": 0.0}
            axes.legend(handles.values(), handles.keys(), ncols=columns, **look)


def _draw_band(axes: "Axes", panel: Panel, records: list[dict[str, Any]]) -> None:
    """Shade mean ± spread, or low to high, where both ends are known; smoothed like the line between them."""
    ends: list[tuple[float, float, float]] = []
    for record in records:
        step, middle = finite(record.get("step")), finite(record.get(panel.key))
        low, high, spread = (finite(record.get(key)) for key in (panel.low, panel.high, panel.spread))
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
        every = math.ceil(len(steps) / _MOST_POINTS)
        axes.fill_between(steps[::every], lows[::every], highs[::every], color=HUES[0], alpha=0.11, linewidth=0)


def _parts(records: list[dict[str, Any]], panel: Panel, total: list[float]) -> dict[str, Series]:
    """The metrics that make up a panel's, by name; none when the only one is the panel's own."""
    if not panel.parts:
        return {}
    keys = dict.fromkeys(key for record in records for key in record if key.startswith(panel.parts))
    means = [key for key in keys if key.endswith("/mean")]
    parts = {key.split("/", 1)[1].removesuffix("/mean"): series(records, key) for key in means or keys}
    parts = {name: found for name, found in parts.items() if found[0]}
    if len(parts) == 1:
        (only,) = parts.values()
        same = len(only[1]) == len(total) and all(
            math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(only[1], total, strict=True)
        )
        return {} if same else parts
    return parts


def _label(name: str) -> str:
    """For a legend, which hides names that begin with an underscore and has little room."""
    name = _NAMES.get(name, name).encode("utf-8", "replace").decode().lstrip("_") or "unnamed"
    return name if len(name) <= 28 else f"{name[:27]}…"


def _thinned(steps: list[float], values: list[float]) -> Series:
    """At most ``_MOST_POINTS`` points that keep every peak: of each stretch its lowest and its highest, in order."""
    width = math.ceil(2 * len(values) / _MOST_POINTS)
    if width < 3:
        return steps, values
    kept: list[int] = []
    for start in range(0, len(values), width):
        stretch = range(start, min(start + width, len(values)))
        kept += sorted({min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)})
    return [steps[index] for index in kept], [values[index] for index in kept]


def _windows(count: int) -> list[slice]:
    """Around every point about a fifteenth of the run, centred (so without lag) and cut off at both ends."""
    half = min(count // 30, 50) if count >= 20 else 0
    return [slice(max(0, index - half), index + half + 1) for index in range(count)]


def _smooth(values: list[float]) -> list[float]:
    """A moving average."""
    return [fmean(values[window]) for window in _windows(len(values))]


def _heading(records: list[dict[str, Any]], title: str) -> str:
    steps = [step for record in records if (step := finite(record.get("step"))) is not None]
    seconds = [second for record in records if (second := finite(record.get("seconds"))) is not None]
    parts = [
        title,
        f"{max(steps):.0f} step{'s' * (max(steps) != 1)}" if steps else "",
        duration(max(seconds)) if seconds else "",
    ]
    return "  ·  ".join(part for part in parts if part)
