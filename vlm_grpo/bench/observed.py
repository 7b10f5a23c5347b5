"""A trainer that says the seconds and the memory of each of its steps."""

from typing import Any

import torch
from transformers import TrainerCallback

from .timing import PhaseMeter, Timed


class _Observed(Timed):
    """As ``Timed``; a step begins where its rows are fetched."""

    meter: PhaseMeter
    lines: Any  # what is told, see `contender.Lines`
    prompts: int
    lengths: tuple[int, int] = (0, 0)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.meter.reset()
        return super().get_batch_samples(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        out = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.lengths = (max(map(len, prompt_ids)), max(map(len, out[0])))
        return out


class StepsSaid(TrainerCallback):
    """After each step: how long it took, and how much memory."""

    def __init__(self, trainer: Any, warm_up: int) -> None:
        self.trainer, self.warm_up = trainer, warm_up

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        seconds = trainer.meter.finish()
        trainer.lines.say(
            "step",
            prompts=trainer.prompts,
            warm_up=state.global_step <= self.warm_up,
            seconds=seconds,
            phases=dict(trainer.meter.seconds),
            peaks=trainer.meter.peaks,
            prompt_tokens=trainer.lengths[0],
            completion_tokens=trainer.lengths[1],
        )


def timed(trainer: type, device: torch.device) -> Any:
    """A subclass of a GRPO trainer's class that observes itself."""
    return type(f"Observed{trainer.__name__}", (_Observed, trainer), {"meter": PhaseMeter(device)})
