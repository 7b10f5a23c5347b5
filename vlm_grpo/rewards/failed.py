"""A reward that could not be had: neither a number, nor "not applicable"."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Failed:
    """What a reward function returns for a completion whose score it could not get, a judge that did not answer.

    TRL adds up the rewards of a completion and counts one that is missing as 0, which is a verdict. A completion with
    a failed reward has no total: it leaves its group's baseline, and its advantage is 0.

    Attributes:
        reason: for people, such as ``HTTP 503 after 4 tries``; logged beside the completion.
    """

    reason: str
