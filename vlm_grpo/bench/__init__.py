"""``vlm-grpo bench``: TRL's own trainer and ours side by side, in one process, on the same prompts and seeds.

Model, prompts and media are made in code with random contents, so nothing is downloaded and anyone can repeat it.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .options import BenchOptions, Modality, ShapeName

if TYPE_CHECKING:
    from .contest import Contest

__all__ = ["BenchOptions", "Modality", "ShapeName", "against", "bench", "run_bench"]


def bench(
    options: BenchOptions, groups: list[int] | None = None, as_json: bool = False, plot: str | None = None
) -> dict[str, Any]:
    """Measure, print a table and draw a picture.

    Args:
        options: the case.
        groups: several values of ``num_generations``, measured one after the other.
        as_json: print one JSON object as the last line of stdout, everything else to stderr.
        plot: where a PNG goes.

    Returns:
        the object that ``as_json`` prints: ``run_bench``'s, or of several groups ``{"sweep": [one of each]}``.

    Raises:
        ConfigError: as ``run_bench``.
    """
    from .compare import run_bench
    from .picture import draw
    from .table import print_result

    console = Console(stderr=as_json)
    cases = [replace(options, num_generations=group) for group in groups or [options.num_generations]]
    results = []
    for case in cases:
        with _quiet(), console.status("") as status:
            results.append(run_bench(case, lambda text: _print(console, text), status.update))
        print_result(console, results[-1])
    figures = results[0] if len(results) == 1 else {"sweep": results}
    if as_json:  # first: a picture that cannot be written must not cost the figures
        print(json.dumps(figures))
    if plot:
        draw(results, Path(plot))
        _print(console, f"drawn: {plot}")
    return figures


def against(case: "Contest", as_json: bool = False, plot: str | None = None) -> dict[str, Any]:
    """Measure whole trainers against each other; print and draw as ``bench`` does.

    Returns:
        see ``contest.run_contest``.

    Raises:
        ConfigError, UnsupportedError: as ``contest.run_contest``.
    """
    from .contest import run_contest
    from .picture import draw_contest
    from .table import print_contest

    console = Console(stderr=as_json)
    with _quiet(), console.status("") as status:
        result = run_contest(case, lambda text: _print(console, text), status.update)
    print_contest(console, result)
    if as_json:
        print(json.dumps(result))
    if plot:
        draw_contest(result, Path(plot))
        _print(console, f"drawn: {plot}")
    return result


def run_bench(options: BenchOptions, **report: Any) -> dict[str, Any]:
    """Measure one case; see ``compare.run_bench``."""
    from .compare import run_bench as run

    return run(options, **report)


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What libraries say about a model made in code helps nobody here."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
