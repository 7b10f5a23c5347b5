"""The captions that a reward model reads beside a row, and whether it is used to them."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data import Sample
from ..judging.captions import Captions
from .reward_run import RewardRun

logger = logging.getLogger(__name__)

_SEED = 0  # of their order, which is then the row's alone


class JudgeCaptions:
    """Captions of rows, for a reward model only.

    Args:
        run: the reward model.
        file: captions by media file; a row's own column ``captions`` comes before it.

    Raises:
        DataFormatError: a file that cannot be read.
    """

    def __init__(self, run: RewardRun, file: str | Path | None) -> None:
        self._run, self._given = run, file is not None
        self._captions = Captions() if file is None else Captions.read(file)
        self._said: set[str] = set()

    def of(self, samples: Sequence[Sample], column: Sequence[Any] | None) -> list[list[str]]:
        """The captions of each row; none for a reward model that was trained without, unless a file is given.

        Args:
            samples: the rows.
            column: of each, its own captions: a text, several, or None; None where the rows have no such column.

        Raises:
            DataFormatError: captions that are no texts, or that could be of several files.
        """
        folder, trained = self._run.folder, self._run.with_captions
        if self._given and not trained:
            self._say(
                f'The reward model "{folder}" was trained without captions and is given some: its scores may be off. '
                "Leave captions out, or train it with captions."
            )
        elif not self._given and column is None and trained:
            self._say(
                f'The reward model "{folder}" was trained with captions and is given none: its scores may be off. Give '
                "captions: FILE, or rows with the column captions."
            )
        elif column is not None and not trained:
            self._say(
                f'The reward model "{folder}" was trained without captions: the column captions of the rows is not '
                "shown to it."
            )
        if not self._given and not trained:
            return [[] for _ in samples]
        cells = [None] * len(samples) if column is None else column
        own = [replace(s, columns={**s.columns, "captions": c}) for s, c in zip(samples, cells, strict=True)]
        found = [self._captions.of(sample, _SEED) for sample in own]
        seen = next((sample.media[0].label for sample in samples if sample.media), None)
        if self._given and seen is not None and not any(found):
            self._say(f'No caption of {self._captions.file} is of a medium of these rows, such as "{seen}".', "none")
        return found

    def _say(self, sentence: str, what: str = "use") -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(sentence)
