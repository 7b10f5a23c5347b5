"""Offline, one thread, quiet; and a table of the exactness tests' largest differences at the end of a run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# What was found about test files is of no use to the next run, nor to the user's own runs.
os.environ["VLM_GRPO_CACHE"] = tempfile.mkdtemp(prefix="vlm-grpo-cache-")


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@pytest.fixture
def largest(record_property):
    """``largest(row, column, difference)`` puts a figure into the table at the end."""
    return lambda row, column, value: record_property("largest", (row, column, float(value)))


def pytest_terminal_summary(terminalreporter) -> None:
    table: dict[str, dict[str, float]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", []):
                if name == "largest":
                    row, column, difference = value
                    cells = table.setdefault(row, {})
                    cells[column] = max(difference, cells.get(column, 0.0))
    if not table:
        return
    blocks: dict[str, list[str]] = {}
    for row in sorted(table):  # what stands behind a comma in a row's name says which table it belongs to
        blocks.setdefault(row.partition(", ")[2], []).append(row)
    terminalreporter.section("largest difference from an independent forward of one row, unpadded")
    width = max(len(row) for row in table)
    for rows in blocks.values():
        columns = sorted({column for row in rows for column in table[row]}, key=_place)
        terminalreporter.line(" " * width + "".join(f"  {column:>18}" for column in columns))
        for row in rows:
            line = "".join(f"  {table[row][c]:18.1e}" if c in table[row] else " " * 20 for c in columns)
            terminalreporter.line(f"{row:<{width}}{line}")
        terminalreporter.line("")


_CASES = ("one", "several", "sizes", "mixed", "kinds in a batch", "kinds in a row")


def _place(column: str) -> tuple[int, str]:
    return (_CASES.index(column) if column in _CASES else len(_CASES), column)
