"""A trainer that writes down what it computed, row by row."""

from dataclasses import dataclass
from typing import Any

import tiny
from torch import Tensor

from vlm_grpo import VLMGRPOConfig, VLMGRPOTrainer


@dataclass
class Scored:
    """One row of one micro-batch: its tokens and the trainer's figures for it."""

    prompt: list[int]
    completion: list[int]
    logps: Tensor
    old: Tensor | None
    ref: Tensor | None
    advantage: float
    tokens_in_generation: float


class Recorder(VLMGRPOTrainer):
    """Keeps every training forward's rows in ``rows``, micro-batch by micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rows: list[list[Scored]] = []
        self.seen_rows: list[Any] = []
        self._current: dict[str, Any] | None = None
        if getattr(getattr(args[0], "config", None), "model_type", "") in tiny.PREFIX_LM:
            args[2].group_sharing = "auto"  # which nothing else in these tests needs
        super().__init__(*args, **kwargs)

    def _encoded_rows(self, inputs):
        rows = super()._encoded_rows(inputs)
        self.seen_rows += rows
        return rows

    def _compute_loss(self, model, inputs):
        self._current = inputs
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._current = None

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        out = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if self._current is not None:  # not while a rollout is scored
            inputs, width = self._current, input_ids.size(1) - logits_to_keep
            batch = []
            for i, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
                length = int(mask[width:].sum())
                batch.append(
                    Scored(
                        ids[:width][mask[:width]].tolist(),
                        ids[width : width + length].tolist(),
                        out[0][i, :length].detach().clone(),
                        inputs["old_per_token_logps"][i, :length] if "old_per_token_logps" in inputs else None,
                        inputs["ref_per_token_logps"][i, :length] if "ref_per_token_logps" in inputs else None,
                        float(inputs["advantages"][i]),
                        float(inputs.get("num_items_in_batch", 0)),
                    )
                )
            self.rows.append(batch)
        return out


def reward(completions, completion_ids, **columns):
    """Differs within a group, and needs nothing from the row."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def config(path: Any, **options: Any) -> VLMGRPOConfig:
    """Small, quiet, deterministic; 2 completions a prompt, 2 micro-batches a generation."""
    defaults = {
        "output_dir": str(path),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 0.0,
        "temperature": 0.8,
        "weight_decay": 0.0,
        "group_sharing": True,  # a fallback would be an error
        "flow_check": False,  # has tests of its own, and takes as long as these runs
    }
    return VLMGRPOConfig(**{**defaults, **options})
