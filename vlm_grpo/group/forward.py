"""Log-probabilities of groups from packed rows, and what a scalar head makes of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..collate import collate
from ..encode import EncodedPrompt
from ..models.heads import last_hidden_state
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

    def groups(
        self, encodings: list[EncodedPrompt], completions: Tensor, mask: Tensor, prompt_width: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and entropies (n, G, T) of the completions of n prompts, 0 where ``mask`` is.

        Args:
            encodings: the n prompts.
            completions: (n, G, T) token ids.
            mask: (n, G, T), 1 at real tokens.
            prompt_width: tokens that several prompts are padded to at least. Policy and reference see a group beside
                different ones: rounding is the same where sizes are.

        Raises:
            Unshareable: a prompt attends to its completions.
        """
        layout = self._layout(encodings, completions, mask, prompt_width)
        inputs = self._inputs(encodings, completions, layout)
        labels = completions.masked_fill(mask == 0, -100)[..., : layout.width].flatten(1)
        labels = torch.cat([labels.new_full((len(labels), layout.prefix), -100), labels], 1)
        with self.features.of(encodings), packing(layout, self.fused), self.autocast():
            out = self.model(**inputs, shift_labels=labels, fused_lm_head=True)
        rest = (0, completions.shape[-1] - layout.width)
        logps = pad(layout.unpack(out.log_probs), rest)
        return logps, None if out.entropy is None else pad(layout.unpack(out.entropy), rest)

    def values(
        self, encodings: list[EncodedPrompt], completions: Tensor, mask: Tensor, head: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """What a scalar head makes of the hidden state in front of each completion token, (n, G, T), 0 where ``mask``
        is.

        Args:
            encodings, completions, mask: as in ``groups``.
            head: hidden states (..., H) to numbers (...).

        Raises:
            Unshareable: a prompt attends to its completions.
        """
        layout = self._layout(encodings, completions, mask)
        inputs = self._inputs(encodings, completions, layout)
        with self.features.of(encodings), packing(layout, self.fused), self.autocast():
            found = layout.unpack(head(last_hidden_state(self.plain, **inputs)))
        return pad(found, (0, completions.shape[-1] - layout.width)).masked_fill(mask == 0, 0.0)

    def _layout(
        self, encodings: list[EncodedPrompt], completions: Tensor, mask: Tensor, prompt_width: int = 0
    ) -> Layout:
        """The sizes of the packed rows of these groups."""
        width, length = completions.shape[-1], max(prompt_width, *(len(e.input_ids) for e in encodings))
        if len(encodings) == 1:  # alone, what is padding for other groups is left out
            real = mask[0].any(0).nonzero()
            width, length = int(real[-1]) + 1 if len(real) else 1, len(encodings[0].input_ids)
        return Layout(length - 1, completions.shape[1], width)

    def encode(self, encodings: list[EncodedPrompt], device: Any) -> None:
        """Encode the media of prompts that share a forward, where their towers are frozen."""
        self.features.encode(
            encodings,
            lambda row: {
                "input_ids": torch.tensor([encodings[row].input_ids], device=device),
                **collate([encodings[row]], device=device),
            },
        )

    def _inputs(self, encodings: list[EncodedPrompt], completions: Tensor, layout: Layout) -> dict[str, Any]:
        prompts, real = _padded(encodings, completions.device, layout.prefix + 1)
        extra = layout.width - 1
        logical = torch.cat([prompts, completions[:, 0, :extra]], 1)
        seen = torch.cat([real, real.new_ones(len(real), extra)], 1)
        inputs = collate(encodings, logical.shape[1], [extra] * len(encodings), prompts.device)
        places = positions(self.plain, logical, seen, inputs)
        tokens = dict.fromkeys(name for encoded in encodings for name in encoded.tokens)
        packed: dict[str, Any] = {name: layout.repeat(inputs[name]) for name in tokens}
        packed |= {"input_ids": layout.pack(prompts, completions), "attention_mask": layout.repeat(seen)}
        if places is not None:
            packed["position_ids"] = layout.repeat(places, -1)
        masks = prepared_masks(self.plain, layout, self.fused)
        if masks is not None:
            packed["attention_mask"] = masks
        return {**inputs, **packed}


def _padded(encodings: list[EncodedPrompt], device: Any, width: int) -> tuple[Tensor, Tensor]:
    """Prompts (n, width) left-padded, and 1 at their tokens. The id of the padding is never looked at."""
    ids = [[0] * (width - len(encoded.input_ids)) + list(encoded.input_ids) for encoded in encodings]
    real = [[0] * (width - len(encoded.input_ids)) + [1] * len(encoded.input_ids) for encoded in encodings]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)
