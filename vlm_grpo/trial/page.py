"""What a trial of rewards found, as a table with a small histogram a line, and as JSON."""

from typing import Any

from rich.table import Table

from . import Trial, histogram, range_of

_BARS = " ▁▂▃▄▅▆▇█"


def table_of(trial: Trial) -> Table:
    """A line for each reward and kind of completion: the mean, the range, who was left out, and the histogram."""
    table = Table(
        title=f"what each reward gives, {trial.rows} rows",
        title_justify="left",
        caption_justify="left",
        caption="histogram: ten equal parts of the reward's own range",
    )
    table.add_column("reward", no_wrap=True)
    table.add_column("completions", no_wrap=True)
    for name in ("mean", "lowest", "highest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("histogram", no_wrap=True)
    table.add_column("no number", overflow="fold")
    for name, found in trial.scores.items():
        low, high = range_of(found)
        for number, (kind, scores) in enumerate(found.items()):
            numbers = (
                [f"{value:.3g}" for value in (scores.mean, min(scores.values), max(scores.values))]
                if (scores.values)
                else ["–"] * 3
            )
            apart = [f"{count} {what}" for count, what in ((scores.none, "None"), (scores.failed, "failed")) if count]
            bars = _bars(histogram(scores, low, high))
            table.add_row("" if number else name, kind, *numbers, bars, ", ".join(apart))
        table.add_section()
    return table


def _bars(counts: list[int]) -> str:
    """One block a bin, as high as its share of the fullest; a bin that is not empty is never blank."""
    most = max(counts)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] if most else " " for count in counts)


def as_json(trial: Trial) -> dict[str, Any]:
    """The same figures: ``{"rows", "rewards": {name: {kind: {"mean", "values", "none", "failed"}}}, "warnings"}``."""
    rewards = {
        name: {
            kind: {"mean": scores.mean, "values": scores.values, "none": scores.none, "failed": scores.failed}
            for kind, scores in found.items()
        }
        for name, found in trial.scores.items()
    }
    return {"rows": trial.rows, "rewards": rewards, "warnings": trial.warnings}
