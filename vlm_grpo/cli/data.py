"""``vlm-grpo data``: look at a data file, or write it in the canonical format."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import ConfigError
from ..options import MediaOptions
from .base import app, err, out, set_up_logging

data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at data files, and convert them.")
app.add_typer(data, name="data")

_Split = Annotated[str, typer.Option("--split", help="Split of a folder or dataset name.")]
_MediaRoot = Annotated[
    str | None, typer.Option("--media-root", help="Folder that relative media paths start from. Default: the file's.")
]
_Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many rows.")]
_Format = Annotated[str | None, typer.Option("--format", help="Row format by name. Default: recognised row by row.")]
_Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns", metavar="OURS=THEIRS", help="What the file calls a column, as in answer=label. Repeatable."
    ),
]
_Tags = Annotated[
    list[str] | None,
    typer.Option("--tags", metavar="TAG=NAME", help="Names inside a turn, as in user_tag=asker. Repeatable."),
]
_Scan = Annotated[
    Literal["headers", "full", "off"],
    typer.Option("--scan", help="Open every medium and read its header, decode it whole, or leave it."),
]


@data.command(
    "inspect",
    help="Say what a data file holds: its format, columns, media and answers, and every problem with its row.",
    epilog="Exit code 0 where no row has a problem, 1 where one has, 2 where the file cannot be read at all.",
)
def inspect_data(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A .jsonl, .json, .parquet or .csv file, a folder, or a dataset name.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="Count prompt tokens with this model's processor; loads no weights.")
    ] = None,
    max_prompt_length: Annotated[
        int | None,
        typer.Option("--max-prompt-length", min=1, help="With --model: longer prompts, media included, are problems."),
    ] = None,
    split: _Split = "train",
    media_root: _MediaRoot = None,
    limit: _Limit = None,
    format: _Format = None,
    columns: _Columns = None,
    tags: _Tags = None,
    scan: _Scan = "headers",
    html: Annotated[
        str | None,
        typer.Option("--html", metavar="PATH", help="Write a page with the first rows as the model will see them."),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows on that page.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a page.")] = False,
) -> None:
    if max_prompt_length is not None and model is None:
        raise ConfigError(f"--max-prompt-length {max_prompt_length}: only a model's processor can count. Add --model.")
    set_up_logging()
    from .. import inspection
    from ..inspection.page import show
    from ..inspection.summary import as_dict

    options = inspection.Options(
        shown=rows if html else 0, **_options(split, media_root, limit, format, columns, tags, scan)
    )
    tokens = None
    if model is not None:
        from ..inspection.tokens import TokenTally

        tokens = TokenTally(model, options.media, max_prompt_length)
    found = inspection.inspect(file, options, tokens)
    if html is not None:
        from ..inspection.html import write_html

        write_html(found, Path(html).expanduser())
    if as_json:
        typer.echo(json.dumps(as_dict(found)))
    else:
        show(found, out)
        if html is not None:
            out.print(f"\nPage: {html}", markup=False, highlight=False, soft_wrap=True)
    if found.problems.count:
        raise typer.Exit(1)


@data.command(
    "convert",
    help="Write the rows of a data file in the canonical format (prompt, media, answer), without loss.",
    epilog="Bad rows stop it with the list of them, exit code 1, and nothing is written; --drop-bad leaves them out.",
)
def convert_data(
    file: Annotated[
        str,
        typer.Argument(metavar="IN", help="A .jsonl, .json, .parquet or .csv file, a folder, or a dataset name."),
    ],
    target: Annotated[str, typer.Argument(metavar="OUT", help="A .jsonl or .parquet file, or a folder for the file.")],
    split: _Split = "train",
    media_root: _MediaRoot = None,
    limit: _Limit = None,
    format: _Format = None,
    columns: _Columns = None,
    tags: _Tags = None,
    scan: _Scan = "headers",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")] = False,
    drop_bad: Annotated[bool, typer.Option("--drop-bad", help="Leave bad rows out, and count them.")] = False,
) -> None:
    set_up_logging()
    from .. import inspection
    from ..inspection.page import problems_table

    options = inspection.Options(**_options(split, media_root, limit, format, columns, tags, scan))
    done = inspection.convert(file, Path(target), options, overwrite, drop_bad)
    if done.problems.count:
        err.print(problems_table(done.problems), highlight=False)
    if done.out is None:
        bad = f"{done.problems.bad_rows:,} row{'s' * (done.problems.bad_rows != 1)}"
        hint = "" if drop_bad else ", or add --drop-bad to leave them out"
        err.print(f"Nothing was written: {bad} of {file} cannot be. Correct them{hint}.", style="red", highlight=False)
        raise typer.Exit(1)
    formats = ", ".join(f"{name} {count:,}" for name, count in done.formats.most_common())
    said = [f"{done.out}: {done.rows:,} rows (from {formats})"]
    said += [f"{done.media:,} media files in {done.media_folder}"] if done.media else []
    said += [f"{done.left_out:,} bad rows left out"] if done.left_out else []
    out.print("; ".join(said), markup=False, highlight=False, soft_wrap=True)


def _options(
    split: str,
    media_root: str | None,
    limit: int | None,
    format: str | None,
    columns: list[str] | None,
    tags: list[str] | None,
    scan: Literal["headers", "full", "off"],
) -> dict[str, Any]:
    return {
        "split": split,
        "media_root": None if media_root is None else Path(media_root),
        "limit": limit,
        "format": format,
        "columns": _pairs("--columns", columns),
        "tags": _pairs("--tags", tags),
        "media": MediaOptions(scan=scan),
    }


def _pairs(option: str, texts: list[str] | None) -> dict[str, str] | None:
    """``a=b``, repeated or separated by commas."""
    pairs = [pair.strip() for text in texts or [] for pair in text.split(",")]
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not (name and sign and value):
            raise ConfigError(f"{option} {pair}: needs a name on both sides of =, as in answer=label.")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)} or None
