"""Log-probabilities of a group from one packed row."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..collate import collate
from ..encode import EncodedPrompt
from .attention import packing
from .features import Features
from .layout import Layout
from .mixers import prepared_masks
from .rollout import positions


@dataclass(frozen=True)
class Scorer:
    """How one model scores groups.

    Attributes:
        model: what is called: the trainer's model, wrapped as it may be.
        plain: the same without wrappers, adapters included.
        features: of the plain model.
        autocast: the precision of training.
        fused: compute the packed attention by FlexAttention.
    """

    model: Any
    plain: Any
    features: Features
    autocast: Callable[[], AbstractContextManager]
    fused: bool = False

    def group(self, encoded: EncodedPrompt, completions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (G, T) and entropies (G, T) of the completions of one prompt, 0 where ``mask`` is.

        Args:
            encoded: the prompt.
            completions: (G, T) token ids.
            mask: (G, T), 1 at real tokens.

        Raises:
            Unshareable: the prompt attends to its completions.
        """
        prompt = torch.tensor(encoded.input_ids, device=completions.device)
        real = mask.any(0).nonzero()
        width = int(real[-1]) + 1 if len(real) else 1  # what follows belongs to longer rows of other groups
        layout = Layout(len(prompt) - 1, len(completions), width)
        inputs = self._inputs(encoded, prompt, completions, layout)
        labels = completions.masked_fill(mask == 0, -100)[:, :width].reshape(1, -1)
        labels = torch.cat([labels.new_full((1, layout.prefix), -100), labels], 1)
        with self.features.of([encoded]), packing(layout, self.fused), self.autocast():
            out = self.model(**inputs, shift_labels=labels, fused_lm_head=True)
        rest = (0, completions.shape[1] - width)
        logps = torch.nn.functional.pad(layout.unpack(out.log_probs), rest)
        return logps, None if out.entropy is None else torch.nn.functional.pad(layout.unpack(out.entropy), rest)

    def _inputs(self, encoded: EncodedPrompt, prompt: Tensor, completions: Tensor, layout: Layout) -> dict[str, Any]:
        extra = layout.width - 1
        logical = torch.cat([prompt, completions[0, :extra]])[None]
        inputs = collate([encoded], extra=[extra], device=prompt.device)
        places = positions(self.plain, logical, torch.ones_like(logical), inputs)
        ids = layout.pack(prompt, completions)
        packed: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        packed |= {name: layout.repeat(inputs[name]) for name in encoded.tokens}
        if places is not None:
            packed["position_ids"] = layout.repeat(places, -1)
        masks = prepared_masks(self.plain, layout, self.fused)
        if masks is not None:
            packed["attention_mask"] = masks
        return {**inputs, **packed}
