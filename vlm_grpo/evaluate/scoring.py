"""How answers are judged: every reward on them, and one that says which are right."""

import asyncio
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, SupportsFloat

from ..config import RewardSpec
from ..data import Sample
from ..encode import EncodedPrompt
from ..errors import ConfigError, nearest
from ..rewards import Failed, load_rewards, shown
from ..rewards.accuracy import accuracy
from ..rewards.checked import check_values, is_async
from ..rewards.text import completion_text

_LOG = logging.getLogger("vlm_grpo")

Value = float | Failed | None
Reward = Callable[..., Any]
Waiter = Callable[[list[Any]], list[Any]]

# Who says what is right only where no other reward can; a wrong answer satisfies those of form as well as a right one.
_LATER = {
    "caption_type": 1,
    **dict.fromkeys(("model", "format", "length", "length_bonus", "overlong", "repetition"), 2),
}
# Of these no value tells right answers from wrong ones on every row, and why.
_DOUBTS = {
    "model": "a reward model gives no verdict",
    "caption_type": "it gives nothing to a general question, nor to one whose answer is yes",
}
_TRLS_OWN = ("prompt", "completion", "completion_ids")  # columns that TRL keeps from reward functions


@dataclass(frozen=True)
class Yardstick:
    """What answers are measured by.

    Attributes:
        rewards: reward functions by name, called as the trainer calls them.
        weights: their factors in the total, by name; 1 where none is given.
        correct: the reward that says whether an answer is right; by default the first.
        right_at: the least value of it at which an answer is right.
        truth: the column with the right answers, for classes and for people.
        shown_too: columns that rewards read though TRL keeps them from rewards, such as ``completion``.
    """

    rewards: dict[str, Reward]
    weights: dict[str, float] = field(default_factory=dict)
    correct: str = ""
    right_at: float = 1.0
    truth: str = "answer"
    shown_too: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.correct and self.correct not in self.rewards:
            raise ConfigError(
                f'correct: there is no reward "{self.correct}".{nearest(self.correct, list(self.rewards))} These are '
                f"measured: {', '.join(self.rewards)}."
            )

    @property
    def judge(self) -> str:
        """The name of the reward that says whether an answer is right."""
        return self.correct or next(iter(self.rewards))

    def is_right(self, value: Value) -> bool | None:
        """Whether an answer of this value is right; None where the reward gave none."""
        return None if value is None or isinstance(value, Failed) else bool(value >= self.right_at)

    def total(self, values: dict[str, Value]) -> float | None:
        """The weighted sum, as in training; None where a reward failed, or all are None."""
        if any(isinstance(value, Failed) for value in values.values()):
            return None
        parts = [self.weights.get(name, 1.0) * float(v) for name, v in values.items() if isinstance(v, (int, float))]
        return sum(parts) if parts else None


def yardstick_of(
    specs: Sequence[RewardSpec], functions: Sequence[Reward] | None = None, correct: str | None = None
) -> Yardstick:
    """The yardstick of a run's rewards.

    An answer is right where one of the rewards returns 1 or more before it is scaled and clipped, or as much as the
    reward's attribute ``right_at`` says: a number, or a function of its keyword arguments.

    Args:
        specs: the rewards.
        functions: what ``load_rewards`` made of them, where that has been done.
        correct: the name of the reward that says what is right, as metrics call it; by default the first that can and
            looks at the answer, not at its form alone, as ``format`` and ``length`` do.

    Raises:
        RewardError: a reward that cannot be resolved.
        ConfigError: no reward of that name, or one by whose scale and clip a wrong answer earns as much as a right one.
    """
    functions = functions or load_rewards(specs)[0]
    names: list[str] = [getattr(function, "__name__", type(function).__name__) for function in functions]
    found = Yardstick(
        dict(zip(names, functions, strict=True)),
        {name: spec.weight for name, spec in zip(names, specs, strict=True)},
        correct or "",
    )
    full = dict(zip(names, map(_full_marks, specs, functions), strict=True))
    able = {name: spec for name, spec in zip(names, specs, strict=True) if _tells_right(spec, full[name])}
    if not able or (correct and correct not in able):
        which = f'The reward "{correct}" cannot' if correct else f"No reward ({', '.join(names)}) can"
        raise ConfigError(
            f"{which} say which answers are right: by its scale and clip a wrong one earns as much. Name another "
            "one, or measure one more without weight: accuracy=0."
        )
    judge = correct or min(able, key=lambda name: _LATER.get(able[name].name, 0))
    spec = able[judge]
    if spec.name in _DOUBTS:
        _LOG.warning(
            'Accuracy is the share of answers that "%s" scores %g or more, which says little: %s. Measure a reward '
            "that gives verdicts beside it, without weight: accuracy=0.",
            judge,
            full[judge],
            _DOUBTS[spec.name],
        )
    right_at = min(full[judge], spec.clip[1] if spec.clip else math.inf)
    truth = spec.columns.get("answer", spec.kwargs.get("column", "answer"))
    return replace(found, correct=judge, right_at=right_at, truth=truth)


