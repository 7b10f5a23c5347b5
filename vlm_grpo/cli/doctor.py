"""``vlm-grpo doctor``."""

import dataclasses
import json
from typing import Annotated

import typer

from .base import app, out


@app.command(
    help="Say what this machine and its packages can do for a run, and what to do about each problem.",
    epilog="Exit code 0 where nothing blocks a run, 1 where something does: those problems are marked.",
)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a page.")] = False,
) -> None:
    from .. import doctor as doctors
    from ..doctor.page import show

    diagnosis = doctors.diagnose()
    if as_json:
        typer.echo(json.dumps({"blocked": diagnosis.blocked, **dataclasses.asdict(diagnosis)}))
    else:
        show(diagnosis.facts, diagnosis.problems, out)
    if diagnosis.blocked:
        raise typer.Exit(1)
