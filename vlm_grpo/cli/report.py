"""``vlm-grpo report``."""

import webbrowser
from typing import Annotated

import typer

from .base import app, err, out, set_up_logging


@app.command(epilog="A finished run has its page already; this writes it anew, also while the run goes on.")
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or what eval wrote into it.")],
    output: Annotated[
        str | None, typer.Option("--output", help="The page to write. Default: report.html in the run folder.")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Write one page, without network, of what a run did: curves, held-out answers, samples with their media."""
    set_up_logging()
    with err.status("reading the run"):
        from ..report import write_report

        page = write_report(run, output)
    out.print(str(page), markup=False, highlight=False, soft_wrap=True)
    if open_it and not webbrowser.open(page.resolve().as_uri()):
        err.print("No browser can be opened here. Open the file above yourself.", markup=False, highlight=False)
