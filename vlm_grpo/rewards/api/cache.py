"""Scores already had, on disk: their keys are hashes, so that neither texts nor media nor API keys are kept."""

import hashlib
import json
import logging
import sqlite3
from pathlib import Path
from threading import Lock
from typing import Any

logger = logging.getLogger(__name__)

_SECONDS_LOCKED = 10.0
_AT_ONCE = 500  # keys of one query; SQLite allows 999 in old versions


def key_of(*parts: Any) -> str:
    """The hash of plain data: dicts in any order of their keys are the same."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class ScoreCache:
    """Scores by key, in an SQLite database that several runs may share.

    One that cannot be used is done without, after one warning.

    Args:
        path: of the database; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = Lock()
        self._opened = False
        self._connection: sqlite3.Connection | None = None

    def get(self, keys: list[str]) -> dict[str, float | None]:
        """The scores that are there; None is one too: the server's "not applicable"."""
        found: dict[str, float | None] = {}
        with self._lock:
            connection = self._open()
            for start in range(0, len(keys) if connection else 0, _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                marks = ",".join("?" * len(some))
                try:
                    assert connection is not None, "there are no keys to look for without one"
                    found |= dict(connection.execute(f"select key, score from scores where key in ({marks})", some))
                except sqlite3.Error as error:
                    self._give_up(error)
                    break
        return found

    def add(self, scores: dict[str, float | None]) -> None:
        """Keep these as well."""
        with self._lock:
            connection = self._open()
            if connection is None or not scores:
                return
            try:
                with connection:
                    connection.executemany("insert or replace into scores values (?, ?)", list(scores.items()))
            except sqlite3.Error as error:
                self._give_up(error)

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection, self._opened = None, False

    def _open(self) -> sqlite3.Connection | None:
        if self._opened or self.path is None:
            return self._connection
        self._opened = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=_SECONDS_LOCKED, check_same_thread=False)
            self._connection.execute(
                "create table if not exists scores (key text primary key, score real) without rowid"
            )
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)
        return self._connection

    def _give_up(self, error: Exception) -> None:
        logger.warning(
            'The cache of scores "%s" cannot be used (%s): every completion is sent. Delete the file, give another '
            "path as cache, or cache: false.",
            self.path,
            error,
        )
        if self._connection is not None:
            self._connection.close()
        self._connection = None
