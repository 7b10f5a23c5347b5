"""Compares formulas for ``math_answers.py``, in a process of its own: a JSON line [truth, given] in, "1" or "0" out.

A hostile formula (``9^{9^{9^9}}``) keeps the interpreter in one C call for ever, or fills the memory. No exception and
no thread can end that, and math-verify's own limit takes SIGALRM and the main thread; the kernel can end a process.
"""

import json
import logging
import signal
import sys

_MEMORY = 4 << 30  # bytes of address space; sympy alone takes 0.3 GiB


def main() -> None:
    """Answer until the input ends. The first line out says that it is ready, the argument is CPU seconds a line."""
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's, which goes on to its next checkpoint
    if sys.platform == "linux":  # macOS refuses the limit
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY if hard < 0 else min(hard, _MEMORY), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    logging.disable(logging.CRITICAL)  # math-verify warns that the time limit is the caller's: it is
    _equal("$\\frac{1}{2}$", "$0.5$")  # builds its tables, which takes longer than most formulas
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        truth, given = json.loads(line)
        _cpu_limit(seconds)
        equal = _equal(truth, given)
        _cpu_limit(0)
        print(int(equal), file=out, flush=True)


def _cpu_limit(seconds: float) -> None:
    """The kernel ends this process after so much computing; time spent waiting for a busy machine does not count."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _equal(truth: str, given: str) -> bool:
    from math_verify import parse, verify

    # Its plain expressions are digits and operators only, its LaTeX goes through a grammar: neither can name anything.
    try:
        parsed = [parse(text, parsing_timeout=None) for text in (truth, given)]  # pyright: ignore[reportArgumentType]
        return verify(parsed[0], parsed[1], timeout_seconds=None)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError):
        return False  # what sympy raises about formulas that mean nothing


if __name__ == "__main__":
    main()
