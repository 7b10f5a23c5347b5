"""The learning curves of a run, from metrics.jsonl: one picture of all of them, and drawings for a page.

matplotlib is imported inside the functions and only ever through ``Figure`` objects: no pyplot, so no global state,
no display, and nothing to close.
"""

import math
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from .drawing import Drawing, as_svg, look, page_look, strip
from .facts import read_config
from .records import duration, finite, number, read_jsonl, series
from .style import HUES, INK, MUTED, PAPER, VARIABLES, save
from .weights import Rewards, logged_rewards, rewards_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

_NAMES = {"dead_low": "all lowest", "dead_high": "all highest"}
_MOST_POINTS = 1200  # of one line; a picture is not wider
_KL_OF_COMPLETIONS = "KL to the reference (nats a completion)"
Series = tuple[list[float], list[float]]


class Panel(NamedTuple):
    """One panel: the metric drawn, and the metrics that band it (from ``low`` to ``high``, or ± ``spread``).

    Metrics whose names begin with ``parts`` (and end with ``/mean``, where some do) are drawn into it by their names.
    ``otherwise`` is drawn where a run has not logged the metric itself. Of ``parts`` only ``names`` are drawn, where
    these are given. ``beside`` is further metrics and their names; one that is the panel's own all along is left out.
    ``own`` is what the panel's own metric is called among others. ``chance`` is a level to be above. ``label`` stands
    beside the axis, and ``below`` is drawn under the panel, over the same steps.
    """

    title: str
    key: str
    low: str = ""
    high: str = ""
    spread: str = ""
    smooth: bool = True
    parts: str = ""
    otherwise: str = ""
    names: tuple[str, ...] | None = None
    beside: tuple[tuple[str, str], ...] = ()
    own: str = "total"
    chance: float | None = None
    label: str = ""
    below: "Panel | None" = None


PANELS = (
    Panel("reward", "reward", spread="reward_std", parts="rewards/", beside=(("score", "score"),)),
    Panel("share of pairs judged right", "accuracy", chance=0.5),
    Panel("completion length (tokens)", "completions/mean_length", "completions/min_length", "completions/max_length"),
    Panel("loss", "loss", parts="loss/"),
    Panel("margin: score of chosen − rejected", "margin", chance=0.0),
    Panel("score: mean, lowest to highest", "mean_reward", "min_reward", "max_reward"),
    Panel("entropy (nats)", "entropy"),
    Panel("KL to the reference (nats a token)", "kl"),
    Panel("values and returns (mean over tokens)", "returns", own="returns", beside=(("values", "values"),)),
    Panel("share of the returns' variance explained", "explained_variance", chance=0.0),
    Panel("clipped (share of tokens)", "clipfrac", own="policy's ratios", beside=(("vf_clipfrac", "new values"),)),
    Panel("KL to the rollout's policy (nats a token)", "approx_kl"),
    Panel("groups with equal rewards (share)", "groups/dead", parts="groups/dead_", otherwise="frac_reward_zero_std"),
    Panel("completions cut at the limit (share)", "completions/clipped_ratio"),
    Panel("gradient norm", "grad_norm"),
    Panel("learning rate", "learning_rate", smooth=False),
)


