"""Scores of responses: a scalar head on the hidden state of a sequence's last token."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..encode import EncodedPrompt
from ..group import GroupSharing
from ..models.adapters import role as in_role
from ..models.families import family_of, placeholder_ids
from ..models.modes import pinned_forward
from ..models.wrappers import plain_model, unwrapped
from ..scoring import as_one_forward, forwards
from ..scoring import values as plain_values


class Scores:
    """Scores sequences that are an encoded prompt, media included, and tokens behind it.

    Rows that hold the same ``EncodedPrompt`` object share its work, where that is exact (see ``GroupSharing``). With a
    gradient, unless the caller is under ``no_grad``; the model's mode is the caller's too.

    Args:
        model: with or without adapters, wrapped as it may be.
        head: hidden states (..., H) to numbers (...).
        role: the adapter that is active meanwhile; None leaves the one that is.
        sharing: the trainer's own; None makes one.
        autocast: the precision to compute in.
        batch_size: sequences a forward, at least one prompt's.
    """

    def __init__(
        self,
        model: Any,
        head: nn.Module,
        *,
        role: str | None = None,
        sharing: GroupSharing | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        batch_size: int = 8,
    ) -> None:
        self.model, self.head, self.role, self.autocast, self.batch_size = model, head, role, autocast, batch_size
        config = plain_model(model).config
        self.family = family_of(config)
        self.sharing = sharing or GroupSharing(self.family, "auto", placeholder_ids(config), autocast)

    def __call__(self, encodings: list[EncodedPrompt], suffixes: list[list[int]]) -> Tensor:
        """The scores (B,) of B sequences, in float32.

        Args:
            encodings: the prompts.
            suffixes: the tokens behind each, at least one.
        """
        assert all(suffixes), "a sequence that is scored has tokens behind its prompt"
        device = next(self.head.parameters()).device
        completions, mask, last = _padded(suffixes, device)

        def work(own: Any) -> Tensor:
            with in_role(unwrapped(own), self.role) if self.role else nullcontext(), pinned_forward(own):
                return self._values(own, completions, mask, encodings)

        return as_one_forward(self.model, work).gather(1, last[:, None])[:, 0]

    def _values(self, own: Any, completions: Tensor, mask: Tensor, encodings: list[EncodedPrompt]) -> Tensor:
        def plain(model: Any, rows: list[int]) -> Tensor:
            few = [encodings[row] for row in rows]
            ids, real = _whole(few, completions[rows], mask[rows])
            batches = forwards(self.family, few, self.batch_size)
            width = completions.size(1)
            return plain_values(plain_model(model), self.head, ids, real, width, few, batches, self.autocast)

        if self.sharing.on(own, encodings):
            arguments = (completions, mask, encodings, plain, self.batch_size)
            shared = self.sharing.values(own, self.head, *arguments)
            if shared is not None:
                return shared
        return plain(own, list(range(len(encodings))))


def _padded(suffixes: list[list[int]], device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and mask (B, T), and the place (B,) whose value is that of the last token.

    A value stands in front of a token, so one token more is counted behind the last; which one does not matter.
    """
    lengths = torch.tensor([len(suffix) for suffix in suffixes], device=device)
    width = int(lengths.max()) + 1
    tokens = [[*suffix, *[suffix[-1]] * (width - len(suffix))] for suffix in suffixes]
    mask = torch.arange(width, device=device)[None] <= lengths[:, None]
    return torch.tensor(tokens, device=device), mask.long(), lengths


def _whole(encodings: list[EncodedPrompt], completions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L + T) of left-padded prompts and what is behind them."""
    length = max(len(encoded.input_ids) for encoded in encodings)
    short = [length - len(encoded.input_ids) for encoded in encodings]
    # The last token of a prompt as its padding, which nobody looks at: a tokenizer's own may be a placeholder.
    prompts = [[e.input_ids[-1]] * n + list(e.input_ids) for e, n in zip(encodings, short, strict=True)]
    real = [[0] * n + [1] * (length - n) for n in short]
    ids = torch.cat([torch.tensor(prompts, device=completions.device), completions], 1)
    return ids, torch.cat([torch.tensor(real, device=completions.device), mask], 1)
