"""``vlm-grpo eval``."""

import json
from typing import Annotated, Literal

import typer

from .base import app, help_of, out, set_up_logging


@app.command(
    "eval",
    epilog="The run's config says which rewards, rows and limits count where none are given. RUN/eval-DATA gets "
    "evaluation.json and, a line a row, evaluation.jsonl.",
)
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, a checkpoint, or any model that train takes.")],
    data: Annotated[str | None, typer.Option("--data", help="Held-out rows. Default: the run's own.")] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="Run or model to compare with; base: this one before its adapter."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Draw so many answers a row besides, for pass@k.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of drawn answers. Default: as the run, or 1.")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            help="Ask again with media blank, of other rows (shuffle) or left out (text), or none of these. "
            "Default: blank. Repeatable.",
        ),
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option("--reward", help="A reward, as train takes it. Default: the run's. Repeatable.")
    ] = None,
    correct: Annotated[
        str | None,
        typer.Option(
            "--correct", help="The reward that says what is right, by its full marks. Default: the first on content."
        ),
    ] = None,
    by: Annotated[list[str] | None, typer.Option("--by", help="A column to break accuracy down by. Repeatable.")] = (
        None
    ),
    labels: Annotated[
        bool | None,
        typer.Option("--labels/--no-labels", help="Answers are classes, with a recall each. Default: where few."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use only the first so many rows.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of the dataset, where it has several.")] = None,
    media_root: Annotated[
        str | None, typer.Option("--media-root", help="Folder that relative media paths start from.")
    ] = None,
    on_bad_media: Annotated[
        Literal["error", "drop"] | None,
        typer.Option("--on-bad-media", help="Rows with bad media stop the command, or are left out on both sides."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Answers at a time.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer. Default: as the run.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of drawn answers, shuffled media and resampling.")] = 0,
    output: Annotated[str | None, typer.Option("--output", help="Folder of the figures. Default: RUN/eval-DATA.")] = (
        None
    ),
    save_rows: Annotated[
        str | None,
        typer.Option("--save-rows", help="Write the rows with their pass_rate here (.jsonl or .parquet)."),
    ] = None,
    backend: Annotated[
        Literal["auto", "unsloth", "hf"] | None, typer.Option("--backend", help=help_of("backend"))
    ] = None,
    load_in_4bit: Annotated[
        bool | None, typer.Option("--load-in-4bit/--no-load-in-4bit", help=help_of("load_in_4bit"))
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None, typer.Option("--dtype", help=help_of("dtype"))
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and no table.")] = False,
) -> None:
    """Measure a run on held-out rows: before, after, and without its media; with intervals."""
    set_up_logging()
    from ..models import import_unsloth_first, is_adapter

    import_unsloth_first(backend or "auto", is_adapter(run))
    from ..evaluate.page import page
    from ..evaluating import evaluate_run

    loading = {"backend": backend, "load_in_4bit": load_in_4bit, "dtype": dtype}
    report = evaluate_run(
        run,
        data,
        baseline=baseline,
        samples=samples or 0,
        controls=tuple(name for name in control or ["blank"] if name != "none"),
        rewards=tuple(reward or ()),
        correct=correct,
        by=tuple(by or ()),
        labels="auto" if labels is None else "yes" if labels else "no",
        limit=limit,
        split=split,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        output=output,
        save_rows=save_rows,
        media_root=media_root,
        on_bad_media=on_bad_media,
        loading={name: value for name, value in loading.items() if value is not None},
    )
    if as_json:
        print(json.dumps({**report.evaluation, "folder": str(report.folder)}, ensure_ascii=False))
        return
    out.print(page(report.evaluation, report.titles), highlight=False)
    out.print(f"evaluation.json, evaluation.jsonl: {report.folder}", highlight=False, markup=False, soft_wrap=True)
