"""At most so many requests, and so many tokens, in any minute."""

import asyncio
import time
from collections import deque
from threading import Lock

MINUTE = 60.0


class Window:
    """At most ``limit`` in any ``seconds``; holds across calls, event loops and threads.

    A window that slides, and not a bucket that fills: a bucket lets through up to twice the limit within a minute.

    Args:
        limit: of the sum; None is no limit.
        seconds: length of the window.
    """

    def __init__(self, limit: int | None, seconds: float = MINUTE) -> None:
        self.limit, self.seconds = limit, seconds
        self.waited = 0.0  # seconds, of all requests together
        self._lock = Lock()
        self._taken: deque[list[float]] = deque()  # [time, amount], oldest first

    async def take(self, amount: float = 1.0) -> list[float]:
        """Wait until ``amount`` fits, and take it; what exceeds the whole limit waits for an empty window.

        Returns:
            the entry; ``correct`` changes it.
        """
        while True:
            with self._lock:
                entry, wait = self._try(amount)
            if entry is not None:
                return entry
            self.waited += wait
            await asyncio.sleep(wait)

    def correct(self, entry: list[float], amount: float) -> None:
        """What the request turned out to cost, in place of what was taken for it."""
        with self._lock:
            entry[1] = amount

    def _try(self, amount: float) -> tuple[list[float] | None, float]:
        now = time.monotonic()
        while self._taken and self._taken[0][0] <= now - self.seconds:
            self._taken.popleft()
        spent = sum(entry[1] for entry in self._taken) if self.limit is not None else 0.0
        if self.limit is None or spent + amount <= self.limit or not self._taken:
            entry = [now, amount]
            if self.limit is not None:
                self._taken.append(entry)
            return entry, 0.0
        for when, freed in self._taken:  # the first moment at which enough has left the window
            spent -= freed
            if spent + amount <= self.limit:
                return None, max(0.001, when + self.seconds - now)
        return None, max(0.001, self._taken[-1][0] + self.seconds - now)
