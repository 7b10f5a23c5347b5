"""How well a completion transcribes speech: word, character and token similarity, and error rates."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import RewardError
from .answers import said
from .options import check_name, check_number
from .text import accepted, column_values, completion_text
from .words import Normalization, prepared, split_words

logger = logging.getLogger(__name__)

_LANGUAGE_COLUMNS = ("language_id", "language")
_ROUNDING = 1e-6
_NORMALIZATIONS = ("basic", "strict")
# Of A8's two rewards: word, char and token weight, what an exact transcript adds, an empty one gets, a far too short
# or long one loses.
_VARIANTS: dict[str, dict[str, float]] = {
    "grpo": {"word": 0.3, "char": 0.3, "token": 0.4, "exact": 0.5, "empty": 0.0, "off_length": 0.0},
    "ppo": {"word": 3.0, "char": 3.0, "token": 3.0, "exact": 0.0, "empty": -10.0, "off_length": -2.0},
}


@dataclass(eq=False)
class Asr:
    """``word * s(words) + char * s(characters) + token * s(token ids)``, s = 1 - Levenshtein / the longer length.

    Compared is the body of ``<answer>`` where there is one, what follows ``</think>`` where there is that, else all of
    the completion, prepared as the reference is (``words.prepared``). Of several references the best counts. Where the
    reference is silence (""), an empty completion is exact, and any other has similarity 0.

    The token ids are the tokenizer's of both prepared texts, not TRL's ``completion_ids``, which hold the end token,
    tags and case that the reference lacks. A run gives its own tokenizer (``use_run``); without any, the token weight
    is shared between word and char in their proportion, which a warning says once.

    Values lie in [min(0, off_length, empty), word + char + token + exact]: [0, 1.5] for ``grpo``, [-10, 9] for ``ppo``.

    Args:
        variant: ``grpo``: 0.3, 0.3, 0.4 and 0.5 if exact; ``ppo``: 3, 3, 3, -10 for an empty completion (in place of
            everything else), -2 for one of less than ``shortest`` or more than ``longest`` times the reference's
            characters.
        column: the dataset column with the reference, or a list of them; None: the row cannot be scored.
        language: of all rows; by default the row's ``language_id`` or ``language``. Only Turkish and Azerbaijani need
            it: scripts written without spaces are known by their characters, each of which is a word.
        normalize: ``basic`` or ``strict`` (punctuation does not count).
        tokenizer: a name, a path or an object.
        word, char, token, exact, empty, off_length: other than the variant's; the last two at most 0.

    Raises:
        RewardError: options that cannot be, a tokenizer that cannot be loaded, no such column.
    """

    variant: Literal["grpo", "ppo"] = "grpo"
    column: str = "answer"
    language: str | None = None
    normalize: Normalization = "basic"
    tokenizer: Any = None
    word: float | None = None
    char: float | None = None
    token: float | None = None
    exact: float | None = None
    empty: float | None = None
    off_length: float | None = None
    shortest: float = 0.3
    longest: float = 2.0
    _weights: dict[str, float] = field(init=False, repr=False)
    _warned: bool = field(init=False, default=False, repr=False)

    __name__ = "asr"

    def __post_init__(self) -> None:
        check_name("variant", self.variant, list(_VARIANTS))
        check_name("normalize", self.normalize, _NORMALIZATIONS)
        own = {name: getattr(self, name) for name in _VARIANTS[self.variant]}
        self._weights = _VARIANTS[self.variant] | {name: value for name, value in own.items() if value is not None}
        for name, value in self._weights.items():
            is_loss = name in ("empty", "off_length")
            check_number(name, value, -math.inf if is_loss else 0)
            if is_loss and value > 0:
                raise RewardError(f"{name} is {value}. Give a number of at most 0.")
        for name in ("shortest", "longest"):
            check_number(name, getattr(self, name), 0)
        if not 0 <= self.shortest <= 1 <= self.longest:
            raise RewardError(
                f"shortest is {self.shortest} and longest {self.longest} times the reference. Give shortest in [0, 1] "
                "and longest of 1 or more."
            )
        if self.tokenizer is not None:
            self.tokenizer = _tokenizer(self.tokenizer)

    @property
    def right_at(self) -> float:
        """What an exact transcript earns, less rounding."""
        weights = self._weights
        return weights["word"] + weights["char"] + weights["token"] + weights["exact"] - _ROUNDING

    def use_run(self, *, processor: Any = None, **_: Any) -> None:
        """Take the run's tokenizer, unless one was given."""
        if self.tokenizer is None and processor is not None:
            self.tokenizer = _tokenizer(processor)

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        answers = column_values(columns, self.column)
        languages = self._languages(columns, len(completions))
        pairs: list[tuple[str, list[str]]] = []
        for completion, answer, language in zip(completions, answers, languages, strict=True):
            texts = [said(completion_text(completion)), *map(said, accepted(answer))]
            given, *references = [prepared(text, language, self.normalize) for text in texts]
            pairs.append((given, references))
        ids = self._ids({text for given, references in pairs for text in (given, *references)})
        return [
            max((self._score(given, reference, ids) for reference in references), default=None)
            for given, references in pairs
        ]

    def _languages(self, columns: dict[str, Any], count: int) -> list[str | None]:
        if self.language is not None:
            return [self.language] * count
        found = next((columns[name] for name in _LANGUAGE_COLUMNS if isinstance(columns.get(name), list)), None)
        return [value if isinstance(value, str) else None for value in found] if found else [None] * count

    def _ids(self, texts: set[str]) -> dict[str, list[int]] | None:
        if not self._weights["token"]:
            return {}
        if self.tokenizer is None:
            if not self._weights["word"] + self._weights["char"]:
                raise RewardError("there is only a token weight and no tokenizer. Give a tokenizer, or a word weight.")
            if not self._warned:
                self._warned = True
                logger.warning(
                    'The reward "asr" has no tokenizer: the token weight goes to words and characters. Give it a '
                    "tokenizer to compare tokens too."
                )
            return None
        given = sorted(texts)
        return dict(zip(given, self.tokenizer(given, add_special_tokens=False)["input_ids"], strict=True))

    def _score(self, given: str, reference: str, ids: dict[str, list[int]] | None) -> float:
        weights = self._weights
        if not given and reference:
            return weights["empty"]
        word, char, token = weights["word"], weights["char"], weights["token"]
        if ids is None:
            word, char, token = (weight * (1 + token / (word + char)) for weight in (word, char, 0.0))
        score = word * similarity(split_words(given), split_words(reference)) + char * similarity(given, reference)
        if token and ids is not None:
            score += token * similarity(ids[given], ids[reference])
        if given == reference:
            score += weights["exact"]
        if not self.shortest * len(reference) <= len(given) <= self.longest * len(reference):
            score += weights["off_length"]
        return score


