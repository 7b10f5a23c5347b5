"""Supervised warm start: transformers' Trainer with our encoding and TRL's log-probability head, every device.

The loss is the mean negative log-probability of the completion's tokens; prompt and media carry none.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from .checkpoint import ExactCheckpoints
from .checks import GradientCheck
from .data import MEDIA_COLUMNS, to_sample
from .encode import EncodedPrompt, check_placeholders, collate, completion_ids, encode
from .errors import ConfigError, DataFormatError, UnsupportedError
from .models.families import family_of, placeholder_ids, tower_of
from .patches.trl import LOG_PROBS
from .rewards.text import completion_text, written
from .trainer_config import check_ranges, resolve_precision


@dataclass
class VLMSFTConfig(TrainingArguments):
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
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows are encoded from their columns."})
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


class VLMSFTTrainer(ExactCheckpoints):
    """Learns the completions of ``prompt`` + ``image(s)`` + completion rows.

    Args:
        model: the model, with or without adapters.
        args: a ``VLMSFTConfig``.
        train_dataset: rows as for ``VLMGRPOTrainer``, with the text to learn in ``args.completion_column``.
        processing_class: the processor; it is copied and never changed.
        media_root: the folder that relative media paths start from.
        kwargs: the remaining arguments of transformers' ``Trainer``.

    Raises:
        ConfigError: the dataset has no such column.
        DataFormatError: a row without a completion.
        GradientError: a trained tower receives no gradient on step 1.
    """

    def __init__(
        self,
        model: Any,
        args: VLMSFTConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        media_root: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        names = getattr(train_dataset, "column_names", None)
        if names is not None and args.completion_column not in names:
            raise ConfigError(
                f'The dataset has no column "{args.completion_column}" to learn (it has {", ".join(names)}). '
                "Set train.completion_column to one of them."
            )
        LOG_PROBS.ensure()
        self.media_root = None if media_root is None else Path(media_root)
        processing_class = copy.deepcopy(processing_class)
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
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
        add_fused_lm_head(base)
        self.placeholder_ids = placeholder_ids(model.config, processing_class)
        family = family_of(model.config)
        self._gradient_metrics: dict[str, float] = {}
        self._gradient_check = GradientCheck(
            lambda name: tower_of(family, name),
            args.gradient_check,
            self._gradient_metrics.__setitem__ if args.gradient_report else None,
        )
        self.add_callback(self._gradient_check)

    def collate_rows(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows to model inputs: prompts left-padded, completions right-padded, ``labels`` -100 elsewhere."""
        pairs = [self._encode_row(row) for row in rows]
        encodings, targets = [encoding for encoding, _ in pairs], [torch.tensor(ids) for _, ids in pairs]
        prompt = max(len(encoding.input_ids) for encoding in encodings)
        completion = max(len(ids) for ids in targets)
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
            **collate(encodings, prompt + completion, [completion] * len(rows)),
        }

    def _encode_row(self, row: dict[str, Any]) -> tuple[EncodedPrompt, list[int]]:
        value = row.get(self.args.completion_column)
        completion = completion_text(value) if isinstance(value, (str, list)) else written(value)
        if value is None or not completion:
            raise DataFormatError(
                f'A row has no text in "{self.args.completion_column}" to learn: {str(row.get("prompt"))[:80]}. '
                "Fill it in, or remove the row."
            )
        sample = to_sample({key: row[key] for key in ("prompt", *MEDIA_COLUMNS) if key in row}, self.media_root)
        encoding = encode(self.processing_class, sample)
        check_placeholders(encoding, sample, self.placeholder_ids)
        return encoding, completion_ids(self.processing_class, sample, completion)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = {**inputs, "fused_lm_head": True}
        outputs: Any
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        rows, width = inputs["input_ids"].shape
        has_media = any(v.shape[:2] != (rows, width) for v in inputs.values() if isinstance(v, Tensor))
        self._gradient_check.watch(outputs.log_probs, [has_media] * rows)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self._gradient_metrics}, start_time)
