"""Every medium of a dataset is looked at before training: in threads, once a file, and once for all runs."""

import logging
import os
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from ..config import MediaOptions
from ..errors import MediaError
from ..media import Medium
from .columns import undecoded
from .sample import to_sample

logger = logging.getLogger(__name__)

_SECONDS_WITHOUT_BAR = 2.0
_SECONDS_LOCKED = 5.0
# Waiting media per thread: enough to keep it busy; 100,000 media must not wait in memory.
_QUEUED = 8
_WRITTEN_AT_ONCE = 1000

# Path, size, time, and everything else that the answer hangs on.
_Key = tuple[str, int, int, str]


@dataclass(frozen=True)
class ScanReport:
    """What a scan found.

    Attributes:
        checked: media seen, repeated ones included.
        bad: for each row with a bad medium, one text per medium: ``the video "x.mp4" has no frames``.
    """

    checked: int = 0
    bad: dict[int, list[str]] = field(default_factory=dict)

    def text(self, name: str = "", limit: int = 20) -> str:
        """The first ``limit`` bad rows of dataset ``name``, a line each, and the total; empty where nothing is bad."""
        at = f"{name} " if name else ""
        lines = [f"{at}row {row}: {'; '.join(problems)}." for row, problems in list(self.bad.items())[:limit]]
        if len(self.bad) > limit:
            lines.append(f"... and {len(self.bad) - limit} more.")
        if len(self.bad) > 1:
            lines.append(f"{name or 'The dataset'} has {len(self.bad)} rows with bad media.")
        return "\n".join(lines)


def scan(
    media: Iterable[tuple[int, Medium]],
    options: MediaOptions,
    title: str,
    workers: int | None = None,
    cache: Path | None = None,
    total: int | None = None,
) -> ScanReport:
    """Check each medium at the level ``options.scan``; a bad one is reported, never raised.

    A progress bar appears on a terminal after two seconds. Files found good are remembered by path, size and time in
    a small database, and not opened again until they change; bad ones are looked at each time.

    Args:
        media: (row number, medium), best from a generator: none is kept.
        title: of the progress bar.
        workers: threads; by default two per core, at most 16 (most of their time they wait for the disk).
        cache: the database; by default ``media-scan.sqlite`` in ``$VLM_GRPO_CACHE`` or ``~/.cache/vlm_grpo``.
        total: how many media there are, for the progress bar.

    Raises:
        UnsupportedError: a video or sound is to be opened and PyAV is not installed.
    """
    if options.scan == "off":
        return ScanReport()
    workers = workers or min(16, 2 * (os.cpu_count() or 1))
    work = _Scan(options, options.scan, _Cache(cache), _Bar(title, total))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="media-scan")
    try:
        for row, medium in media:
            work.start(row, medium, pool)
            work.collect(at_most=workers * _QUEUED)
        work.collect(at_most=0)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        work.bar.close()
        work.cache.close()
    return ScanReport(work.checked, dict(sorted(work.bad.items())))


def scan_media(
    dataset: Any, name: str, options: MediaOptions | None = None, media_root: str | Path | None = None
) -> ScanReport:
    """Check the media of every row of a dataset, as ``options.scan`` says; streaming datasets are not scanned.

    Args:
        dataset: as ``VLMGRPOTrainer`` takes it.
        name: what messages and the progress bar call it.
        options: how media are opened and how closely they are looked at.
        media_root: the folder that relative media paths start from.

    Raises:
        DataFormatError: a row that is no sample.
        UnsupportedError: a video or sound is to be opened and PyAV is not installed.
    """
    options = options or MediaOptions()
    root = None if media_root is None else Path(media_root).expanduser()
    if not hasattr(dataset, "__len__"):
        return ScanReport()
    refused: dict[int, list[str]] = {}

    def media() -> Iterator[tuple[int, Medium]]:
        for number, row in enumerate(undecoded(dataset)[0], 1):
            try:
                sample = to_sample(row, root, f"{name} row {number}")
            except MediaError as error:  # of a type that cannot be a medium
                refused[number] = [str(error)]
                continue
            yield from ((number, medium) for medium in sample.media)

    report = scan(media(), options, f"Looking at the media of {name}")
    return ScanReport(report.checked, dict(sorted((report.bad | refused).items())))


