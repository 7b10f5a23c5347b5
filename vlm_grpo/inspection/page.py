"""An inspection as a page for a terminal of any width."""

from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .looking import Inspection
from .problems import Problems
from .summary import answers, counts, media_figures, rows_text, token_figures, traps

_BAR = 20  # characters of a full share
_PROBLEMS = 200  # lines; --json gives the rest


def show(found: Inspection, console: Console) -> None:
    """Print the page."""
    console.print(page(found), highlight=False)


def page(found: Inspection) -> RenderableType:
    """Everything found; the problems at the end, where a terminal leaves the reader."""
    parts: list[RenderableType] = []
    for title, body in (
        (f"{found.name}", _pairs(counts(found))),
        ("Columns", _columns(found)),
        ("Media (least · median · most)", _media(found)),
        (f"Prompt tokens{_of_model(found)}", _pairs(token_figures(found))),
        ("Answers", _answers(found)),
        ("Notes", _notes(found)),
        ("Problems", problems_table(found.problems)),
    ):
        if body is not None:
            parts += [Text(title, style="bold"), Padding(body, (0, 0, 0, 2)), Text()]
    return Group(*parts[:-1])


def _of_model(found: Inspection) -> str:
    return f" with {found.tokens.name} (least · median · 95% · most)" if found.tokens else ""


def _table(*columns: str) -> Table:
    table = Table(box=None, show_header=bool(columns), padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _pairs(pairs: Iterable[tuple[str, str]]) -> Table | None:
    table = _table()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name), Text(value))
    return table if table.row_count else None


def _columns(found: Inspection) -> Table | None:
    table = _table("column", "type", "filled", "different", "example")
    table.columns[0].no_wrap = True
    for column in found.columns:
        distinct = f"{len(column.distinct):,}{'+' * column.distinct.more}"
        types = Text(found.columns.type_text(column), style="yellow" if len(column.types) > 1 else "")
        filled = f"{column.filled / found.columns.rows:.0%}"
        table.add_row(Text(column.name), types, filled, distinct, Text(column.example))
    return table if table.row_count else None


def _media(found: Inspection) -> Table | None:
    table = _table()
    for _ in range(3):
        table.add_column(overflow="fold")
    last = ""
    for kind, what, value in media_figures(found):
        table.add_row(Text(kind if kind != last else ""), Text(what), Text(value))
        last = kind
    return table if table.row_count else None


def _answers(found: Inspection) -> Table | None:
    table = _table("answer", "rows", "share", "")
    table.columns[1].justify = table.columns[2].justify = "right"
    for text, count, share in answers(found):
        table.add_row(Text(text), f"{count:,}", f"{share:.0%}", Text("█" * round(share * _BAR), style="blue"))
    return table if table.row_count else None


def _notes(found: Inspection) -> Table | None:
    table = _table()
    table.add_column(overflow="fold")
    for sentence in traps(found):
        table.add_row(Text(sentence, style="yellow"))
    return table if table.row_count else None


def problems_table(found: Problems) -> RenderableType:
    """Every problem: which rows, what, and what to do."""
    problems = list(found)
    if not problems:
        return Text("none", style="green")
    table = _table("row", "what", "what to do")
    for problem in problems[:_PROBLEMS]:
        rows = rows_text(problem.rows, problem.count)
        table.add_row(Text(rows, style="bold red"), Text(problem.what), Text(problem.fix))
    hidden = sum(problem.count for problem in problems[_PROBLEMS:]) + found.unlisted
    if not hidden:
        return table
    return Group(table, Text(f"and {hidden:,} more; --json lists the first thousand kinds.", style="dim"))
