"""Judged pairs as a table for a terminal, and in sentences: what was learned, from the media, or from lengths."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..evaluate.page import accuracy_of, percent, points, states, title
from .figures import STRONG

_LEVEL = 0.05


def page(evaluation: dict[str, Any]) -> RenderableType:
    """The figures of every state side by side, and what they say.

    Args:
        evaluation: as a reward model's ``evaluation.json`` holds it.
    """
    found = {state: evaluation[state] for state in states(evaluation)}
    table = Table(title="Held-out pairs [95% interval]", title_justify="left")
    table.add_column("")
    for state, one in found.items():
        table.add_column(Text(title(state, one)), justify="right", overflow="fold")
    for name, cells in _lines(list(found.values())):
        table.add_row(Text(name), *map(Text, cells), style="bold" if name == "accuracy" else None)
    table.caption = (
        "score: mean ± standard deviation; likes length: Spearman's correlation of score and number of characters; "
        "takes longer: pairs whose longer response scores higher"
    )
    table.caption_justify = "left"
    return Group(table, *(Text(sentence) for sentence in sentences(evaluation)))


def _lines(found: list[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    yield "accuracy", [accuracy_of(state) for state in found]
    yield "margin", [f"{state['margin']:.2f}" for state in found]
    yield "score", [f"{state['mean_reward']:.2f} ± {state['reward_std']:.2f}" for state in found]
    yield "likes length", [_number(state["length_correlation"]) for state in found]
    yield "takes longer", [percent(state["prefers_longer"]) for state in found]
    yield "pairs", [str(state["rows"]) for state in found]
    for key, name in (("ties", "equal scores"), ("left_out", "left out")):
        if any(key in state for state in found):
            yield name, [str(state.get(key, 0)) for state in found]


def sentences(evaluation: dict[str, Any]) -> Iterator[str]:
    """What changed by training, whether the judge needs the media, and whether it likes length.

    The exact test decides: of few pairs, the bootstrap's interval is too narrow.
    """
    change = evaluation.get("change", {})
    if change.get("rows"):
        verdict = "more" if change["difference"] > 0 else "fewer"
        told = f"{verdict} pairs are right" if change["p"] < _LEVEL else "too little to tell the two apart"
        yield f"Change by training: {points(change, 'pairs')}: {told}."
    after = evaluation.get("after")
    if after is None:
        return
    if after.get("ties"):
        yield f"{after['ties']} of {after['rows']} pairs got equal scores; each counts as half right."
    if "control" in evaluation:
        yield _of_media(after, evaluation["control"])
    yield from _of_length(after)


def _of_media(after: dict[str, Any], control: dict[str, Any]) -> str:
    kept = ", the captions kept," if control.get("captions") else ""
    blank = f"With its media blanked{kept} the accuracy is {accuracy_of(control)}"
    low, high = after["ci95"]
    if control["ci95"][1] < low:
        return f"{blank}: the judge needs the media."
    if control["ci95"][0] > high:
        return f"{blank}, which is better than with them: look at the pairs."
    return f"{blank}, no less as far as these pairs tell: nothing shows that the judge needs the media."


def _of_length(after: dict[str, Any]) -> Iterator[str]:
    rho, wins = after["length_correlation"], after["longer_wins"]
    if rho is None or abs(rho) <= STRONG:
        return
    rule = "" if wins is None else f" On these pairs the rule that the longer one wins is right in {wins:.0%}."
    likes = "long" if rho > 0 else "short"
    yield f"This judge likes {likes} responses: score and length correlate by {rho:+.2f}.{rule}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
