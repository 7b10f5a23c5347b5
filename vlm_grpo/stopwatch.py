"""Where a step's seconds go."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

REST = "update"


class Stopwatch:
    """Seconds of wall time by phase. A phase within another counts for itself only; what no phase took is ``REST``."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._inner = [0.0]
        self._started = 0.0

    def start(self) -> None:
        """Begin a step."""
        self._seconds, self._inner, self._started = {}, [0.0], _now()

    def stop(self) -> dict[str, float]:
        """The seconds of the step by phase."""
        rest = _now() - self._started - sum(self._seconds.values())
        return {**self._seconds, REST: rest}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = _now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = _now() - start
            self._seconds[phase] = self._seconds.get(phase, 0.0) + spent - self._inner.pop()
            self._inner[-1] += spent


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a phase is over when the GPU is done with it
    return time.perf_counter()
