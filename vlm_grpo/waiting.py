"""A progress bar for what may take long: shown on a terminal, and only once two seconds have passed."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")
_PATIENCE = 2.0  # seconds


def track(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """The items one by one, with a bar on the standard error stream while the caller works on them."""
    console = Console(stderr=True)
    progress, began = None, time.monotonic()
    try:
        for done, item in enumerate(items):
            if progress is None and console.is_interactive and time.monotonic() - began > _PATIENCE:
                progress = Progress(console=console, transient=True)
                progress.start()
                task = progress.add_task(title, total=total)
            if progress is not None:
                progress.update(task, completed=done)
            yield item
    finally:
        if progress is not None:
            progress.stop()
