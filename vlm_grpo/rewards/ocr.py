"""How well a completion reads the text of a picture."""

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import RewardError
from .answers import said
from .asr import similarity
from .options import check_name, check_number
from .text import accepted, column_values, completion_text
from .words import prepared


@dataclass(eq=False)
class Ocr:
    """ANLS: 1 - Levenshtein / the longer length where that distance is below ``threshold``, else 0; in [0, 1].

    Source: Biten et al. 2019, "Scene Text Visual Question Answering", eq. 1; the best of several accepted answers.
    Case and white space do not count, nor invisible characters. Compared is the body of ``<answer>``, or what follows
    ``</think>``, or all of the completion. An accepted answer of no text is met by no text.

    Args:
        method: ``anls``, or ``cer``: 1 - character errors / the answer's characters, at least 0.
        column: the dataset column with the answer, or a list of accepted ones; None: the row cannot be scored.
        threshold: of ``anls``; 0.5 as published. 1 gives every distance its value.

    Raises:
        RewardError: options that cannot be, no such column.
    """

    method: Literal["anls", "cer"] = "anls"
    column: str = "answer"
    threshold: float = 0.5

    __name__ = "ocr"

    def __post_init__(self) -> None:
        check_name("method", self.method, ("anls", "cer"))
        check_number("threshold", self.threshold, 0, above=True)
        if self.threshold > 1:
            raise RewardError(f"threshold is {self.threshold}. Give a distance of at most 1 (0.5 as published).")

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        scores: list[float | None] = []
        for completion, answer in zip(completions, column_values(columns, self.column), strict=True):
            given = prepared(said(completion_text(completion)))
            scores.append(max((self._score(given, prepared(said(text))) for text in accepted(answer)), default=None))
        return scores

    def _score(self, given: str, answer: str) -> float:
        if self.method == "cer" and answer:
            from rapidfuzz.distance import Levenshtein

            return max(0.0, 1 - Levenshtein.distance(given, answer) / len(answer))
        near = similarity(given, answer)
        return near if self.method == "cer" or 1 - near < self.threshold else 0.0
