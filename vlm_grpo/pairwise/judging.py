"""``judge_pairs``: the scores of both responses of held-out pairs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..callbacks import transcript
from ..data import Sample, to_sample, undecoded
from ..encode import EncodedPrompt
from ..errors import EncodingError, MediaError, OverlongError
from ..evaluate.controls import Exchange, exchange
from ..evaluate.evaluation import batches
from ..intake import Intake
from ..judging.captions import Captions
from ..judging.prompt import JudgePrompt
from ..judging.scores import Scores
from ..media import Medium
from ..models.modes import restored


@dataclass(frozen=True)
class JudgedPair:
    """One pair and its scores.

    Attributes:
        row: its number, from 1.
        prompt: as text, with the labels of the media in their places.
        media: what the row holds, as it is.
        chosen, rejected: the responses.
        chosen_score, rejected_score: of the head.
        captions: what the judge was shown besides, in this order.
    """

    row: int
    prompt: str
    media: list[Medium]
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    captions: list[str]

    @property
    def margin(self) -> float:
        return self.chosen_score - self.rejected_score

    @property
    def correct(self) -> bool | None:
        """Whether the chosen response has the higher score; None where both have the same."""
        return None if self.margin == 0 else self.margin > 0


@dataclass(frozen=True)
class PairEvaluation:
    """Every pair that could be used, and how many could not."""

    rows: list[JudgedPair]
    left_out: int = 0


def judge_pairs(
    scores: Scores,
    rows: Any,
    *,
    processor: Any,
    intake: Intake,
    judge: JudgePrompt,
    captions: Captions | None = None,
    blank: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> PairEvaluation:
    """Score both responses of every pair.

    Args:
        scores: of the reward model; its mode is restored.
        rows: as ``as_pairs`` gives them; never trained on, or the figures mean nothing.
        processor: the model's.
        intake: how rows are read, and what happens to those that cannot be.
        judge: the request behind a response.
        captions: what the judge is shown besides; they stay when the media are blanked.
        blank: black pictures and frames and silence in place of the media.
        seed: of the order of captions.
        batch_size: pairs a forward.
        progress: called with the number of pairs done after each batch.

    Raises:
        MediaError, EncodingError, OverlongError: a row cannot be used and the intake leaves none out.
    """
    rows, _ = undecoded(rows)
    change = exchange("blank", rows, intake, seed) if blank else None
    found: list[JudgedPair] = []
    done = 0
    with restored(scores.model), torch.no_grad():
        scores.model.eval()
        for batch in batches(rows, batch_size):
            read = list(_read(intake, batch, done, change))
            done += len(batch)
            if read:
                shown = [[] if captions is None else list(captions.of(item.sample, seed)) for item in read]
                found += _judged(scores, processor, judge, read, shown)
            if progress is not None:
                progress(done)
    return PairEvaluation(found, done - len(found))


@dataclass(frozen=True)
class _Read:
    """A pair that can be used: its number, its row, its sample, and its prompt as it is encoded."""

    number: int
    row: dict[str, Any]
    sample: Sample
    encoding: EncodedPrompt


def _judged(
    scores: Scores, processor: Any, judge: JudgePrompt, read: list[_Read], captions: list[list[str]]
) -> list[JudgedPair]:
    suffixes = [
        judge.suffix(processor, item.sample, item.row[name], shown)
        for item, shown in zip(read, captions, strict=True)
        for name in ("chosen", "rejected")
    ]
    values = scores([item.encoding for item in read for _ in range(2)], suffixes).tolist()
    return [
        JudgedPair(
            item.number,
            transcript(item.sample.prompt)[0],
            item.sample.media,
            item.row["chosen"],
            item.row["rejected"],
            values[2 * place],
            values[2 * place + 1],
            captions[place],
        )
        for place, item in enumerate(read)
    ]


def _read(intake: Intake, batch: list[dict[str, Any]], done: int, change: Exchange | None) -> Iterator[_Read]:
    for number, row in enumerate(batch, done + 1):
        try:
            sample = to_sample(row, intake.root, f"row {number} of the evaluation")
            encoding = intake.encode(change(number, sample) if change else sample)
        except (MediaError, EncodingError, OverlongError) as error:
            intake.leave_out(error)
            continue
        yield _Read(number, row, sample, encoding)
