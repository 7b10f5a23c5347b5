"""Are two formulas equal? math-verify's answer, in a process that a hostile formula can kill without harm."""

import atexit
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from decimal import Decimal

from ..errors import RewardError
from .answers import number_in

_LONGEST = 20_000  # characters; no formula is longer, and the grammar is not linear
_START_SECONDS = 120.0
_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed\b")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|\d\s+\d|^[A-Za-z\s]*$")

_SCIENTIFIC = re.compile(r"\S{0,40}\d[eE][-+]?\d{1,4}")  # Euler's number, to LaTeX


def math_equal(truth: str, given: str, seconds: float = 2.0) -> bool:
    r"""Whether two answers are equal as mathematics: ``1/2`` and ``0.5``, ``(x+1)^2`` and ``x^2+2x+1``.

    LaTeX is read between ``$…$``, ``\(…\)``, ``\[…\]`` or in ``\boxed{}`` (of several the boxed one, else the last),
    and so is a text that is nothing but a formula; of prose the one number that it answers, see ``number_in``. False
    for texts over 20,000 characters and for what takes longer than ``seconds``.

    Args:
        truth: the right answer.
        given: any text; no part of it is ever executed.
        seconds: CPU time for one comparison (where the system cannot count it: ten times that on the clock).

    Raises:
        RewardError: math-verify is not installed, or its process cannot start.
    """
    if max(len(truth), len(given)) > _LONGEST:
        return False
    right, said = _formula(truth), _formula(given)
    return right is not None and said is not None and _compare(right, said, seconds)


def _formula(text: str) -> str | None:
    """What math-verify is to read, or None."""
    text = text.strip()
    if _DELIMITED.search(text):
        return text
    if not _PROSE.search(text) and not _SCIENTIFIC.fullmatch(text):
        # LaTeX knows neither: a "%" begins a comment, and what follows "**" is dropped.
        return "$" + re.sub(r"(?<!\\)%", r"\\%", " ".join(text.replace("**", "^").split())) + "$"
    number = number_in(text)
    return None if number is None else format(Decimal(repr(number)), "f")


# The completions of a group often give the same answer.
@functools.lru_cache(maxsize=8192)
def _compare(truth: str, given: str, seconds: float) -> bool:
    with _lock:
        for _ in range(2):
            worker = _Worker.at_hand(seconds)
            answer = worker.ask(truth, given)
            if answer is not None:
                return answer
            if worker.was_slow:
                return False
    return False  # a formula that crashes sympy, and did so twice: not somebody else's kill


_lock = threading.Lock()


class _Worker:
    """The process that compares. One is enough: a comparison takes milliseconds."""

    current: "_Worker | None" = None

    def __init__(self, seconds: float) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise RewardError('method "math" compares with math-verify, which is missing: pip install math-verify.')
        self.seconds, self.parent, self.was_slow = seconds, os.getpid(), False
        with tempfile.TemporaryFile("w+") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vlm_grpo.rewards.math_worker", str(seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
            if self._line(_START_SECONDS) == "ready\n":
                return
            self.end()
            log.seek(0)
            said = (log.read().strip().splitlines() or ["no message"])[-1]
        raise RewardError(f'method "math": its process did not start ({said}). Try: python -c "import math_verify".')

    @classmethod
    def at_hand(cls, seconds: float) -> "_Worker":
        """The running one, or a new one where it has ended or belongs to the process that this was forked from."""
        worker = cls.current
        if worker and worker.parent == os.getpid() and worker.seconds == seconds and worker.process.poll() is None:
            return worker
        if worker and worker.parent == os.getpid():
            worker.end()
        cls.current = cls(seconds)
        return cls.current

    def ask(self, truth: str, given: str) -> bool | None:
        """None where the process has ended over it."""
        assert self.process.stdin is not None, "opened as a pipe"
        try:
            self.process.stdin.write(json.dumps([truth, given]) + "\n")
            self.process.stdin.flush()
        except OSError:  # it had ended before
            return None
        line = self._line(10 * self.seconds)
        if line in ("0\n", "1\n"):
            return line == "1\n"
        import signal

        if self.process.wait() == -getattr(signal, "SIGPROF", 0):
            self.was_slow = True
        return None

    def _line(self, seconds: float) -> str:
        """The next line of its output; empty where it ends, which it is made to after ``seconds`` on the clock."""
        assert self.process.stdout is not None, "opened as a pipe"
        timer = threading.Timer(seconds, self._too_slow)
        timer.daemon = True
        timer.start()
        try:
            return self.process.stdout.readline()
        finally:
            timer.cancel()

    def _too_slow(self) -> None:
        self.was_slow = True
        self.process.kill()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout):
            assert file is not None, "opened as a pipe"
            try:
                file.close()
            except BrokenPipeError:  # an unread line goes with the process
                continue


@atexit.register
def _end() -> None:
    worker = _Worker.current
    if worker and worker.parent == os.getpid():
        worker.end()
