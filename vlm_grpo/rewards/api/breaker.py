"""A circuit breaker: a server that does not answer is left alone for a while."""

import asyncio
import time
from threading import Lock
from typing import Literal

Entry = Literal["usual", "probe"]

_POLL = 0.01  # seconds


class Breaker:
    """Opens after ``failures`` requests in a row without an answer; after ``seconds`` one probe is let through.

    While the probe is under way others wait for what it finds: a server that is back then loses none of them.

    Args:
        failures: requests in a row, each with all of its retries.
        seconds: how long no request is made.
    """

    def __init__(self, failures: int, seconds: float) -> None:
        self.failures, self.seconds = failures, seconds
        self.opened = 0  # times
        self._lock = Lock()
        self._in_a_row = 0
        self._until: float | None = None
        self._probing = False

    async def enter(self) -> Entry | None:
        """Whether a request may be made now, and as what; None is no. A ``leave`` answers each that may."""
        while True:
            with self._lock:
                if self._until is None:
                    return "usual"
                if not self._probing:
                    if time.monotonic() < self._until:
                        return None
                    self._probing = True
                    return "probe"
            await asyncio.sleep(_POLL)

    @property
    def open(self) -> bool:
        """Whether the server counts as down; a probe may be under way."""
        return self._until is not None

    def leave(self, entry: Entry, answered: bool | None) -> None:
        """Note whether the server answered; None where the request was given up before that was known."""
        with self._lock:
            self._probing = self._probing and entry != "probe"
            if answered is None:
                return
            if answered:
                self._in_a_row, self._until = 0, None
                return
            self._in_a_row += 1
            if self._in_a_row >= self.failures or entry == "probe":
                self.opened += self._until is None
                self._until = time.monotonic() + self.seconds
