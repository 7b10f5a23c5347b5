"""What a run is stopped for: a trained tower without gradient, prompts that are too long, no step at all."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .errors import ConfigError, EncodingError, GradientError, MediaError
from .intake import Intake
from .waiting import track


@dataclass
class TowerGradient:
    """Gradients of one tower's trainable parameters: ``received`` of ``trainable`` are finite and non-zero."""

    trainable: int = 0
    received: int = 0
    non_finite: int = 0
    square_sum: float = 0.0
    first_without: str = ""

    @property
    def norm(self) -> float:
        return math.sqrt(self.square_sum)


def gradient_report(model: nn.Module, tower_of: Callable[[str], str]) -> dict[str, TowerGradient]:
    """Count, per tower, the trainable parameters that hold a finite non-zero gradient.

    Args:
        model: after a backward pass.
        tower_of: parameter name to tower name, such as ``vision`` or ``language``.
    """
    report: dict[str, TowerGradient] = defaultdict(TowerGradient)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower = report[tower_of(name)]
        tower.trainable += 1
        norm = 0.0 if parameter.grad is None else torch.linalg.vector_norm(parameter.grad.float()).item()
        if not math.isfinite(norm):
            tower.non_finite += 1
        elif norm > 0:
            tower.received += 1
            tower.square_sum += norm**2
        elif not tower.first_without:
            tower.first_without = name
    return dict(report)


class GradientCheck(TrainerCallback):
    """Stops a run whose trained tower receives no gradient, naming the tower.

    The trainer shows it every output of the model that the loss is made of (``watch``): a vision tower owes no
    gradient to rows without pictures, an audio tower none to rows without sound, and nothing owes one to rows that do
    not count (equal rewards, truncated and masked completions), so the check waits for a row that counts.

    Args:
        tower_of: parameter name to tower name.
        check: stop on a tower without gradient.
        log: called with ``gradient/{tower}/...`` metrics each step, or None.
    """

    def __init__(
        self, tower_of: Callable[[str], str], check: bool = True, log: Callable[[str, float], None] | None = None
    ) -> None:
        self.tower_of = tower_of
        self.pending = check
        self.log = log
        self.saw: set[str] = set()
        self.saw_signal = False

    def watch(self, outputs: torch.Tensor | None, senses: Sequence[Iterable[str]]) -> None:
        """Note which rows of ``outputs`` (B, T) the backward pass gives a gradient, and what their media reach.

        Args:
            outputs: what the loss is made of.
            senses: per row, ``vision`` and ``audio`` where its media reach that tower.
        """

        def note(gradient: torch.Tensor) -> None:
            for counts, row in zip(gradient.flatten(1).any(1).tolist(), senses, strict=True):
                self.saw_signal |= counts
                self.saw |= set(row) if counts else set()

        if self.pending and outputs is not None and outputs.requires_grad:
            outputs.register_hook(note)

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        assert model is not None, "the Trainer passes its model to every callback"
        if self.pending and not any(parameter.requires_grad for parameter in model.parameters()):
            raise GradientError(
                "The model has no trainable parameter. Switch on a LoRA part (lora.language or lora.vision), "
                "or train without LoRA."
            )

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if (self.pending and self.saw_signal) or self.log is not None:
            assert model is not None, "the Trainer passes its model to every callback"
            report = gradient_report(model, self.tower_of)
            if self.log is not None:
                _log(report, self.log)
            overflow = args.fp16 and any(tower.non_finite for tower in report.values())  # the loss scale adapts
            if self.pending and self.saw_signal and not overflow:
                sees = any(self.tower_of(name) == "vision" for name, _ in model.named_parameters())
                self._stop_on_silence(report, {"vision", "audio", "projector"} - self._reached(sees))
        self.saw, self.saw_signal = set(), False

    def _reached(self, sees: bool) -> set[str]:
        """The towers that owe a gradient to the media of this step; of a model that sees, the projector is vision's."""
        return self.saw | ({"projector"} if self.saw & ({"vision"} if sees else {"vision", "audio"}) else set())

    def _stop_on_silence(self, report: dict[str, TowerGradient], excused: set[str]) -> None:
        for name, tower in report.items():  # before silence: clipping an infinite norm silences all the others
            if tower.non_finite:
                raise GradientError(
                    f"{tower.non_finite} of {tower.trainable} trained parameters of the {name} tower have a NaN or "
                    "infinite gradient on step 1. Train in bf16 or fp32, or lower the learning rate."
                )
        due = {name: tower for name, tower in report.items() if name not in excused}
        for name, tower in due.items():
            if tower.received == 0:
                raise GradientError(
                    f"None of the {tower.trainable} trained parameters of the {name} tower received a gradient "
                    f"on step 1 (the first is {tower.first_without}). The graph is cut before it: with gradient "
                    'checkpointing use gradient_checkpointing_kwargs={"use_reentrant": False}, with Unsloth call '
                    f"apply_unsloth_patch() before loading, or do not train the {name} tower."
                )
        # Towers that only media reach stay owed until a batch with media has come.
        self.pending = len(due) < len(report)


class LengthCheck(TrainerCallback):
    """Reads every row before step 1 where one that is too long is to stop the run (``on_overlong="error"``).

    Args:
        intake: what reads the rows.
        rows: the training dataset; a streaming one is only checked row by row as it comes.
    """

    def __init__(self, intake: Intake, rows: Any) -> None:
        self.intake, self.rows = intake, rows

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.intake.max_length is None or self.intake.on_overlong == "drop" or not hasattr(self.rows, "__len__"):
            return
        for number, row in enumerate(track(self.rows, "Reading the length of every prompt", len(self.rows)), 1):
            try:
                self.intake.read(row, f"row {number} of the dataset")
            except (MediaError, EncodingError) as error:  # as in training
                self.intake.leave_out(error)


class StepsCheck(TrainerCallback):
    """A run without a single step is an error: a streaming dataset may be too small for one generation batch."""

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0 and state.max_steps > 0:
            raise ConfigError(
                "No step was taken: the dataset has fewer rows than one generation batch needs. Add rows, or lower "
                "generation_batch_size."
            )


def _log(report: dict[str, TowerGradient], log: Callable[[str, float], None]) -> None:
    for name, tower in report.items():
        log(f"gradient/{name}/received", tower.received)
        log(f"gradient/{name}/trainable", tower.trainable)
        log(f"gradient/{name}/norm", tower.norm)