def similarity(given: Sequence[Any], reference: Sequence[Any]) -> float:
    """1 - Levenshtein distance / the longer length, in [0, 1]; 1 for two empty sequences."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(given, reference)


def wer(
    completions: list[Any],
    references: Sequence[Any],
    languages: Sequence[str | None] | None = None,
    normalize: Normalization = "basic",
) -> float | None:
    """Word error rate of a corpus: substituted, left out and added words, divided by the words of the references.

    It exceeds 1 where much is added. In scripts without spaces characters are words (so Chinese mixed with English has
    its usual mixed error rate). Rows whose reference is None are left out; of several references the nearest counts.
    None where the references have no word.
    """
    return _error_rate(split_words, completions, references, languages, normalize)


def cer(
    completions: list[Any],
    references: Sequence[Any],
    languages: Sequence[str | None] | None = None,
    normalize: Normalization = "basic",
) -> float | None:
    """Character error rate of a corpus, spaces between words included; else as ``wer``."""
    return _error_rate(str, completions, references, languages, normalize)


def _error_rate(
    split: Callable[[str], Sequence[Any]],
    completions: list[Any],
    references: Sequence[Any],
    languages: Sequence[str | None] | None,
    normalize: Normalization,
) -> float | None:
    from rapidfuzz.distance import Levenshtein

    def counts() -> Iterator[tuple[int, int]]:
        rows = zip(completions, references, languages or [None] * len(completions), strict=True)
        for completion, answer, language in rows:
            given = split(prepared(said(completion_text(completion)), language, normalize))
            right = [split(prepared(said(text), language, normalize)) for text in accepted(answer)]
            if right:
                yield min((Levenshtein.distance(given, one), len(one)) for one in right)

    check_name("normalize", normalize, _NORMALIZATIONS)
    found = list(counts())
    length = sum(length for _, length in found)
    return sum(errors for errors, _ in found) / length if length else None


def _tokenizer(value: Any) -> Any:
    if isinstance(value, str | Path):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(value)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise RewardError(f'the tokenizer "{value}" cannot be loaded ({first}). Correct its name.') from error
    tokenizer = getattr(value, "tokenizer", value)
    if not callable(tokenizer):
        raise RewardError(f"the tokenizer is {value!r}. Give a name, a path, or a tokenizer of transformers.")
    return tokenizer
