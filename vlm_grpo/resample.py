"""Groups whose rewards are all equal, drawn anew from other prompts before they are trained on.

Dynamic sampling after DAPO (Yu et al. 2025, arXiv:2503.14476, section 3.2); there prompts are drawn until a batch is
full, here a settable number of times, in place of the dead groups only. TRL is then shown the completions that stay as
if it had generated them, so padding, advantages, token counts, metrics and logs are its own.
"""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor

from .carry import Drawn, Row
from .errors import ConfigError, UnsupportedError
from .ties import is_tied


def check_resampling(trainer: Any) -> None:
    """Refuse to resample where other prompts cannot be drawn, or not by one process alone.

    Raises:
        UnsupportedError: several processes, or tools.
        ConfigError: a streaming dataset.
    """
    times = trainer.args.resample_dead_groups
    if not times:
        return
    for count, what in ((trainer.args.world_size, "processes"), (len(trainer.tools or []) + 1, "calls of tools")):
        if count > 1:
            raise UnsupportedError(
                f"resample_dead_groups={times} has no test with {what} yet. Leave it out, or train with one process "
                "and without tools."
            )
    if not isinstance(trainer.train_dataset, Dataset):
        raise ConfigError(
            f"resample_dead_groups={times} draws other rows of the training dataset, and a "
            f"{type(trainer.train_dataset).__name__} only gives the next one. Load it without streaming, or leave the "
            "option out."
        )


def resampled(trainer: Any, rows: list[Row]) -> list[Row]:
    """The rows of a rollout, those of dead groups replaced by other prompts' as often as ``resample_dead_groups`` says.

    Their completions have been generated and scored (``Drawn``). Without the option, and in an evaluation, the rows
    come back as they are. The metric ``groups/resampled`` is the number of groups that were drawn anew.
    """
    times, group = trainer.args.resample_dead_groups, trainer.num_generations
    if not times or not trainer.model.training:
        return rows
    rows, others, new = list(rows), _others(trainer, rows), 0
    _draw(trainer, rows)
    for _ in range(times):
        dead = [start for start in range(0, len(rows), group) if _is_dead(trainer, rows[start : start + group])]
        if not dead:
            break
        inputs = [row for row in islice(others, len(dead)) for _ in range(group)]
        drawn = trainer._encoded_rows(inputs)
        _draw(trainer, drawn)
        for number, start in enumerate(dead):
            trainer._diagnosis.drawn(rewards_of(rows[start : start + group]).tolist())
            rows[start : start + group] = drawn[number * group : (number + 1) * group]
        new += len(dead)
    trainer._metrics["train"]["groups/resampled"].append(float(new))
    return rows


def rewards_of(rows: list[Row]) -> Tensor:
    """Rewards (rows, functions) of completions that have been drawn."""
    return torch.stack([row["prompt"].drawn.rewards for row in rows])


def replay_rewards(trainer: Any, rows: list[Row]) -> Tensor:
    """``rewards_of``, with what the reward functions logged beside each completion."""
    extras = [row["prompt"].drawn.extra for row in rows]
    for column in dict.fromkeys(name for extra in extras for name in extra):
        trainer._log_completion_extra(column, [extra.get(column) for extra in extras])
    return rewards_of(rows)


def _is_dead(trainer: Any, rows: list[Row]) -> bool:
    each = trainer.multi_objective_aggregation == "normalize_then_sum"
    return is_tied(rewards_of(rows).tolist(), trainer.reward_weights.tolist(), each)


def _others(trainer: Any, rows: list[Row]) -> Iterator[dict[str, Any]]:
    """Training rows in an order of this rollout's own, the same after a resume.

    None of the rollout's rows comes, and none twice, before all others have come.
    """
    draw = random.Random(f"{trainer.args.seed}/{trainer._step}/resample")
    count, seen = len(trainer.train_dataset), set()
    present = {Hasher.hash(row.original) for row in rows[:: trainer.num_generations]}
    while True:
        if len(seen) == count:
            seen.clear()
            present.clear()
        index = draw.randrange(count)
        if index not in seen:
            seen.add(index)
            row = trainer.train_dataset[index]
            if Hasher.hash(row) not in present:
                yield row


def _draw(trainer: Any, rows: list[Row]) -> None:
    """Generate and score a completion of each row, as TRL does, and leave TRL's counters as they were."""
    metrics, tokens = trainer._metrics["train"], trainer.state.num_input_tokens_seen
    before = {name: list(values) for name, values in metrics.items()}
    prompts = [row["prompt"] for row in rows]
    _, ids, _, completions, logprobs, *_ = trainer._generate(prompts)
    metrics.clear()
    metrics.update(before)
    trainer.state.num_input_tokens_seen = tokens
    rewards = trainer._calculate_rewards(rows, prompts, completions, ids)
    logged = {name: values for name, values in trainer._pending_extra_logs.items() if len(values) == len(rows)}
    for number, prompt in enumerate(prompts):
        extra = {name: values[number] for name, values in logged.items()}
        prompt.drawn = Drawn(ids[number], None if logprobs is None else logprobs[number], rewards[number], extra)
    trainer._pending_extra_logs.clear()
