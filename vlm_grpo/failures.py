"""Rewards that failed: their rows leave the baseline, they are counted, and too many of them stop the run."""

import logging
from collections import Counter, deque
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from .errors import RewardError
from .rewards import Failed

_LOG = logging.getLogger("vlm_grpo")
_ROLLOUTS = 10  # that the share is taken over
_ENOUGH = 3  # rollouts before part of them may stop a run; all of them may at once: nothing has ever come back
LOGGED_AS = "failed"


class RewardFailures(TrainerCallback):
    """What ``Failed`` rewards do to a rollout, and to the run.

    A completion with a failed reward is given NaN by every reward function: TRL then leaves it out of its group's
    baseline and sets its advantage to 0, where one NaN alone would count as 0 in the sum. When more than ``limit`` of
    the completions of the last ten rollouts failed, the run saves a checkpoint, stops and says why.

    Args:
        trainer: whose metrics and completion logs tell of it.
        limit: the share of completions, 0 to 1, above which the run stops.
    """

    def __init__(self, trainer: Any, limit: float) -> None:
        self.trainer, self.limit = trainer, limit
        self._reasons: dict[int, str] = {}
        self._failed: dict[str, list[int]] = {}
        self._recent: dict[str, deque[tuple[int, int]]] = {}
        self._said: set[tuple[str, str]] = set()
        self._count: Counter[str] = Counter()  # completions that failed so far
        self._last: dict[str, str] = {}  # reason of each reward
        self._stop: str | None = None

    def note(self, values: list[Any], name: str) -> list[Any]:
        """The values of one reward as TRL may see them, those that failed remembered."""
        failed = [index for index, value in enumerate(values) if isinstance(value, Failed)]
        self._failed[name] = failed
        for index in failed:
            self._reasons.setdefault(index, f"{name}: {values[index].reason}")
            self._last[name] = values[index].reason
            self._say_once(name, values[index].reason)
        return [0.0 if isinstance(value, Failed) else value for value in values]

    def begin(self) -> None:
        """Before the rewards of a rollout are computed."""
        self._reasons, self._failed = {}, {}

    def mask(self, rewards: Tensor) -> Tensor:
        """The rewards (B, functions) of all processes, NaN throughout in the rows where one failed; counted and logged.

        Every process calls it, with the rewards that TRL has gathered.
        """
        trainer = self.trainer
        names = trainer.reward_func_names
        own = torch.zeros(len(rewards) // trainer.accelerator.num_processes, len(names), device=rewards.device)
        for column, name in enumerate(names):
            own[self._failed.get(name, []), column] = 1
        failed = trainer.accelerator.gather(own).bool()
        mode = "train" if trainer.model.training else "eval"
        for column, name in enumerate(names):
            count = int(failed[:, column].sum())
            if mode == "train":
                self._recent.setdefault(name, deque(maxlen=_ROLLOUTS)).append((count, len(failed)))
            if count or self._count[name]:
                self._count[name] += count
                trainer._metrics[mode][f"rewards/{name}/failed"].append(count / len(failed))
        if mode == "train":
            self._judge()
        if sum(self._count.values()):  # from the first on always: TRL's table keeps the columns of a rollout together
            trainer._log_completion_extra(LOGGED_AS, [self._reasons.get(index) for index in range(len(own))])
        return rewards.masked_fill(failed.any(1, keepdim=True), torch.nan)

    def state(self) -> dict[str, Any]:
        """What a continued run must know."""
        return {"counts": dict(self._count), "recent": {name: list(found) for name, found in self._recent.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``; an older checkpoint has none."""
        self._count.update(state.get("counts", {}))
        for name, found in state.get("recent", {}).items():
            self._recent[name] = deque(found, maxlen=_ROLLOUTS)

    def _judge(self) -> None:
        for name, recent in self._recent.items():
            failed, rows = (sum(counts) for counts in zip(*recent, strict=True))
            share = failed / rows
            if share > self.limit and (len(recent) >= _ENOUGH or failed == rows):
                # Of another process's completions the reason is not known here.
                reason = f" (last reason: {self._last[name]})" if name in self._last else ""
                self._stop = (
                    f'The reward "{name}" failed for {failed} of the last {rows} completions ({share:.0%}), more than '
                    f"max_reward_failures={self.limit:g} allows{reason}. A checkpoint was saved: mend what the reward "
                    "calls, and the same command goes on."
                )
        if self._stop is not None:
            self._recent.clear()  # before the checkpoint: what was mended would else stop the run that goes on again

    def _say_once(self, name: str, reason: str) -> None:
        if (name, reason) not in self._said and len(self._said) < _ROLLOUTS:
            self._said.add((name, reason))
            _LOG.warning(
                'The reward "%s" failed for a completion (%s). Such completions are left out and counted.', name, reason
            )

    def on_step_end(self, args, state, control, **kwargs: Any):
        if self._stop is not None:
            control.should_save = control.should_log = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs: Any):
        if self._stop is not None:
            stop, self._stop = self._stop, None
            raise RewardError(stop)
