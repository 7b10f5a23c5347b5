"""What a run shows to those rewards that look at more than texts: the policy's model, and the rows as it sees them."""

import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..data import Sample
    from ..encode import EncodedPrompt


logger = logging.getLogger(__name__)


class Shown(NamedTuple):
    """A row of a call.

    Attributes:
        original: as the reward is called with it: its prompt and media columns, the very objects.
        sample: as it was read.
        encoding: as the policy was given it; None where the policy was given another prompt.
    """

    original: dict[str, Any]
    sample: "Sample"
    encoding: "EncodedPrompt | None"


def show_model(functions: Iterable[Any], model: Any, **about: Any) -> None:
    """Show the policy to those rewards that have a ``use_model``: once it is set up, before the first call.

    Args:
        functions: rewards; what wraps them is looked through.
        model: the policy, without the wrappers of accelerate.
        about: see ``JudgeReward.use_model``.

    Raises:
        RewardError, UnsupportedError: a reward that cannot work beside this policy.
    """
    for use_model in _having(functions, "use_model"):
        use_model(model, **about)


def marks(functions: Iterable[Any]) -> dict[str, str]:
    """By folder, which reward models a run has: see ``JudgeReward.mark``."""
    return dict(_having(functions, "mark"))


def say_changed(functions: Iterable[Any], before: dict[str, str]) -> None:
    """Say which reward models are others than those that the checkpoint was written with (its ``marks``)."""
    for folder, mark in marks(functions).items():
        if before.get(folder, mark) != mark:
            logger.warning(
                'The reward model "%s" has changed since the checkpoint was written: from here on the new one counts.',
                folder,
            )


@contextmanager
def shown(functions: Iterable[Any], originals: Sequence[dict[str, Any]], rows: Sequence[Any]) -> Iterator[None]:
    """Within it, rewards that see the media are given the rows as the policy is: the same ``EncodedPrompt`` objects.

    Args:
        functions: rewards; what wraps them is looked through.
        originals: the rows that they are called with, a completion each.
        rows: of each, ``sample`` and ``encoding``: see ``Shown``.
    """
    pairs = [Shown(original, row.sample, row.encoding) for original, row in zip(originals, rows, strict=True)]
    with ExitStack() as stack:
        for seeing in _having(functions, "seeing"):
            stack.enter_context(seeing(pairs))
        yield


def _having(functions: Iterable[Any], method: str) -> list[Any]:
    own = [inspect.unwrap(function) for function in functions if callable(function)]
    return [getattr(function, method) for function in own if hasattr(function, method)]
