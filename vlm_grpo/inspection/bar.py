"""A count of rows that shows itself where reading them takes its time."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_SECONDS_WITHOUT_BAR = 2.0
Item = TypeVar("Item")


def counted(items: Iterable[Item], title: str) -> Iterator[Item]:
    """The items; on a terminal, after two seconds, with a line that counts them on the error stream."""
    start, seen, progress, task = time.monotonic(), sys.stderr.isatty(), None, None
    try:
        for number, item in enumerate(items, 1):
            if seen and progress is None and time.monotonic() - start > _SECONDS_WITHOUT_BAR:
                from rich.console import Console
                from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

                columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} rows"))
                progress = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
                task = progress.add_task(title, total=None)
                progress.start()
            if progress is not None and task is not None:
                progress.update(task, completed=number)
            yield item
    finally:
        if progress is not None:
            progress.stop()
