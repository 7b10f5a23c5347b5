"""Rewards tried before a run: what each gives to right answers, wrong ones, nothing and noise, and who cannot tell."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ..config import RunConfig
from ..data import decoded, load_data, undecoded
from ..rewards import Failed, introduce, load_rewards
from .completions import EMPTY, GARBAGE, KINDS, LISTED, REFERENCE, SWAPPED, TAGGED, completions_of

TOTAL = "total"
_BINS = 10
# A reward that tells two kinds apart by less than this share of its range does not steer a run.
_TELLS = 0.05


@dataclass
class Scores:
    """What one reward gave to one kind of completion.

    Attributes:
        values: its numbers.
        none, failed: how many rows it did not apply to, and could not score.
    """

    values: list[float] = field(default_factory=list)
    none: int = 0
    failed: int = 0

    @property
    def mean(self) -> float | None:
        return fmean(self.values) if self.values else None


@dataclass(frozen=True)
class Trial:
    """The outcome.

    Attributes:
        rows: how many rows were tried.
        scores: by reward (the weighted total last), then by kind of completion.
        warnings: a sentence for each reward that cannot tell what it should.
    """

    rows: int
    scores: dict[str, dict[str, Scores]]
    warnings: list[str]


def try_rewards(
    rewards: Sequence[Callable[..., Any]],
    weights: Sequence[float],
    rows: Sequence[dict[str, Any]],
    column: str = "answer",
    seed: int = 0,
    processor: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Trial:
    """Call each reward as a trainer would, on six kinds of completion.

    Args:
        rewards, weights: as ``load_rewards`` gives them.
        rows: dataset rows in the canonical form.
        column: where their answers are.
        seed: of what is drawn.
        processor: for the tokens of completions; without one each character counts as one.
        progress: called with the number of calls done after each.

    Raises:
        ConfigError: the rows have no answers.
        RewardError: what a reward raises or returns that is none.
    """
    made = completions_of(rows, column, seed)
    scores: dict[str, dict[str, Scores]] = {reward.__name__: {} for reward in rewards}
    totals: dict[str, Scores] = {}
    done = 0
    for kind, texts in made.items():
        table = []
        for reward in rewards:
            values = _call(reward, rows, texts, processor)
            scores[reward.__name__][kind] = _counted(values)
            table.append(values)
            done += 1
            if progress is not None:
                progress(done)
        totals[kind] = _counted([_total(row, weights) for row in zip(*table, strict=True)])
    if len(rewards) > 1:
        scores[TOTAL] = totals
    single = rewards[0].__name__ if len(rewards) == 1 else TOTAL
    warnings = [text for name, found in scores.items() for text in _warnings(name, found, whole=name == single)]
    return Trial(len(rows), scores, warnings)


def _call(reward: Callable[..., Any], rows: Sequence[dict[str, Any]], texts: list[str], processor: Any) -> list[Any]:
    """As TRL calls it: messages where prompts are messages, every other column by name."""
    prompts = [row["prompt"] for row in rows]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion"))
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    nothing = {"trainer_state": None, "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    ids = [_tokens(text, processor) for text in texts]
    values = reward(prompts=prompts, completions=completions, completion_ids=ids, **columns, **nothing)
    if inspect.iscoroutine(values):
        with ThreadPoolExecutor(1) as executor:  # a notebook runs a loop in this thread
            values = executor.submit(asyncio.run, values).result()
    return list(values)


def _tokens(text: str, processor: Any) -> list[int]:
    if processor is None:
        return [ord(letter) for letter in text]
    return getattr(processor, "tokenizer", processor)(text, add_special_tokens=False)["input_ids"]


def _total(values: Sequence[Any], weights: Sequence[float]) -> Any:
    """As a trainer adds them up: a failed one spoils the row, one that does not apply counts for nothing."""
    failed = next((value for value in values if isinstance(value, Failed)), None)
    known = [weight * value for value, weight in zip(values, weights, strict=True) if _is_number(value)]
    return failed if failed is not None else sum(known) if known else None


def _is_number(value: Any) -> bool:
    return value is not None and not isinstance(value, Failed)


def _counted(values: Sequence[Any]) -> Scores:
    numbers = [float(value) for value in values if _is_number(value)]
    failed = sum(isinstance(value, Failed) for value in values)
    return Scores(numbers, len(values) - len(numbers) - failed, failed)


def histogram(scores: Scores, low: float, high: float) -> list[int]:
    """How many values lie in each of ten equal parts of ``low`` to ``high``; the last holds ``high``."""
    counts = [0] * _BINS
    for value in scores.values:
        place = (value - low) / (high - low) if high > low else 0.0
        counts[min(_BINS - 1, max(0, int(place * _BINS)))] += 1
    return counts


def range_of(found: dict[str, Scores]) -> tuple[float, float]:
    """The lowest and the highest value that a reward gave to anything."""
    values = [value for scores in found.values() for value in scores.values]
    return (min(values), max(values)) if values else (0.0, 0.0)


def _warnings(name: str, found: dict[str, Scores], whole: bool) -> list[str]:
    failed = sum(scores.failed for scores in found.values())
    said = [f'The reward "{name}" failed for {failed} completions.'] if failed and name != TOTAL else []
    low, high = range_of(found)
    best = max((fmean(found[kind].values) for kind in (REFERENCE, TAGGED) if found[kind].values), default=None)
    if best is None:
        none = sum(scores.none for scores in found.values())
        return said if failed else [*said, f'The reward "{name}" applies to no row: it returned None {none} times.']
    if high == low:
        return [*said, f'The reward "{name}" gave {low:g} to everything: it teaches nothing.']
    for kind in (GARBAGE, EMPTY, *((SWAPPED, LISTED) if whole else ())):
        mean = found[kind].mean if kind in found else None
        right = found[REFERENCE].mean if kind == SWAPPED else best  # which is in the same form, with or without tags
        if mean is not None and right is not None and right - mean < _TELLS * (high - low):
            which = {SWAPPED: "those of other rows", LISTED: "a list of all answers"}.get(kind, f"{kind} completions")
            does = f"cannot tell right answers from {which}" if mean <= right else f"prefers {which} to right answers"
            said.append(f'The reward "{name}" {does} (mean {right:.3g} and {mean:.3g}).')
    return said


def trial_of(config: RunConfig, limit: int, column: str = "answer", seed: int = 0) -> Trial:
    """``try_rewards`` with a config's rewards on the first rows of its training data."""
    rewards, weights = load_rewards(config.rewards)
    options = config.data
    table = load_data(options.train or "", options.split, limit, check_files=False, **options.reading())
    table, pictures = undecoded(table)
    rows = [decoded(dict(row), pictures, f"{options.train} row {number}") for number, row in enumerate(table, 1)]
    processor = _processor(config, rewards)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("calling rewards", total=len(KINDS) * len(rewards))
        return try_rewards(
            rewards, weights, rows, column, seed, processor, lambda done: progress.update(task, completed=done)
        )


def _processor(config: RunConfig, rewards: Sequence[Callable[..., Any]]) -> Any:
    """The model's processor for rewards that want it, which are shown it as a trainer does."""
    if config.model == "none" or not any(hasattr(inspect.unwrap(reward), "use_run") for reward in rewards):
        return None
    from ..models import load_processor
    from ..trainer_config import VLMGRPOConfig

    processor = load_processor(config.model)
    default = VLMGRPOConfig.__dataclass_fields__["max_completion_length"].default
    length = config.train.get("max_completion_length", default)
    introduce(rewards, processor=processor, media=config.media, max_completion_length=length)
    return processor
