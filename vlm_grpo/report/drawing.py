"""How this package draws with matplotlib: its look, and a figure as an element of a page."""

import io
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from .style import INK, MUTED, RULE, VARIABLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Drawing(NamedTuple):
    """One drawing of a page.

    Attributes:
        title: what it shows.
        story: what is seen in it in words, for those who do not see it.
        svg: the picture, whose colours are CSS variables (``style.VARIABLES``) and whose ids are its own.
        lines: name and CSS variable of each line, where there are several kinds.
    """

    title: str
    story: str
    svg: str
    lines: list[tuple[str, str]]


def look() -> dict[Any, Any]:
    """For matplotlib's ``rc_context``."""
    style = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.edgecolor": RULE}
    # A reward may be called anything, and between two dollar signs matplotlib would read a formula.
    return style | {"xtick.color": MUTED, "ytick.color": MUTED, "axes.labelcolor": MUTED, "text.parse_math": False}


def page_look() -> dict[Any, Any]:
    """``look`` for a figure that goes into a page: texts stay texts, and ids are the same every time."""
    return {**look(), "svg.fonttype": "none", "svg.hashsalt": "vlm-grpo"}


def as_svg(figure: "Figure", name: str) -> str:
    """A figure as an element of a page: no prologue, no comments, ids that begin with ``name``, colours by variable."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(f": {colour}", f": var({variable})")
    head, rest = svg.split(">", 1)
    size = re.search(r'viewBox="([^"]*)"', head)
    assert size, "matplotlib writes a viewBox"
    return f'<svg viewBox="{size[1]}" aria-hidden="true" focusable="false">{rest}'


def strip(axes: "Axes") -> None:
    """Leave of a panel's frame the line below and faint lines across."""
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.margins(x=0.015)
