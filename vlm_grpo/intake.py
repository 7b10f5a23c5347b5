"""Rows in, encoded prompts out. A row that cannot be used stops the run, or is left out and counted."""

import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from .config import MediaOptions
from .data import Sample, to_sample
from .encode import EncodedPrompt, check_placeholders, encode, where_of
from .errors import ConfigError, EncodingError, MediaError, OverlongError
from .media import Kind

_LOG = logging.getLogger("vlm_grpo")
_REFUSALS = (MediaError, EncodingError, OverlongError)
_SHOWN = 20
_UNHEARD = "the row says that its video is heard. Set media.audio_in_video: true, or the model only sees it."


class Intake:
    """Reads rows for one processor.

    Args:
        processor: as for ``encode``.
        placeholders: token ids that stand for each kind of medium.
        media: how media are opened; its ``on_bad`` says what happens to a row whose media cannot be.
        root: the folder that relative media paths start from.
        tools, template: passed to ``encode``.
        max_length: the most tokens of a prompt, media included; nothing is ever cut.
        on_overlong: what happens to a longer row.
        seed: of the frames drawn under ``dynamic_sample``.

    Attributes:
        left_out: how many rows were left out, by reason (``bad media``, ``too long``); one is counted each time it
            comes up.
    """

    def __init__(
        self,
        processor: Any,
        placeholders: dict[Kind, tuple[int, ...]],
        media: MediaOptions | None = None,
        root: Path | None = None,
        *,
        tools: list[Any] | None = None,
        template: dict[str, Any] | None = None,
        max_length: int | None = None,
        on_overlong: Literal["drop", "error"] = "drop",
        seed: int = 0,
    ) -> None:
        self.processor, self.placeholders, self.root = processor, placeholders, root
        self.media = media or MediaOptions()
        self.tools, self.template = tools, template or {}
        self.max_length, self.on_overlong, self.seed = max_length, on_overlong, seed
        self.left_out: Counter[str] = Counter()
        self._said: set[str] = set()

    def read(self, row: dict[str, Any], where: str = "", epoch: int | None = None) -> tuple[Sample, EncodedPrompt]:
        """One row.

        Args:
            row: as ``to_sample`` takes it.
            where: how the user finds it again.
            epoch: draws the frames of videos under ``dynamic_sample``; None takes the fixed rule, for evaluation.

        Raises:
            MediaError, EncodingError, OverlongError: the row cannot be used; see ``leave_out``.
            DataFormatError: the row is no sample.
        """
        sample = to_sample(row, self.root, where)
        if sample.columns.get("audio_in_video") and not self.media.audio_in_video and _UNHEARD not in self._said:
            self._said.add(_UNHEARD)
            _LOG.warning("%s: %s", where or "A row", _UNHEARD)
        return sample, self.encode(sample, epoch)

    def encode(self, sample: Sample, epoch: int | None = None) -> EncodedPrompt:
        """As ``read``, for a row that has been read."""
        names = "|".join(medium.label for medium in sample.media)
        draw = None if epoch is None else random.Random(f"{self.seed}/{epoch}/{names}")
        encoded = encode(self.processor, sample, self.tools, self.media, draw, **self.template)
        check_placeholders(encoded, sample, self.placeholders)
        if self.max_length is not None and len(encoded.input_ids) > self.max_length:
            raise OverlongError(
                f"The prompt has {len(encoded.input_ids)} tokens, media included, and max_prompt_length is "
                f"{self.max_length} — {where_of(sample)}. Raise it, give media fewer pixels or frames, or set "
                "on_overlong=drop."
            )
        return encoded

    def leave_out(self, error: Exception) -> None:
        """Count a row that ``read`` refused and say so once; raise where such rows stop the run."""
        too_long = isinstance(error, OverlongError)
        if not isinstance(error, _REFUSALS) or (self.on_overlong if too_long else self.media.on_bad) == "error":
            raise error
        self.left_out["too long" if too_long else "bad media"] += 1
        if str(error) not in self._said and len(self._said) < _SHOWN:
            self._said.add(str(error))
            _LOG.warning("Left out: %s", str(error))  # a kept record would hold the error's frames, and so the model

    def read_one_of(
        self, candidates: Any, where: str = "", epoch: int | None = None
    ) -> tuple[dict[str, Any], Sample, EncodedPrompt]:
        """The first row of an iterable that can be used, with what it was read as.

        Raises:
            ConfigError: none of them can, as far as they go.
        """
        error, tried = None, 0
        for row in candidates:
            try:
                return row, *self.read(row, where, epoch)
            except _REFUSALS as refusal:
                self.leave_out(refusal)
                error, tried = refusal, tried + 1
        raise ConfigError(
            f"{tried} rows in turn cannot be used, the last because: {error} Mend the data, or raise "
            "max_prompt_length if it is too low."
        ) from error
