"""The two trainers of a comparison, and what is observed of one step of each."""

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..carry import Row
from ..patches.trl import own_grpo_trainer
from ..trainer import VLMGRPOTrainer
from .memory import PeakMemory, PeakTensors

Watched = Literal["memory", "tensors"] | None
PHASES: tuple[str, ...] = ("process", "generate", "old_ref_logps", "forward_backward", "other")


class Meter:
    """Seconds by phase; a stretch of code counts for the innermost phase that is open.

    On the CPU these are CPU seconds of the whole process, on a GPU seconds until it has finished.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._open: list[str] = []
        self._since = 0.0

    def reset(self) -> None:
        """Begin a new step."""
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside counts for ``name``."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = self._now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


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


_Trainer: Any = object  # a base class at run time only: see `measured`


class _Measured(_Trainer):
    """Stands before a GRPO trainer's class: takes the time of its methods and keeps what they made."""

    meter: Meter
    sampling_seed = 0
    watches: Watched = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("process"):  # where a dataset decodes its pictures
            return super().get_batch_samples(*args, **kwargs)

    def _encoded_rows(self, *args: Any, **kwargs: Any) -> Any:  # ours only
        with self.meter.phase("process"):
            return super()._encoded_rows(*args, **kwargs)

    def _tokenize_prompts(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("process"):
            return super()._tokenize_prompts(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(self.sampling_seed)
        with self.meter.phase("generate"):
            out = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.step.prompt_tokens = len(prompt_ids[0])
        self.step.completions = torch.tensor(out[0])  # all of one length: none ends early
        return out

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        phase = "forward_backward" if torch.is_grad_enabled() else "old_ref_logps"
        with self.meter.phase(phase):
            out = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        if torch.is_grad_enabled():
            tokens = input_ids[:, -logits_to_keep:].tolist()
            self.step.logps |= dict(zip(map(tuple, tokens), out[0].detach().float().cpu(), strict=True))
        return out

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("other"):
            return super()._prepare_inputs(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.watches is not None:
            on_gpu = self.accelerator.device.type == "cuda"
            is_whole = self.watches == "memory" or on_gpu
            self._peak = PeakMemory(self.accelerator.device) if is_whole else PeakTensors()
        return super().compute_loss(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("forward_backward"):
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