def draw_curves(metrics_file: Path, out: Path, title: str = "") -> bool:
    """Draw the learning curves of a run.

    A panel appears when its metric has at least one finite value; ``eval_`` values are drawn as points on the panel of
    their metric. Faint lines are the raw values, strong lines a centred moving average. The config.yaml beside the
    metrics tells which rewards count and which are only watched.

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
    rewards = rewards_of(read_config(metrics_file.parent)[1], logged_rewards(records))
    panels = _panels(records, rewards)
    if panels and (judged := _judged(records, rewards)) is not None:
        panels.insert(1, judged)
    if not panels:
        return False
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    # The first panel is the one people look for: it takes the cells that the last row would leave empty.
    spare = rows * columns - len(panels)
    with rc_context(look()):
        figure = Figure(figsize=(4.1 * columns, 2.6 * rows + 0.7), dpi=120, facecolor=PAPER, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.10, hspace=0.04, wspace=0.04)  # type: ignore[union-attr]
        figure.suptitle(_heading(records, title or metrics_file.resolve().parent.name), x=0.012, ha="left", fontsize=12)
        grid = figure.add_gridspec(rows, columns)
        for index, panel in enumerate(panels):
            place = 0 if index == 0 else index + spare
            row, column = divmod(place, columns)
            width = 1 + spare if index == 0 else 1
            top, *_ = _draw_stack(figure, grid[row, column : column + width], panel, records)
            top.set_title(panel.title, loc="left", fontsize=10, color=INK, pad=6)
        _draw_legends(figure.axes)
        save(figure.savefig, out)
    return True


def curve_drawings(records: list[dict[str, Any]], rewards: Rewards | None = None) -> list[Drawing]:
    """The panels of ``draw_curves`` one by one, for a page.

    Args:
        records: the lines of metrics.jsonl.
        rewards: of the run.
    """
    panels = _panels(records, rewards or Rewards({}))
    return [_drawing(panel, records, f"curve-{place}", 2.3) for place, panel in enumerate(panels)]


def judged_drawing(records: list[dict[str, Any]], rewards: Rewards) -> Drawing | None:
    """The judge's score and the truth, one above the other, for a page; None where one of them has no value."""
    panel = _judged(records, rewards)
    return None if panel is None else _drawing(panel, records, "judged", 3.4)


def _drawing(panel: Panel, records: list[dict[str, Any]], name: str, height: float) -> Drawing:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(page_look()):
        figure = Figure(figsize=(4.1, height), layout="constrained")
        filled = _draw_stack(figure, figure.add_gridspec(1, 1)[0, 0], panel, records)
        named = [(str(line.get_label()), str(line.get_color())) for axes in filled for line in axes.lines]
        lines = [(label, VARIABLES[colour]) for label, colour in named if not label.startswith("_")]
        return Drawing(panel.title, _story(panel, records), as_svg(figure, name), lines)


def _draw_stack(figure: "Figure", place: "SubplotSpec", panel: Panel, records: list[dict[str, Any]]) -> "list[Axes]":
    """Draw a panel into a place, and what is below it: two axes, since a scale that both had would favour one."""
    if panel.below is None:
        axes = figure.add_subplot(place)
        _draw_panel(axes, panel, records)
        return [axes]
    inner = place.subgridspec(2, 1)
    top = figure.add_subplot(inner[0])
    bottom = figure.add_subplot(inner[1], sharex=top)
    _draw_panel(top, panel, records)
    _draw_panel(bottom, panel.below, records)
    top.set_xlabel("")
    top.tick_params(labelbottom=False)
    return [top, bottom]


def _story(panel: Panel, records: list[dict[str, Any]]) -> str:
    lines = {panel.label: series(records, panel.key)}
    if not panel.key:
        lines = _parts(records, panel, [])
    elif panel.beside and not panel.parts:
        lines = {panel.own: lines[panel.label], **_parts(records, panel, lines[panel.label][1])}
    if panel.below is not None:
        lines[panel.below.label] = series(records, panel.below.key)
    named = [
        f"{name} {_ends(*line)}" if len(lines) > 1 or not panel.key else _ends(*line) for name, line in lines.items()
    ]
    return "; ".join(named)


def _ends(steps: list[float], values: list[float]) -> str:
    if not values:
        return ""
    first, last = (f"{number(values[at])} at step {steps[at]:.0f}" for at in (0, -1))
    return last if len(values) == 1 else f"{first}, {last}"


