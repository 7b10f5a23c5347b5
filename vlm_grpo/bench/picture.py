"""Pictures of measurements: where the seconds of a step go, and how they grow with the group."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report import HUES, INK, MUTED, PAPER, RULE
from .table import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_THEIRS, _OURS = "#8a939e", HUES[0]
_SHADES = dict(zip(TITLES, (HUES[1], HUES[2], HUES[3], HUES[0], "#c3c8ce"), strict=True))


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """Write a PNG: of one result its phases as bars, of several (that differ in G) the seconds over G.

    Args:
        results: as ``run_bench`` returns them.
        out: the PNG, written beside its name and renamed.
    """
    _write(_bars if len(results) == 1 else _curves, results, out)


def draw_contest(result: dict[str, Any], out: Path) -> None:
    """Write a PNG of a contest: every contender's phases as a bar, a panel for each number of prompts a step.

    Args:
        result: as ``run_contest`` returns it.
        out: the PNG, written beside its name and renamed.
    """
    _write(_rows_of_bars, result, out)


def _write(paint: Any, what: Any, out: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.edgecolor": RULE}
    style |= {"xtick.color": MUTED, "ytick.color": MUTED, "axes.labelcolor": MUTED}
    with rc_context(style):
        figure = Figure(dpi=120, facecolor=PAPER, layout="constrained")
        paint(figure, what)
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = out.with_name(f".{out.name}.new")
        figure.savefig(beside, format="png")
        os.replace(beside, out)


def _heading(figure: Any, result: dict[str, Any], group: str) -> None:
    unit = "CPU seconds" if result["device"] == "cpu" else f"seconds on {result['device']}"
    title = f"{unit} of one GRPO step · {result['modality']}, P {result['prompt_tokens']}, "
    title += f"C {result['completion_tokens']}{group}, beta {result['beta']:g}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=11)
    figure.supxlabel(f"reference: {result['reference']}", x=0.012, ha="left", fontsize=7, color=MUTED)


def _bars(figure: Any, results: list[dict[str, Any]]) -> None:
    """Both trainers' phases, end to end."""
    (result,) = results
    figure.set_size_inches(8.2, 2.9)
    _heading(figure, result, f", G {result['num_generations']}")
    axes: Axes = figure.add_subplot()
    totals = {"reference": result["seconds_reference"], "ours": result["seconds_ours"]}
    whole = max(totals.values())
    for row, side in enumerate(totals):
        left = 0.0
        for phase, figures in result["phases"].items():
            seconds = figures[side]
            label = TITLES[phase] if row == 0 and (figures["reference"] or figures["ours"]) else None
            axes.barh(row, seconds, left=left, height=0.6, color=_SHADES[phase], edgecolor=PAPER, label=label)
            if seconds > 0.05 * whole:
                axes.text(left + seconds / 2, row, f"{seconds:.2f}", ha="center", va="center", color=PAPER)
            left += seconds
        ratio = f"   {result['step_ratio']:.1f}x" if side == "ours" else ""
        axes.text(left + 0.01 * whole, row, f"{totals[side]:.2f} s{ratio}", va="center", color=INK, weight="bold")
    axes.set_yticks([0, 1], ["reference", "ours"], color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * whole)
    axes.legend(frameon=False, ncols=5, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.12), handlelength=1.2)
    axes.grid(axis="x", color=RULE)
    _plain(axes)


def _rows_of_bars(figure: Any, result: dict[str, Any]) -> None:
    counts = list(dict.fromkeys(row["prompts_per_step"] for row in result["contenders"]))
    each = len(result["contenders"]) // len(counts)
    figure.set_size_inches(8.2, len(counts) * (0.9 + 0.45 * each) + 0.6)
    unit = "CPU seconds" if result["device"] == "cpu" else f"seconds on {result['device']}"
    title = f"{unit} of one GRPO step · P {result['prompt_tokens']}, C {result['completion_tokens']}, "
    title += f"G {result['num_generations']}\n{result['model']}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=9)
    for place, count in enumerate(counts):
        rows = [row for row in result["contenders"] if row["prompts_per_step"] == count]
        axes: Axes = figure.add_subplot(len(counts), 1, place + 1)
        whole = max([row["seconds"] for row in rows if "seconds" in row], default=1.0)
        for number, row in enumerate(rows):
            left = 0.0
            for phase, seconds in row.get("phases", {}).items():
                axes.barh(number, seconds, left=left, height=0.6, color=_SHADES[phase], edgecolor=PAPER)
                left += seconds
            peak = row.get("peak_bytes")
            text = f"{row['seconds']:.2f} s" if "seconds" in row else row["error_kind"]
            text += f", {peak / 2**30:.1f} GiB" if peak else ""
            axes.text(left + 0.01 * whole, number, text, va="center", color=INK, weight="bold")
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * whole)
        axes.set_title(f"prompts a step: {count}", loc="left", fontsize=9, color=INK)
        axes.grid(axis="x", color=RULE)
        _plain(axes)
    handles = [_square(_SHADES[phase], TITLES[phase]) for phase in TITLES]
    figure.legend(handles=handles, frameon=False, ncols=5, fontsize=8, loc="outside lower left", handlelength=1.2)


def _square(color: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)


def _curves(figure: Any, results: list[dict[str, Any]]) -> None:
    """One panel for the step and one a phase, both trainers in each."""
    results = sorted(results, key=lambda result: result["num_generations"])
    groups = [result["num_generations"] for result in results]
    shown = [p for p in TITLES if any(r["phases"][p]["reference"] or r["phases"][p]["ours"] for r in results)]
    columns = 3
    rows = -(-(len(shown) + 1) // columns)
    figure.set_size_inches(3.6 * columns, 2.5 * rows + 0.8)
    _heading(figure, results[0], "")
    grid = figure.add_gridspec(rows, columns)
    for number, phase in enumerate(["step", *shown]):
        axes = figure.add_subplot(grid[divmod(number, columns)])
        for side, hue in (("reference", _THEIRS), ("ours", _OURS)):
            seconds = [r[f"seconds_{side}"] if phase == "step" else r["phases"][phase][side] for r in results]
            axes.plot(groups, seconds, "o-", color=hue, markersize=4, linewidth=1.9, label=side)
            if phase == "step":
                for group, value in zip(groups, seconds, strict=True):
                    place = {
                        "textcoords": "offset points",
                        "xytext": (0, 6 if side == "reference" else -12),
                        "ha": "center",
                    }
                    axes.annotate(f"{value:.2g}", (group, value), fontsize=7, color=hue, **place)
        axes.set_title("whole step" if phase == "step" else TITLES[phase], loc="left", fontsize=10, color=INK)
        axes.set_ylim(bottom=0)
        axes.margins(y=0.15)
        axes.set_xticks(groups)
        axes.grid(axis="y", color=RULE)
        _plain(axes)
        if number >= len(shown) + 1 - columns:
            axes.set_xlabel("completions a prompt (G)", fontsize=8)
        if phase == "step":
            axes.legend(frameon=False, fontsize=8, loc="upper left")


def _plain(axes: "Axes") -> None:
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
