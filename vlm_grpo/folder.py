"""The run folder: opened for one process, compared with the config it was started with, never deleted."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .config import RunConfig, diff, load_config, to_yaml
from .errors import CheckpointError

CONFIG, RESULT, METRICS, SAMPLES, CURVES = "config.yaml", "result.json", "metrics.jsonl", "samples.jsonl", "curves.png"
logger = logging.getLogger("vlm_grpo")

INPUTS, EVALUATION, EVALUATION_ROWS, NOTES = "inputs.json", "evaluation.json", "evaluation.jsonl", "notes.jsonl"
# What a run has written before its first step; "completions" is TRL's.
_BEFORE_TRAINING = {CONFIG, INPUTS, EVALUATION, EVALUATION_ROWS, NOTES, "completions"}
# Neither changes what is learned: a run may be moved, and continued with another time limit.
_FREE_TO_CHANGE = ("output", "max_minutes", "media.scan", "media.on_bad", "train.flow_check", "train.gradient_check")


@contextmanager
def open_run_folder(config: RunConfig, command: str, fresh: bool) -> Iterator[Path]:
    """The folder of a run, new or to be continued, locked against a second process.

    A run that fails before its first step leaves everything as it was: the next try may have other options.

    Raises:
        CheckpointError: it belongs to another run or command, holds other files, or is in use.
    """
    folder = run_folder(config)
    if not is_main_process():
        yield folder
        return
    if not fresh:
        check_run_folder(config, command)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    missing = [path for path in (Path(lock.lock_file), folder, *folder.parents) if not path.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CheckpointError(
            f"{folder}: another process is running here. Wait for it, or choose another output."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made ({error.strerror}). Choose another output folder.") from error
    aside = _set_aside(folder) if fresh else None
    try:
        check_run_folder(config, command)
        folder.mkdir(exist_ok=True)
        is_new = not (folder / CONFIG).exists()
        if is_new:
            _write(folder / CONFIG, f"# vlm-grpo {command}\n{to_yaml(config)}")
        try:
            yield folder
        except Exception:
            if is_new and {path.name for path in folder.iterdir()} <= _BEFORE_TRAINING:
                _take_back(folder, aside, missing)
            raise
    finally:
        lock.release()


def run_folder(config: RunConfig) -> Path:
    """The absolute path of the run's folder."""
    return Path(config.output).expanduser().resolve()


def is_main_process() -> bool:
    """Whether this process of a distributed run is the one that writes; a launcher sets RANK."""
    return os.environ.get("RANK", "0") == "0"


def check_run_folder(config: RunConfig, command: str) -> None:
    """Raise ``CheckpointError`` unless the run may start, or continue, in its output folder."""
    folder = run_folder(config)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file. Choose another output folder.")
    if not (folder / CONFIG).is_file():
        if any(folder.iterdir()):
            raise CheckpointError(f"{folder} holds other files and no run. Choose another output folder.")
        return
    first_line = (folder / CONFIG).read_text(encoding="utf-8").partition("\n")[0]
    began_as = first_line.rpartition(" ")[2]
    if began_as != command:
        raise CheckpointError(
            f'{folder} holds a "{began_as}" run, not a "{command}" run. Choose another output folder.'
        )
    changes = [
        line for line in diff(load_config(folder / CONFIG), config) if line.partition(":")[0] not in _FREE_TO_CHANGE
    ]
    if changes:
        raise CheckpointError(
            f"{folder} was started with other options ({'; '.join(changes)}). Give the old ones to continue it, "
            "choose another output, or add --fresh to set the old folder aside."
        )


def check_inputs(folder: Path, rows: list[Path], rewards: list[Path], kept: dict[str, str]) -> None:
    """Remember the content of the run's files, and compare it with what the run began with.

    A changed row would shift the order in which all rows come: ``CheckpointError``. A reward may have been mended, so
    a changed one is only said. ``kept`` stands, by dataset, for the rows that the scan of their media kept: another
    choice shifts the rows too.
    """
    files = [path for path in (*rows, *rewards) if path.is_file()]
    now = {str(path.resolve()): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    now |= {f"the rows left out of {name}": digest for name, digest in kept.items()}
    before = read_json(folder / INPUTS)
    changed = {path for path, digest in before.items() if now.get(path, digest) != digest}
    mended = changed & {str(path.resolve()) for path in rewards}
    if changed - mended:
        raise CheckpointError(
            f"{folder} was started with another content of {' and '.join(sorted(changed - mended))}. Put it back to "
            "continue the run, choose another output, or add --fresh to set the old folder aside."
        )
    for path in sorted(mended):
        logger.warning("%s has changed since the run began: from here on the new rewards count.", path)
    if {**before, **now} != before:
        write_json(folder / INPUTS, {**before, **now})


def write_json(path: Path, value: Any) -> None:
    """Write beside and rename: a reader sees the old file or the new one."""
    _write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The file's object, or an empty one when there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _take_back(folder: Path, aside: Path | None, missing: list[Path]) -> None:
    """Remove what a run wrote before its first step, and put the run that it was to replace back."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if aside is not None:
        folder.rmdir()
        os.rename(aside, folder)
    with suppress(OSError):  # another run may have begun beside this one
        for path in missing:
            path.rmdir() if path.is_dir() else path.unlink()


def _set_aside(folder: Path) -> Path | None:
    if not folder.exists():
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    os.rename(folder, aside)
    return aside
