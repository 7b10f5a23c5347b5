"""The packed row of a group: the prompt once, then every completion behind it. Rows of several groups make a batch.

A row holds ``prompt[:-1] | (last prompt token + completion[:-1]) x G``. The last prompt token stands in front of every
completion, so that each position has exactly one label. Token, position and mask of a place are those that it would
have in a row of its own, prompt and one completion: its *logical* place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reasons import Unshareable


@dataclass(frozen=True)
class Layout:
    """The sizes of a packed row.

    Attributes:
        prefix: prompt tokens in front of the last one.
        suffixes: completions, G.
        width: tokens of each suffix, C: the last prompt token and all but the last of the completion.
    """

    prefix: int
    suffixes: int
    width: int

    @property
    def length(self) -> int:
        return self.prefix + self.suffixes * self.width

    @property
    def logical(self) -> int:
        """Tokens of prompt and one completion, without the last."""
        return self.prefix + self.width

    def repeat(self, row: Tensor, dim: int = 1) -> Tensor:
        """What is the same for all completions: (..., logical, ...) along ``dim`` to (..., length, ...)."""
        prefix, suffix = row.split([self.prefix, self.width], dim)
        return torch.cat([prefix, *[suffix] * self.suffixes], dim)

    def pack(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """Ids of n groups, prompts (n, prefix + 1) left-padded and completions (n, G, T), to rows (n, length)."""
        last = prompts[:, None, -1:].expand(-1, self.suffixes, -1)
        suffixes = torch.cat([last, completions[..., : self.width - 1]], -1)
        return torch.cat([prompts[:, :-1], suffixes.flatten(1)], 1)

    def unpack(self, rows: Tensor) -> Tensor:
        """What belongs to the completions: (n, length) to (n, G, C)."""
        return rows[:, self.prefix :].unflatten(1, (self.suffixes, self.width))


@dataclass(frozen=True, eq=False)
class Packed:
    """Goes in the place of an attention mask to every layer, also when checkpointing runs one again.

    Attributes:
        layout: the row's sizes.
        prompt: the model's own mask over the prefix (n, heads or 1, prefix, prefix), or None where it is causal.
        suffix: the mask of one completion (n, heads or 1, C, prefix + C), or None likewise.
        fused: compute its attention by FlexAttention.
    """

    layout: Layout
    prompt: Tensor | None = None
    suffix: Tensor | None = None
    fused: bool = False

    @classmethod
    def of(
        cls,
        layout: Layout,
        mask_of: Callable[[int], Tensor | None],
        fused: bool = False,
        padding: Tensor | None = None,
    ) -> "Packed":
        """Cut from the model's own mask over logical rows.

        Args:
            layout: the rows' sizes.
            mask_of: the boolean mask (n, heads or 1, L, L) of rows of L tokens, or None where it is causal.
            fused: compute its attention by FlexAttention.
            padding: (n, L) False at padding, whose own row in a mask may be anything.

        Raises:
            Unshareable: the prompt attends to what follows it, so it differs from completion to completion.
        """
        mask = mask_of(layout.logical)
        if mask is None:
            return cls(layout, fused=fused)
        prefix = layout.prefix
        ahead = mask[..., :prefix, prefix:].any(-1)  # (n, heads or 1, prefix)
        if bool((ahead if padding is None else ahead & padding[:, None, :prefix]).any()):
            raise Unshareable("tokens of the prompt attend to what follows them, as in a prefix language model")
        return cls(layout, mask[..., :prefix, :prefix], mask[..., prefix:, :], fused)


def at_completions(layout: Layout, rows: Any) -> Tensor:
    """Hidden states or features of a packed row (1, length, ...) at its completions (G, C, ...)."""
    return rows[0, layout.prefix :].unflatten(0, (layout.suffixes, layout.width))