class _Scan:
    """The state of one scan; only ``_look`` runs in the threads."""

    def __init__(self, options: MediaOptions, level: Literal["headers", "full"], cache: "_Cache", bar: "_Bar") -> None:
        self.options, self.cache, self.bar = options, cache, bar
        self.level: Literal["headers", "full"] = level
        self.checked = 0
        self.bad: dict[int, list[str]] = {}
        self.known: dict[tuple[str, str], str | None] = {}  # of files
        self.waiting: dict[Future, tuple[tuple[str, str] | None, list[tuple[int, str]]]] = {}
        self.running: dict[tuple[str, str], Future] = {}

    def start(self, row: int, medium: Medium, pool: ThreadPoolExecutor) -> None:
        self.checked += 1
        name = f'the {medium.kind} "{medium.label}"'
        file = (os.path.abspath(medium.source), self._about(medium)) if isinstance(medium.source, Path) else None
        if file in self.known:
            self._note(row, name, self.known[file])
        elif file in self.running:
            self.waiting[self.running[file]][1].append((row, name))
        else:
            future = pool.submit(self._look, medium, file)
            self.waiting[future] = (file, [(row, name)])
            if file is not None:
                self.running[file] = future

    def collect(self, at_most: int) -> None:
        """Take in what is done, until at most so many media wait."""
        while len(self.waiting) > at_most:
            for future in wait(self.waiting, timeout=1, return_when=FIRST_COMPLETED).done:
                file, rows = self.waiting.pop(future)
                problem, key = future.result()
                if file is not None:
                    self.known[file] = problem
                    self.running.pop(file)
                if key is not None:
                    self.cache.add(key)
                for row, name in rows:
                    self._note(row, name, problem)
            self.bar.show(self.checked - len(self.waiting))

    def _note(self, row: int, name: str, problem: str | None) -> None:
        if problem is not None:
            self.bad.setdefault(row, []).append(f"{name} {problem}")

    def _about(self, medium: Medium) -> str:
        heard = medium.kind == "video" and self.options.audio_in_video
        own = sorted(medium.overrides.items()) if medium.overrides else ""
        return f"{self.level} {medium.kind}{' heard' * heard} {self.options.max_audio_seconds or ''} {own}".strip()

    def _look(self, medium: Medium, file: tuple[str, str] | None) -> tuple[str | None, _Key | None]:
        """(the problem, what to remember where there is none)."""
        from ..media.check import check_medium

        key = None
        if file is not None:
            try:
                status = os.stat(file[0])
                key = (file[0], status.st_size, status.st_mtime_ns, file[1])
            except (OSError, ValueError):
                pass  # check_medium says it
            if key is not None and self.cache.holds(key):
                return None, None
        problem = check_medium(medium, self.level, self.options, self.options.audio_in_video)
        return problem, None if problem else key


class _Cache:
    """Files found good, in an SQLite database. One that cannot be used is done without."""

    def __init__(self, path: Path | None) -> None:
        self._lock = Lock()
        self._new: list[_Key] = []
        self._connection: sqlite3.Connection | None = None
        try:
            if path is None:
                folder = os.environ.get("VLM_GRPO_CACHE") or "~/.cache/vlm_grpo"
                path = Path(folder).expanduser() / "media-scan.sqlite"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_SECONDS_LOCKED, check_same_thread=False)
            self._connection.execute(
                "create table if not exists good (path text, size integer, time integer, about text, "
                "primary key (path, about)) without rowid"
            )
        except (OSError, RuntimeError, sqlite3.Error) as error:
            self._give_up(error)

    def holds(self, key: _Key) -> bool:
        with self._lock:
            if self._connection is None:
                return False
            try:
                query = "select 1 from good where path = ? and size = ? and time = ? and about = ?"
                return self._connection.execute(query, key).fetchone() is not None
            except (sqlite3.Error, UnicodeError) as error:
                self._give_up(error)
                return False

    def add(self, key: _Key) -> None:
        self._new.append(key)
        if len(self._new) >= _WRITTEN_AT_ONCE:
            self._write()

    def _write(self) -> None:
        with self._lock:
            new, self._new = self._new, []
            if self._connection is None or not new:
                return
            try:
                with self._connection:
                    self._connection.executemany("insert or replace into good values (?, ?, ?, ?)", new)
            except (sqlite3.Error, UnicodeError) as error:
                self._give_up(error)

    def close(self) -> None:
        self._write()
        if self._connection is not None:
            self._connection.close()

    def _give_up(self, error: Exception) -> None:
        logger.debug("The cache of checked media is not used (%s).", error)
        if self._connection is not None:
            self._connection.close()
        self._connection = None


class _Bar:
    """A progress bar that comes late, on a terminal only."""

    def __init__(self, title: str, total: int | None) -> None:
        self._title, self._total, self._start = title, total, time.monotonic()
        self._progress: Any = None

    def show(self, done: int) -> None:
        if self._progress is None and time.monotonic() - self._start > _SECONDS_WITHOUT_BAR and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task(self._title, total=self._total)
            self._progress.start()
        if self._progress is not None:
            self._progress.update(self._task, completed=done)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
