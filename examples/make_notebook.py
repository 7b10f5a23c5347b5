"""Write the notebook of a script in ``# %%`` cells beside it: ``python examples/make_notebook.py examples/digits.py``.

``# %% [markdown]`` begins a cell whose lines are comments, ``# %%`` one of code. The same script gives the same bytes.
"""

import json
import sys
from pathlib import Path
from typing import Any

CODE, MARKDOWN = "# %%", "# %% [markdown]"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebook(script: str) -> str:
    """The script as a notebook in nbformat 4.5, without outputs.

    Raises:
        ValueError: text before the first cell, or a line of a markdown cell that is no comment.
    """
    cells: list[tuple[str, list[str]]] = []
    for number, line in enumerate(script.splitlines(), 1):
        if line in (CODE, MARKDOWN):
            cells.append(("code" if line == CODE else "markdown", []))
        elif cells:
            kind, lines = cells[-1]
            lines.append(line if kind == "code" else _uncommented(line, number))
        elif line:
            raise ValueError(f'line {number} stands before the first cell: {line!r}. Put "{CODE}" above it.')
    document = {
        "cells": [_cell(index, kind, "\n".join(lines).strip("\n")) for index, (kind, lines) in enumerate(cells)],
        "metadata": METADATA,
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _uncommented(line: str, number: int) -> str:
    if line and not line.startswith("#"):
        raise ValueError(f'line {number} of a markdown cell is no comment: {line!r}. Begin it with "# ".')
    return line.removeprefix("#").removeprefix(" ")


def _cell(index: int, kind: str, text: str) -> dict[str, Any]:
    run: dict[str, Any] = {"execution_count": None} if kind == "code" else {}
    cell = {"cell_type": kind, **run, "id": f"cell-{index}", "metadata": {}}
    return cell | ({"outputs": []} if kind == "code" else {}) | {"source": text.splitlines(keepends=True)}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.with_suffix(".ipynb").write_text(notebook(path.read_text(encoding="utf-8")), encoding="utf-8")
