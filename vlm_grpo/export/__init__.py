"""A trained run for others to use: as an adapter, merged in 16 or 4 bits, or for llama.cpp; reloaded and compared."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError

from ..errors import ConfigError, ExportError
from .card import write_card
from .export import Export
from .folder import all_or_nothing, check_target
from .gguf import find_converter
from .report import ExportReport
from .source import read_source

__all__ = ["ExportReport", "Form", "export_run"]

_LONGEST = 32  # tokens of an answer: each further one adds the logits of a whole vocabulary to what is compared
Form = Literal["lora", "merged_16bit", "merged_4bit", "gguf"]


def export_run(
    run: str | Path,
    to: Form,
    output: str | Path | None = None,
    *,
    backend: Literal["auto", "unsloth", "hf"] = "auto",
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
    rows: int = 8,
    data: str | None = None,
    max_new_tokens: int | None = None,
    llama_cpp: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a run in another form, load what was written, and compare it with the run on sample rows.

    The folder appears whole, and only if the comparison holds: the export's logits are the run's within rounding, and
    hold what the adapter changes in the base model's.

    Args:
        run: a run folder, one of its checkpoints, or a folder with an adapter or a model.
        to: ``lora`` (the adapter and its processor), ``merged_16bit``, ``merged_4bit`` (NF4 by bitsandbytes, towers of
            media in 16 bits), or ``gguf`` (for llama.cpp, in 16 bits).
        output: the folder to write; by default ``export-TO`` in the run folder.
        backend: what loads the run, and merges it; ``auto`` is the run's own.
        dtype: of the weights of a merged model that are not 4-bit.
        rows: how many rows to compare on: the run's held-out rows, else its training rows, else made-up prompts.
        data: a file or dataset name to take them from instead.
        max_new_tokens: longest answer that is compared, in tokens; by default the run's, and 32 at most.
        llama_cpp: the folder of llama.cpp; by default ``$LLAMA_CPP``, or what is on the PATH.
        overwrite: replace an older export in the same folder, once the new one holds.

    Returns:
        the figures of the comparison, also in the folder's ``export.json`` and ``README.md``.

    Raises:
        ConfigError: no such run, a folder that holds something, or an option that cannot be.
        ExportError: the export is not the run, the run is no other than its base model, or memory or the disk is
            too small; nothing is kept.
        UnsupportedError: the form cannot hold this run, or cannot be made on this machine.
    """
    _check(to, Form, "to")
    _check(dtype, Literal["bfloat16", "float16"], "dtype")
    for name, value in (("rows", rows), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"export: {name}={value} must be 1 or more. Correct it.")
    source = read_source(run)
    if to == "lora" and not source.is_adapter:
        raise ConfigError(f"export: {source.folder} is a whole model, without an adapter. Use --to merged_16bit.")
    target = Path(output).expanduser().resolve() if output else _usual_target(source.folder, source.run, to)
    check_target(target, source.folder, overwrite)
    converter = find_converter(llama_cpp) if to == "gguf" else None
    length = max_new_tokens or min(_LONGEST, source.train_option("max_completion_length") or _LONGEST)
    report = ExportReport(str(source.folder), to, str(target), source.base)
    try:
        with all_or_nothing(target) as folder:
            Export(source, report, backend, dtype, converter).go(folder, rows, data, length)
            write_card(folder, source, report)
    except torch.OutOfMemoryError as error:
        raise ExportError(
            f"export: the GPU has too little memory for {source.base or source.folder} in 16 bits. Nothing was kept; "
            'export on the CPU: CUDA_VISIBLE_DEVICES="" vlm-grpo export ...'
        ) from error
    except (OSError, SafetensorError) as error:
        if "No space left" not in str(error):  # the one sentence that both have for it
            raise
        raise ExportError(
            f"export: the disk of {target} is full. Nothing was kept; make room, or choose another --output."
        ) from error
    return report


def _usual_target(folder: Path, run: Path | None, to: str) -> Path:
    """In the run folder: checkpoints come and go."""
    if run is None or run == folder:
        return folder / f"export-{to}"
    return run / f"export-{to}-{folder.name}"


def _check(value: Any, known: Any, name: str) -> None:
    if value not in get_args(known):
        raise ConfigError(f"export: {name}={value!r} is not known. Choose one of {', '.join(get_args(known))}.")
