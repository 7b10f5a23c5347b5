"""``vlm-grpo export``."""

from typing import Annotated, Literal

import typer
from rich.table import Table

from .base import app, out, set_up_logging


@app.command(
    epilog="The export is loaded again and compared with the run; one that is not the run, or that answers like the "
    "base model, is not kept."
)
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, one of its checkpoints, or an adapter.")],
    to: Annotated[
        Literal["lora", "merged_16bit", "merged_4bit", "gguf"], typer.Option("--to", help="The form of the export.")
    ],
    output: Annotated[
        str | None, typer.Option("--output", help="Folder to write. Default: export-TO in the run folder.")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16"], typer.Option("--dtype", help="Number type of merged weights.")
    ] = "bfloat16",
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows that the export is compared with the run on.")] = 8,
    data: Annotated[str | None, typer.Option("--data", help="Rows to compare on. Default: the run's own.")] = None,
    backend: Annotated[
        Literal["auto", "unsloth", "hf"], typer.Option("--backend", help="What loads and merges. Default: as the run.")
    ] = "auto",
    llama_cpp: Annotated[
        str | None, typer.Option("--llama-cpp", help="Folder of llama.cpp, for gguf. Default: $LLAMA_CPP, or the PATH.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older export, once the new one holds.")] = (
        False
    ),
) -> None:
    """Write a trained run as an adapter, merged in 16 or 4 bits, or for llama.cpp; and check that it is the run."""
    set_up_logging()
    from ..export import export_run

    report = export_run(
        run,
        to,
        output,
        backend=backend,
        dtype=dtype,
        rows=rows,
        data=data,
        llama_cpp=llama_cpp,
        overwrite=overwrite,
    )
    table = Table(title=f"exported to {to}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in report.lines():
        table.add_row(name, value)
    out.print(table, markup=False)
