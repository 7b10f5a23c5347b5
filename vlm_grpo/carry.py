"""How a row's encoding travels through TRL: on the objects that TRL takes for its prompts, and does not look into."""

import copy
from typing import Any

from .data import Sample
from .encode import EncodedPrompt


class Row(dict):
    """What TRL sees of a dataset row (its prompt), beside the original, the sample and the encoding."""

    original: dict[str, Any]
    sample: Sample
    encoding: EncodedPrompt


class Prompt(list):
    """A conversation that carries its row's encoding through TRL's deep copy, but not to other processes."""

    encoding: EncodedPrompt

    def __deepcopy__(self, memo: dict) -> "Prompt":
        copied = Prompt(copy.deepcopy(list(self), memo))
        copied.encoding = self.encoding
        return copied

    def __reduce__(self) -> tuple:
        return list, (list(self),)


class Text(str):
    """A templated prompt that carries its row's encoding, like ``Prompt``."""

    encoding: EncodedPrompt

    def __deepcopy__(self, memo: dict) -> "Text":
        return self

    def __reduce__(self) -> tuple:
        return str, (str(self),)
