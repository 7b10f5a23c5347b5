"""What a run warned of while it trained, kept for those who were not looking: ``notes.jsonl``."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .callbacks import append_jsonl
from .report import read_jsonl

_MOST, _LONGEST = 200, 2000  # sentences, and characters of one


class _Notes(logging.Handler):
    def __init__(self, path: Path, trainer: Any) -> None:
        super().__init__(logging.WARNING)
        self.path, self.trainer = path, trainer
        # A continued run meets again what it warned of after its checkpoint, or has forgotten that it did.
        self._said = {str(note.get("text")) for note in read_jsonl(path)} if path.is_file() else set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()[:_LONGEST]
        if text in self._said or len(self._said) >= _MOST:
            return
        self._said.add(text)
        try:
            append_jsonl(self.path, [{"step": self.trainer.state.global_step, "text": text}])
        except (OSError, ValueError):  # also what no file can hold, such as half a character
            self.handleError(record)


@contextmanager
def kept_warnings(path: Path, trainer: Any) -> Iterator[None]:
    """Append what this package warns of to a JSON-lines file: ``step`` and ``text``, the same text once.

    Args:
        path: the file.
        trainer: its state tells the step.
    """
    notes, ours = _Notes(path, trainer), logging.getLogger("vlm_grpo")
    ours.addHandler(notes)
    try:
        yield
    finally:
        ours.removeHandler(notes)
