"""The two trainers of a comparison, and what is observed of one step of each."""

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..carry import Row
from ..patches.trl import own_grpo_trainer
from ..trainer import VLMGRPOTrainer
from .memory import PeakMemory, PeakTensors
from .timing import PHASES, Meter, Timed

__all__ = ["PHASES", "Meter", "Step", "Watched", "measured", "reference_class", "time_processor"]

Watched = Literal["memory", "tensors"] | None


@dataclass
class Step:
    """What one training step was.

    Attributes:
        seconds: by phase.
        prompt_tokens: P.
        completions: (G, C) token ids.
        logps: of the loss's forward: the tokens of a completion to its log-probabilities (C,), in nats.
        gradients: of every trained parameter.
        peak_bytes: of forward and backward, where it was asked for and is known: of the process, or of its tensors.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    completions: Tensor = field(default_factory=lambda: torch.empty(0))
    logps: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    peak_bytes: int | None = None

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(self.seconds.values())


class _Measured(Timed):
    """Stands before a GRPO trainer's class: takes the time of its methods and keeps what they made."""

    sampling_seed = 0
    watches: Watched = None

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(self.sampling_seed)
        out = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.step.prompt_tokens = len(prompt_ids[0])
        self.step.completions = torch.tensor(out[0])  # all of one length: none ends early
        return out

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        out = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if torch.is_grad_enabled():
            tokens = input_ids[:, -logits_to_keep:].tolist()
            self.step.logps |= dict(zip(map(tuple, tokens), out[0].detach().float().cpu(), strict=True))
        return out

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.watches is not None:
            on_gpu = self.accelerator.device.type == "cuda"
            is_whole = self.watches == "memory" or on_gpu
            self._peak = PeakMemory(self.accelerator.device) if is_whole else PeakTensors()
        return super().compute_loss(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        if self.watches is not None:
            self.step.peak_bytes = self._peak.read()
        self.step.seconds = self.meter.seconds
        named = self.model.named_parameters()  # copies: clipping works in place
        self.step.gradients = {name: p.grad.float().cpu().clone() for name, p in named if p.grad is not None}
        return loss

    def one_step(self, row: int, watch: Watched = None) -> Step:
        """Train one step on one row; the weights stay, since the learning rate is 0."""
        self.rows = getattr(self, "rows", self.train_dataset)
        self.train_dataset = self.rows.select([row])
        self.sampling_seed, self.watches = 1000 + row, watch
        self.step = Step()
        self.meter.reset()
        self.train()
        return self.step


class _Apart(VLMGRPOTrainer):
    """Ours with nothing shared: every completion's row is read and encoded by itself, as TRL does with images."""

    def _encoded_rows(self, inputs: list[dict[str, Any]]) -> list[Row]:
        return [row for one in inputs for row in super(_Apart, self)._encoded_rows([one])]


def measured(trainer: type, device: torch.device) -> Any:
    """A subclass of a GRPO trainer's class that is measured."""
    return type(f"Measured{trainer.__name__}", (_Measured, trainer), {"meter": Meter(device)})


def reference_class(modality: str) -> type:
    """What ours is compared with: TRL's own trainer, where it trains on the media."""
    return own_grpo_trainer() if modality == "image" else _Apart


def time_processor(processor: Any, meter: Meter) -> None:
    """Count every call of a processor as ``process``; TRL calls it in the midst of other work."""
    plain = type(processor)

    @functools.wraps(plain.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with meter.phase("process"):
            return plain.__call__(self, *args, **kwargs)

    processor.__class__ = type(plain.__name__, (plain,), {"__call__": call})
