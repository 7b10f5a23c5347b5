"""An evaluation as tables for a terminal, and in sentences: what changed, and what the media have to do with it."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_MOST_VALUES = 20  # of a column, in a table; evaluation.json has all
_YES_NO = {"f1": "F1", "precision": "precision", "recall": "recall", "yes_ratio": "yes ratio"}
_DONE = {
    "blank": "its media blanked",
    "shuffle": "media of other rows",
    "text": "no media",
}
_LEVEL = 0.05


def page(evaluation: dict[str, Any], titles: dict[str, str] | None = None) -> RenderableType:
    """The figures of every state side by side, what they say, and the accuracy by column.

    Args:
        evaluation: as ``evaluation.json`` holds it.
        titles: what the states are called.
    """
    found = {state: evaluation[state] for state in states(evaluation)}
    names = [(titles or {}).get(state) or title(state, found[state]) for state in found]
    table = Table(title="Held-out rows, greedy answers [95% interval]", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    for name, cells in _lines(list(found.values())):
        table.add_row(Text(name), *map(Text, cells), style="bold" if name == "accuracy" else None)
    parts: list[RenderableType] = [table]
    sentences = list(_sentences(evaluation))
    parts += [Text(sentence) for sentence in sentences]
    for column in next(iter(found.values()), {}).get("by", {}):
        parts += [Text(), _by(column, found, names)]
    return Group(*parts)


def states(evaluation: dict[str, Any]) -> list[str]:
    """The states that were measured: before, after, and the controls."""
    controls = [key for key in evaluation if key.partition(":")[0] == "control"]
    return [state for state in ("before", "after", *controls) if state in evaluation]


def title(state: str, found: dict[str, Any]) -> str:
    """``control (blank)``: a state in a table's head."""
    return f"control ({found['kind']})" if "kind" in found else state


def _lines(found: list[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    yield "accuracy", [accuracy_of(state) for state in found]
    for k in _keys(found, "pass@k"):
        yield f"pass@{k}", [percent(state.get("pass@k", {}).get(k)) for state in found]
    for key, name in (("war", "WAR"), ("uar", "UAR")):
        if any(key in state for state in found):
            yield name, [percent(state.get(key)) for state in found]
    if any("yes_no" in state for state in found):
        for key, name in _YES_NO.items():
            yield f"yes/no {name}", [percent(state.get("yes_no", {}).get(key)) for state in found]
    rewards = _keys(found, "rewards")
    for name in rewards:
        yield f"reward {name}", [_number(state["rewards"].get(name)) for state in found]
    if len(rewards) > 1:
        yield "reward, in all", [_number(state["reward"]) for state in found]
    yield "rows", [str(state["rows"]) for state in found]
    for key, name in (("left_out", "rows left out"), ("unscored", "rows without a verdict")):
        if any(key in state for state in found):
            yield name, [str(state.get(key, 0)) for state in found]
    for name in _keys(found, "failed"):
        yield f"failed: {name}", [str(state.get("failed", {}).get(name, 0)) for state in found]


def _keys(found: list[dict[str, Any]], section: str) -> list[str]:
    return list(dict.fromkeys(key for state in found for key in state.get(section, {})))


def _sentences(evaluation: dict[str, Any]) -> Iterator[str]:
    """What changed. The exact test decides: of few rows, the bootstrap's interval is too narrow."""
    if evaluation.get("change", {}).get("rows"):
        change = evaluation["change"]
        verdict = "more" if change["difference"] > 0 else "fewer"
        told = (
            f"{verdict} answers are right" if change["p"] < _LEVEL else "too little to tell the two apart on these rows"
        )
        yield f"Change: {points(change)}: {told}."
    for state in states(evaluation):
        found = evaluation[state]
        if "kind" in found and found["change"]["rows"]:
            change = found["change"]
            if change["p"] >= _LEVEL:
                told = "nothing shows that the answers hang on the media"
            elif change["difference"] < 0:
                told = "the answers hang on the media"
            else:
                told = "the answers are better that way, so look at the rows"
            yield f"With {_DONE.get(found['kind'], found['kind'])}: {points(change)}: {told}."


def points(change: dict[str, Any], what: str = "rows") -> str:
    """A paired change in words: difference, interval, p and how many."""
    low, high = (100 * end for end in change["ci95"])
    p = "p < 0.0001" if change["p"] < 0.0001 else f"p = {change['p']:.2g}"
    return f"{100 * change['difference']:+.1f} points [{low:+.1f}, {high:+.1f}], {p}, {change['rows']} {what}"


def _by(column: str, found: dict[str, dict[str, Any]], names: list[str]) -> Table:
    parts = [state.get("by", {}).get(column, {}) for state in found.values()]
    values = list(dict.fromkeys(value for part in parts for value in part))
    table = Table(title=f"Accuracy by {column}", title_justify="left")
    table.add_column(Text(column), overflow="fold")
    table.add_column("rows", justify="right")
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    for value in values[:_MOST_VALUES]:
        rows = max(part[value]["rows"] for part in parts if value in part)
        table.add_row(Text(value), str(rows), *(Text(accuracy_of(part.get(value))) for part in parts))
    if len(values) > _MOST_VALUES:
        table.caption = f"and {len(values) - _MOST_VALUES} more values in evaluation.json"
        table.caption_justify = "left"
    return table


def accuracy_of(found: dict[str, Any] | None) -> str:
    """A state's accuracy with its interval; a dash where nothing was scored."""
    if found is None or found.get("unscored", 0) == found["rows"] > 0:
        return "-"
    low, high = found["ci95"]  # without a space between, where a narrow terminal would break the line
    return f"{100 * found['accuracy']:.1f}% [{100 * low:.1f}–{100 * high:.1f}]"


def percent(value: float | None) -> str:
    """A share from 0 to 1; a dash for None."""
    return "-" if value is None else f"{100 * value:.1f}%"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
