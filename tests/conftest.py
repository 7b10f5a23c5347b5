"""Offline, one thread, quiet; and a table of the exactness tests' largest differences at the end of a run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


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
    columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
    width = max(len(row) for row in table)
    terminalreporter.section("largest difference from an independent forward of one row, unpadded")
    terminalreporter.line(" " * width + "".join(f"  {column:>18}" for column in columns))
    for row, cells in table.items():
        line = "".join(f"  {cells[c]:18.1e}" if c in cells else " " * 20 for c in columns)
        terminalreporter.line(f"{row:<{width}}{line}")
