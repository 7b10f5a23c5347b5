"""Supervised warm start: transformers' Trainer with our encoding and TRL's log-probability head, every device.

The loss is the mean negative log-probability of the completion's tokens; prompt and media carry none.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .collate import collate
from .config import MediaOptions
from .encode import EncodedPrompt, completion_ids
from .errors import ConfigError, DataFormatError
from .models.families import together
from .models.modes import pinned_forward
from .patches.trl import LOG_PROBS, add_fused_head
from .rewards.text import completion_text, written
from .supervised import SupervisedConfig, SupervisedTrainer


@dataclass
class VLMSFTConfig(SupervisedConfig):
    """transformers' ``TrainingArguments`` and ours. Precision left unset follows the machine."""

    completion_column: str = field(
        default="completion", metadata={"help": "Column with the text (or number, or messages) to learn."}
    )


class VLMSFTTrainer(SupervisedTrainer):
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
        LOG_PROBS.ensure()
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, media_root, media, **kwargs)
        add_fused_head(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def read_dataset(self, dataset: Any, name: str) -> Any:
        dataset = super().read_dataset(dataset, name)
        names = getattr(dataset, "column_names", None) if name == "train_dataset" else None
        if names is not None and self.args.completion_column not in names:
            raise ConfigError(
                f'The dataset has no column "{self.args.completion_column}" to learn (it has {", ".join(names)}). '
                "Set train.completion_column to one of them."
            )
        return dataset

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
        row, sample, encoding = self.read_row(row, others)
        value = row.get(self.args.completion_column)
        completion = completion_text(value) if isinstance(value, (str, list)) else written(value)
        if value is None or not completion:
            raise DataFormatError(
                f'A row has no text in "{self.args.completion_column}" to learn: {str(row.get("prompt"))[:80]}. '
                "Fill it in, or remove the row."
            )
        return encoding, completion_ids(self.processing_class, sample, completion)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        encodings: list[EncodedPrompt] = inputs["encodings"]
        # Without a count (an evaluation) the sum is divided here; with one, transformers scales it by the processes.
        items = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"] != -100).sum()
        whole = 1 if num_items_in_batch is not None else self.processes()
        losses: list[Any] = []
        outputs: Any = None
        for rows in together(self._family, encodings):
            own = {name: inputs[name][rows] for name in ("input_ids", "attention_mask", "labels")}
            width, starts = own["input_ids"].size(1), own["attention_mask"].argmax(1).tolist()
            extra = [width - s - len(encodings[row].input_ids) for row, s in zip(rows, starts, strict=True)]
            media = collate([encodings[row] for row in rows], width, extra, own["input_ids"].device)
            with pinned_forward(model):
                loss, outputs = super().compute_loss(model, {**own, **media, "fused_lm_head": True}, True, items)
            self.show_checks(outputs.log_probs, [encodings[row] for row in rows])
            losses.append(loss)
        loss: Any = sum(losses) / whole
        self.numbers.note(loss, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss
