"""The folder of an export: whole and checked, or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError
from .card import REPORT


def check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Raise ``ConfigError`` where an export may not go: over other files, or over what it is made from."""
    if source == target or target in source.parents:
        raise ConfigError(f"export: {target} holds the model that is exported. Choose another --output.")
    if target.is_mount():  # it cannot be renamed, which would come out after all the work
        raise ConfigError(f"export: {target} is where a disk is mounted. Choose a folder inside it as --output.")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / REPORT).is_file():
        raise ConfigError(f"export: {target} holds something else. Choose another --output.")
    if not overwrite:
        raise ConfigError(f"export: {target} holds an export. Choose another --output, or give --overwrite.")


@contextmanager
def all_or_nothing(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name at the end; after an exception it is gone, ``target`` as it was.

    What a killed process left there is removed first.
    """
    partial, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not target.exists():
            os.rename(old, target)
        partial.mkdir()
    except OSError as error:
        raise ConfigError(f"export: {target} cannot be made ({error.strerror}). Choose another --output.") from error
    try:
        yield partial
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
