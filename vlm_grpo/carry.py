"""How a row's encoding travels through TRL: on the objects that TRL takes for its prompts, and does not look into."""

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .data import Sample
from .encode import EncodedPrompt


@dataclass(frozen=True)
class Drawn:
    """A completion that was generated and scored before TRL asks for it (``resample.py``).

    Attributes:
        ids: its tokens.
        logprobs: per token, in nats, where generation gives them.
        rewards: (functions,), NaN where one gave none.
        extra: what reward functions logged beside it, by column.
    """

    ids: list[int]
    logprobs: list[float] | None
    rewards: Tensor
    extra: dict[str, Any]


class Row(dict):
    """What TRL sees of a dataset row (its prompt), beside the original, the sample and the encoding."""

    original: dict[str, Any]
    sample: Sample
    encoding: EncodedPrompt


class Prompt(list):
    """A conversation that carries its row's encoding through TRL's deep copy, but not to other processes."""

    encoding: EncodedPrompt
    drawn: Drawn | None = None

    def __deepcopy__(self, memo: dict) -> "Prompt":
        copied = Prompt(copy.deepcopy(list(self), memo))
        copied.encoding, copied.drawn = self.encoding, self.drawn
        return copied

    def __reduce__(self) -> tuple:
        return list, (list(self),)


class Text(str):
    """A templated prompt that carries its row's encoding, like ``Prompt``."""

    encoding: EncodedPrompt
    drawn: Drawn | None = None

    def __deepcopy__(self, memo: dict) -> "Text":
        return self

    def __reduce__(self) -> tuple:
        return str, (str(self),)
