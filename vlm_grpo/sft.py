"""Supervised warm start: transformers' Trainer with our encoding and TRL's log-probability head, every device.

The loss is the mean negative log-probability of the completion's tokens; prompt and media carry none.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainingArguments

from .checkpoint import ExactCheckpoints
from .checks import GradientCheck, LengthCheck
from .collate import collate
from .config import MediaOptions
from .encode import EncodedPrompt, completion_ids
from .errors import ConfigError, DataFormatError, UnsupportedError
from .intake import Intake
from .models.families import family_of, placeholder_ids_by_kind, together, tower_of
from .models.modes import pinned_forward
from .numbers import FiniteNumbers, NumbersCheck
from .patches.trl import LOG_PROBS, add_fused_head
from .precision import float32_adapters, leave_float16
from .ranges import check_ranges
from .rates import PartRates
from .rewards.text import completion_text, written
from .rows import candidates, readable
from .trainer_config import RateOptions, resolve_precision


@dataclass
class VLMSFTConfig(RateOptions, TrainingArguments):
    """transformers' ``TrainingArguments`` and ours. Precision left unset follows the machine."""

    completion_column: str = field(
        default="completion", metadata={"help": "Column with the text (or number, or messages) to learn."}
    )
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
                f"label_smoothing_factor={self.label_smoothing_factor} is not available here: the log-probability head "
                "keeps no other logits. Leave it out."
            )
        super().__post_init__()


class VLMSFTTrainer(FiniteNumbers, PartRates, ExactCheckpoints):
    """Learns the completions of ``prompt`` + media + completion rows.

    Args:
        model: the model, with or without adapters.
        args: a ``VLMSFTConfig``.
        train_dataset: rows as for ``VLMGRPOTrainer``, with the text to learn in ``args.completion_column``.
        processing_class: the processor; it is copied and never changed.
        media_root: the folder that relative media paths start from.
        media: how media are opened, and what happens to those that cannot be.
        kwargs: the remaining arguments of transformers' ``Trainer``.

    Raises:
        ConfigError: the dataset has no such column.
        DataFormatError: a row without a completion.
        GradientError: a trained tower receives no gradient on step 1.
        NumbersError: a loss, a gradient or a weight became NaN or infinite.
    """

    def __init__(
        self,
        model: Any,
        args: VLMSFTConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        media_root: str | Path | None = None,
        media: MediaOptions | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        train_dataset, _ = readable(train_dataset, "train_dataset")
        eval_dataset, _ = readable(eval_dataset, "eval_dataset")
        names = getattr(train_dataset, "column_names", None)
        if names is not None and args.completion_column not in names:
            raise ConfigError(
                f'The dataset has no column "{args.completion_column}" to learn (it has {", ".join(names)}). '
                "Set train.completion_column to one of them."
            )
        LOG_PROBS.ensure()
        processing_class = copy.deepcopy(processing_class)
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        leave_float16(args, model)
        float32_adapters(args, model)
        self.args: Any  # a VLMSFTConfig, which the base class declares as its own
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collate_rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # the fused head does, whatever the model says of its own loss
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        add_fused_head(base)
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
        self._family = family = family_of(model.config)
        self._gradient_metrics: dict[str, float] = {}
        self._gradient_check = GradientCheck(
            lambda name: tower_of(family, name),
            args.gradient_check,
            self._gradient_metrics.__setitem__ if args.gradient_report else None,
        )
        self.numbers = NumbersCheck(self, self.tokenizer, self._gradient_metrics.__setitem__)
        self.add_callback(self.numbers)
        self.add_callback(self._gradient_check)

    def collate_rows(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows to tensors: prompts left-padded, completions right-padded, ``labels`` -100 elsewhere.

        Beside them ``encodings``: the rows' media, collated when it is known which rows share a forward.
        """
        pairs = [self._encode_row(row, rows) for row in rows]
        encodings, targets = [encoding for encoding, _ in pairs], [torch.tensor(ids) for _, ids in pairs]
        prompt = max(len(encoding.input_ids) for encoding in encodings)
        pad = self.tokenizer.pad_token_id
        ids = [torch.tensor([pad] * (prompt - len(e.input_ids)) + e.input_ids) for e in encodings]
        mask = [torch.tensor([0] * (prompt - len(e.input_ids)) + [1] * len(e.input_ids)) for e in encodings]
        tail_ids = pad_sequence(targets, batch_first=True, padding_value=pad)
        tail_mask = pad_sequence([torch.ones_like(t) for t in targets], batch_first=True)
        labels = pad_sequence(targets, batch_first=True, padding_value=-100)
        return {
            "input_ids": torch.cat([torch.stack(ids), tail_ids], 1),
            "attention_mask": torch.cat([torch.stack(mask), tail_mask], 1),
            "labels": torch.cat([labels.new_full((len(rows), prompt), -100), labels], 1),
            "encodings": encodings,
        }

    def _encode_row(self, row: dict[str, Any], others: list[dict[str, Any]]) -> tuple[EncodedPrompt, list[int]]:
        """The row; where it cannot be used, another of its batch or of the dataset."""
        epoch = int(self.state.epoch or 0) if self.model is None or self.model.training else None
        row, sample, encoding = self.intake.read_one_of(
            candidates(self, row, others, str(row.get("prompt"))), epoch=epoch
        )
        value = row.get(self.args.completion_column)
        completion = completion_text(value) if isinstance(value, (str, list)) else written(value)
        if value is None or not completion:
            raise DataFormatError(
                f'A row has no text in "{self.args.completion_column}" to learn: {str(row.get("prompt"))[:80]}. '
                "Fill it in, or remove the row."
            )
        self.numbers.said.samples[encoding] = sample
        return encoding, completion_ids(self.processing_class, sample, completion)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        encodings: list[EncodedPrompt] = inputs["encodings"]
        # Without a count (an evaluation) the sum is divided here; with one, transformers scales it by the processes.
        items = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"] != -100).sum()
        whole = 1 if num_items_in_batch is not None else self._processes()
        losses: list[Any] = []
        outputs: Any = None
        for rows in together(self._family, encodings):
            own = {name: inputs[name][rows] for name in ("input_ids", "attention_mask", "labels")}
            width, starts = own["input_ids"].size(1), own["attention_mask"].argmax(1).tolist()
            extra = [width - s - len(encodings[row].input_ids) for row, s in zip(rows, starts, strict=True)]
            media = collate([encodings[row] for row in rows], width, extra, own["input_ids"].device)
            with pinned_forward(model):
                loss, outputs = super().compute_loss(model, {**own, **media, "fused_lm_head": True}, True, items)
            self._gradient_check.watch(outputs.log_probs, [encodings[row].senses for row in rows])
            self.numbers.said.watch(outputs.log_probs, [encodings[row] for row in rows])
            losses.append(loss)
        loss: Any = sum(losses) / whole
        self.numbers.note(loss, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _processes(self) -> int:
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self._gradient_metrics}, start_time)
