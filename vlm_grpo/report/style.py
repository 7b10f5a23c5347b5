"""The colours of every picture that this package draws, and how a picture reaches the disk."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

INK, MUTED, RULE, PAPER = "#22272e", "#7a828c", "#e3e6ea", "#ffffff"
RIGHT, WRONG, NEUTRAL = "#2e9e6b", "#d6404b", "#c3c8ce"
HUES = ("#2563c9", "#d97706", "#0f9d8a", "#a23fb8", "#b0413e", "#5b6b7a")

# The same colours as a page names them, so that it may have a dark side.
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper"}
VARIABLES |= {hue: f"--hue-{index}" for index, hue in enumerate(HUES)}


def save(write: Callable[..., Any], out: Path) -> None:
    """Write a PNG beside its final name, then rename: a kill or a reader never meets half a file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.new")
    write(beside, format="png")
    os.replace(beside, out)
