"""The run folder: opened for one process, compared with the config it was started with, never deleted."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .config import RunConfig, diff, load_config, to_yaml
from .errors import CheckpointError

CONFIG, RESULT, METRICS, SAMPLES, CURVES = "config.yaml", "result.json", "metrics.jsonl", "samples.jsonl", "curves.png"
# Neither changes what is learned: a run may be moved, and continued with another time limit.
_FREE_TO_CHANGE = ("output", "max_minutes")


@contextmanager
def open_run_folder(config: RunConfig, command: str, fresh: bool) -> Iterator[Path]:
    """The folder of a run, new or to be continued, locked against a second process.

    Raises:
        CheckpointError: it belongs to another run or command, holds other files, or is in use.
    """
    folder = Path(config.output).expanduser()
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CheckpointError(
            f"{folder}: another process is running here. Wait for it, or choose another output."
        ) from error
    try:
        if fresh:
            _set_aside(folder)
        check_run_folder(config, command)
        folder.mkdir(exist_ok=True)
        if not (folder / CONFIG).exists():
            _write(folder / CONFIG, f"# vlm-grpo {command}\n{to_yaml(config)}")
        yield folder
    finally:
        lock.release()


def check_run_folder(config: RunConfig, command: str) -> None:
    """Raise ``CheckpointError`` unless the run may start, or continue, in its output folder."""
    folder = Path(config.output).expanduser()
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


def _set_aside(folder: Path) -> None:
    if not folder.exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    os.rename(folder, aside)
