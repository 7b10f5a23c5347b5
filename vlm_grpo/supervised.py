"""What the warm start and the reward model have in common: intake of rows, checks, exact checkpoints."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from .checkpoint import ExactCheckpoints
from .checks import GradientCheck, LengthCheck
from .config import MediaOptions
from .data import Sample
from .encode import EncodedPrompt
from .errors import ConfigError, UnsupportedError
from .intake import Intake
from .models.families import family_of, placeholder_ids_by_kind, tower_of
from .numbers import FiniteNumbers, NumbersCheck
from .precision import float32_adapters, leave_float16
from .ranges import check_ranges
from .rates import PartRates
from .rows import candidates, readable
from .trainer_config import RateOptions, resolve_precision


@dataclass
class SupervisedConfig(RateOptions, TrainingArguments):
    """transformers' ``TrainingArguments`` and ours. Precision left unset follows the machine."""

    gradient_check: bool = field(
        default=True, metadata={"help": "Stop after the first backward pass when a trained tower received no gradient."}
    )
    gradient_report: bool = field(
        default=False, metadata={"help": "Log at every step, per tower, how many trained parameters got a gradient."}
    )
    gradient_checkpointing: bool | Literal["unsloth"] = field(  # type: ignore[assignment]
        default=False,
        metadata={"help": 'Recompute activations; "unsloth" also moves them off the GPU, where Unsloth loaded it.'},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows are encoded from their columns."})
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Leave out rows of more tokens than this, media included. Prompts are never cut."},
    )
    on_overlong: Literal["drop", "error"] = field(
        default="drop", metadata={"help": "Rows longer than max_prompt_length are left out, or stop the run."}
    )
    bf16: bool | None = field(default=None, metadata={"help": "Mixed precision in bf16; unset follows the machine."})

    def __post_init__(self) -> None:
        resolve_precision(self)
        check_ranges(self)
        if self.label_smoothing_factor:
            raise UnsupportedError(
                f"label_smoothing_factor={self.label_smoothing_factor} is not available here: no loss of this package "
                "smooths its labels. Leave it out."
            )
        super().__post_init__()


class SupervisedTrainer(FiniteNumbers, PartRates, ExactCheckpoints):
    """Rows of a prompt, media and texts to learn from. A child says what a batch is and what its loss.

    Args:
        model: the model, with or without adapters.
        args: a ``SupervisedConfig``.
        train_dataset: rows as for ``VLMGRPOTrainer``, and what the child learns from.
        processing_class: the processor; it is copied and never changed.
        media_root: the folder that relative media paths start from.
        media: how media are opened, and what happens to those that cannot be.
        kwargs: the remaining arguments of transformers' ``Trainer``.

    Raises:
        ConfigError: no processor.
        GradientError: a trained tower receives no gradient on step 1.
        NumbersError: a loss, a gradient or a weight became NaN or infinite.
    """

    def __init__(
        self,
        model: Any,
        args: SupervisedConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        media_root: str | Path | None = None,
        media: MediaOptions | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if processing_class is None:
            raise ConfigError("processing_class is missing: rows are encoded by the model's processor. Give it.")
        self.args: Any = args  # a SupervisedConfig, which the base class declares as its own
        train_dataset = self.read_dataset(train_dataset, "train_dataset")
        eval_dataset = self.read_dataset(eval_dataset, "eval_dataset")
        processing_class = copy.deepcopy(processing_class)
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        leave_float16(args, model)
        float32_adapters(args, model)
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collate_rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # ours do, whatever the model says of its own loss
        self.intake = Intake(
            processing_class,
            placeholder_ids_by_kind(model.config, processing_class),
            MediaOptions.of(media),
            None if media_root is None else Path(media_root).expanduser(),
            max_length=args.max_prompt_length,
            on_overlong=args.on_overlong,
            seed=args.seed,
        )
        self.add_callback(LengthCheck(self.intake, train_dataset))
        self._family = family_of(model.config)
        self._gradient_metrics: dict[str, float] = {}
        self._gradient_check = GradientCheck(
            self.part_of, args.gradient_check, self._gradient_metrics.__setitem__ if args.gradient_report else None
        )
        self.numbers = NumbersCheck(self, self.tokenizer, self._gradient_metrics.__setitem__, self.forget)
        self.add_callback(self.numbers)
        self.add_callback(self._gradient_check)

    # ---- what a child may say -----------------------------------------------------------------------------------

    def read_dataset(self, dataset: Any, name: str) -> Any:
        """A dataset object in the canonical form, its media undecoded; None stays None."""
        return readable(dataset, name)[0]

    def collate_rows(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows to what ``compute_loss`` takes."""
        raise NotImplementedError(f"{type(self).__name__} says what a batch is")

    def part_of(self, name: str) -> str:
        """The tower that a parameter belongs to, for the gradient check."""
        return tower_of(self._family, name)

    def forget(self) -> None:
        """Drop what media were encoded to before."""

    # ---- what all of them do ------------------------------------------------------------------------------------

    def read_row(
        self, row: dict[str, Any], others: list[dict[str, Any]]
    ) -> tuple[dict[str, Any], Sample, EncodedPrompt]:
        """The row; where it cannot be used, another of its batch or of the dataset."""
        epoch = int(self.state.epoch or 0) if self.model is None or self.model.training else None
        some = candidates(self, row, others, str(row.get("prompt")))
        row, sample, encoding = self.intake.read_one_of(some, epoch=epoch)
        self.numbers.said.samples[encoding] = sample
        return row, sample, encoding

    def show_checks(self, outputs: torch.Tensor, encodings: list[EncodedPrompt]) -> None:
        """Let the checks of gradients and numbers see what (B, T) the loss is made of."""
        self._gradient_check.watch(outputs, [encoding.senses for encoding in encodings])
        self.numbers.said.watch(outputs, encodings)

    def processes(self) -> int:
        """How often a loss that is divided by the items of all processes is counted."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        with torch.no_grad():
            loss: Any = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self._gradient_metrics}, start_time)
