"""The rows of a run: loaded, their media looked at, and those that cannot be used refused or left out and counted."""

import hashlib
import logging
from dataclasses import dataclass, field
from typing import Any

from .config import RunConfig
from .data import load_data
from .data.scan import scan_media
from .errors import MediaError

logger = logging.getLogger("vlm_grpo")


@dataclass
class RunRows:
    """What a run trains on and is measured by.

    Attributes:
        train: a ``Dataset``, or with ``data.streaming`` an ``IterableDataset``.
        held_out: a ``Dataset``, or None.
        left_out: rows without good media, by dataset.
        kept: a checksum of which ones, by dataset: another choice would shift the order of the rows.
    """

    train: Any
    held_out: Any = None
    left_out: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def gather_rows(config: RunConfig) -> RunRows:
    """Load a run's rows.

    Raises:
        DataFormatError, MediaError: rows or media that cannot be used.
    """
    data = config.data
    assert data.train is not None, "require() asked for it"
    rows = RunRows(None)
    only_training = {"limit": data.limit, "min_pass_rate": data.min_pass_rate, "max_pass_rate": data.max_pass_rate}
    rows.train = _good(config, rows, data.train, data.split, streaming=data.streaming, **only_training)
    if data.eval:
        rows.held_out = _good(config, rows, data.eval, data.eval_split or data.split)
    return rows


def size_of(rows: Any) -> int | None:
    """How many rows there are; None of a stream, which does not say."""
    return len(rows) if hasattr(rows, "__len__") else None


def _good(config: RunConfig, found: RunRows, name: str, split: str, **options: Any) -> Any:
    """The rows of a dataset whose media are good, as far as the scan looks."""
    data, media = config.data, config.media
    rows = load_data(name, split, check_files=False, **data.reading(), **options)
    report = scan_media(rows, name, media, data.media_root)
    if report.bad and media.on_bad == "error":
        raise MediaError(f"{report.text(name)} Mend or remove them, or leave them out: --on-bad-media drop.")
    if report.bad:
        logger.warning("%s They are left out.", report.text(name))
        kept = [index for index in range(len(rows)) if index + 1 not in report.bad]
        if not kept:
            raise MediaError(f"{name}: every row has a medium that cannot be used. Correct the paths or the files.")
        found.left_out[name] = len(report.bad)
        rows = rows.select(kept)
    found.kept[name] = hashlib.sha256(",".join(map(str, sorted(report.bad))).encode()).hexdigest()
    return rows