def _full_marks(spec: RewardSpec, function: Reward) -> float:
    """What a right answer earns at least, by the reward's scale and shift."""
    named = inspect.unwrap(function, stop=lambda own: hasattr(own, "right_at"))  # a decorator of the user's may have it
    least = getattr(named, "right_at", 1.0)
    return float(least if isinstance(least, SupportsFloat) else least(**spec.kwargs)) * spec.scale + spec.shift


def _tells_right(spec: RewardSpec, full: float) -> bool:
    return spec.scale > 0 and (spec.clip is None or full > spec.clip[0])


def learned_yardstick(column: str) -> Yardstick:
    """That of a warm start without rewards: whether the answer is the text that it learns from ``column``."""
    return Yardstick({"accuracy": partial(accuracy_of_learned, column)}, truth=column, shown_too=(column,))


def accuracy_of_learned(column: str, **columns: Any) -> list[float | None]:
    """``accuracy`` against the text that a warm start learns, which may be messages."""
    if column in columns:
        texts = [completion_text(value) if isinstance(value, list) else value for value in columns[column]]
        columns = {**columns, column: texts}
    return accuracy(column=column, **columns)


def judged(
    rewards: dict[str, Reward],
    shown_too: Sequence[str],
    rows: list[dict[str, Any]],
    samples: list[Sample],
    texts: list[str],
    ids: list[list[int]],
    wait: Waiter,
    encodings: Sequence[EncodedPrompt | None] | None = None,
) -> list[dict[str, Value]]:
    """Of each completion, its value by every reward; async rewards are waited for together.

    Args:
        rewards: by name.
        shown_too: further columns that they are given.
        rows: the rows as rewards see them, pictures decoded.
        samples, texts, ids: what they were read as, and the completion as text and as tokens.
        wait: see ``waiting``.
        encodings: the samples as the model was given them, for rewards that see media; None where it was given others.

    Raises:
        RewardError: a reward returned anything but a finite number, None or ``Failed`` for each completion.
    """
    arguments = _arguments(rows, samples, texts, ids)
    arguments |= {name: [row.get(name) for row in rows] for name in shown_too if name in rows[0]}
    found: dict[str, Any] = {}
    later = [name for name, function in rewards.items() if is_async(function)]
    seen = [Seen(*pair) for pair in zip(samples, encodings or [None] * len(rows), strict=True)]
    with shown(rewards.values(), rows, seen):
        for name, function in rewards.items():
            if name not in later:
                values = function(**arguments)
                found[name] = wait([values])[0] if inspect.isawaitable(values) else values
    found |= zip(later, wait([rewards[name](**arguments) for name in later]), strict=True) if later else ()
    columns = {name: list(map(_number, check_values(found[name], name, arguments))) for name in rewards}
    return [{name: values[index] for name, values in columns.items()} for index in range(len(texts))]


class Seen(NamedTuple):
    """A row as it was read, and as the model was given it; None where it was given another one."""

    sample: Sample
    encoding: EncodedPrompt | None


def _number(value: Any) -> Value:
    return value if value is None or isinstance(value, Failed) else float(value)


def _arguments(
    rows: list[dict[str, Any]], samples: list[Sample], texts: list[str], ids: list[list[int]]
) -> dict[str, Any]:
    """What TRL gives a reward function: completions are messages where prompts are, and columns come by name."""
    completions = [
        text if isinstance(sample.prompt, str) else [{"role": "assistant", "content": text}]
        for sample, text in zip(samples, texts, strict=True)
    ]
    columns = {key: [row.get(key) for row in rows] for key in rows[0] if key not in _TRLS_OWN}
    logs = {"trainer_state": None, "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    prompts = [row["prompt"] for row in rows]
    return {"prompts": prompts, "completions": completions, "completion_ids": ids, **columns, **logs}


@contextmanager
def waiting() -> Iterator[Waiter]:
    """Results of awaitables, waited for together in one event loop in a thread of its own.

    One, since a reward's client belongs to the loop that it first ran in; of its own, since a notebook runs one in
    this thread.
    """
    thread: Any = None
    loop: Any = None

    async def gathered(awaitables: list[Awaitable[Any]]) -> list[Any]:
        return await asyncio.gather(*awaitables)

    def wait(awaitables: list[Awaitable[Any]]) -> list[Any]:
        nonlocal thread, loop
        if loop is None:
            from trl.trainer.utils import start_event_loop_in_daemon

            thread, loop, ready = start_event_loop_in_daemon("rewards")
            ready.wait()
        future = asyncio.run_coroutine_threadsafe(gathered(awaitables), loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    try:
        yield wait
    finally:
        if loop is not None:
            from trl.trainer.utils import shutdown_event_loop_in_daemon

            shutdown_event_loop_in_daemon(thread, loop)