def _panels(records: list[dict[str, Any]], rewards: Rewards) -> list[Panel]:
    """The panels that have a value. What a run only watches is no part of its reward, and has a panel of its own."""
    panels = [_in_use(panel, records) for panel in PANELS]
    if rewards.watched:
        paid = tuple(name for name in rewards.weights if name not in rewards.watched)
        panels[0] = panels[0]._replace(names=paid)
        apart = () if _judged(records, rewards) is None else (rewards.judge, rewards.truth)
        others = tuple(name for name in rewards.watched if name not in apart)
        panels.insert(1, Panel("watched only, no part of the reward", "", parts="rewards/", names=others))
    return [
        panel
        for panel in panels
        if series(records, panel.key)[0] or series(records, f"eval_{panel.key}")[0] or _parts(records, panel, [])
    ]


def _judged(records: list[dict[str, Any]], rewards: Rewards) -> Panel | None:
    """The judge's score above the truth."""
    keys = [f"rewards/{name}/mean" for name in (rewards.judge, rewards.truth)]
    if not rewards.judge or not all(series(records, key)[0] for key in keys):
        return None
    truth = Panel("", keys[1], label=f"true {_label(rewards.truth)}")
    return Panel("score and truth", keys[0], label="judge's score", below=truth)


def _in_use(panel: Panel, records: list[dict[str, Any]]) -> Panel:
    """The panel as this run fills it: PPO's KL is a completion's, above its coefficient where that adapts."""
    if panel.key == "kl" and (coefficients := series(records, "kl_coef")[1]):
        below = Panel("", "kl_coef", smooth=False, label="kl_coef") if len(set(coefficients)) > 1 else None
        return panel._replace(title=_KL_OF_COMPLETIONS, label="KL" if below else "", below=below)
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
        axes.plot(*_thinned(steps, smoothed), color=HUES[0], label=panel.own if parts else None, **line)
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
    if panel.chance is not None:
        axes.axhline(panel.chance, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.set_ylabel(panel.label, fontsize=8)
    _dress(axes)


def _dress(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_formatter(FuncFormatter(number))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    strip(axes)
    axes.set_xlabel("step", fontsize=8)


def _draw_legends(panels: "list[Axes]") -> None:
    """Explain every kind of line once, on the first panel that has it."""
    explained: set[tuple[str, str]] = set()
    for axes in panels:
        lines = {(str(line.get_label()), str(line.get_color())): line for line in axes.lines}
        new = {key: line for key, line in lines.items() if key not in explained and not key[0].startswith("_")}
        explained.update(new)
        handles = {label: line for (label, _), line in new.items()}
        if handles:
            look = {"frameon": False, "fontsize": 8, "labelcolor": INK, "handlelength": 1.4, "loc": "best"}
            place = axes.get_subplotspec()
            letters = 52 * (len(place.colspan) if place is not None else 1)
            columns = min(len(handles), 4, max(1, letters // (6 + max(len(label) for label in handles))))
            rows = math.ceil(len(handles) / columns)
            if rows > 1:  # no corner is empty enough: they get room of their own above the curves
                low, high = axes.get_ylim()
                axes.set_ylim(low, high + (high - low) * 0.11 * rows)
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
    """The metrics that make up a panel's, by name; none when the only one is the panel's own. Those beside it."""
    near = {name: series(records, key) for key, name in panel.beside}
    near = {name: found for name, found in near.items() if found[0] and not _same(found[1], total)}
    if not panel.parts:
        return near
    keys = dict.fromkeys(key for record in records for key in record if key.startswith(panel.parts))
    means = [key for key in keys if key.endswith("/mean")]
    parts = {key.split("/", 1)[1].removesuffix("/mean"): series(records, key) for key in means or keys}
    parts = {name: found for name, found in parts.items() if found[0] and (panel.names is None or name in panel.names)}
    if len(parts) == 1 and panel.key:
        (only,) = parts.values()
        parts = {} if _same(only[1], total) else parts
    return parts | near


def _same(values: list[float], others: list[float]) -> bool:
    """Whether they are one line, but for rounding."""
    return len(values) == len(others) and all(
        math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(values, others, strict=True)
    )


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
