"""A cache that keeps the keys and values of a prompt once for all the completions that continue it."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .reasons import Unshareable


class SharedLayer(DynamicLayer):
    """One layer's keys and values: those of the prompts, one row each, and those of what was generated since.

    Args:
        layer: filled by the prompts (P, K, L, D).
        generations: rows that continue each prompt, G; row ``b`` continues prompt ``b // G``.
        room: tokens that may follow.
        padding: (P, L) True at real tokens, or None where no prompt is padded.
    """

    def __init__(self, layer: DynamicLayer, generations: int, room: int, padding: Tensor | None) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None, "filled by the prefill"
        self.keys: Tensor
        self.values: Tensor
        self.prompt_keys, self.prompt_values = layer.keys, layer.values
        self.generations, self.padding = generations, padding
        self.decoded = 0
        prompts, heads, self.prompt_length, _ = layer.keys.shape
        rows = prompts * generations
        self.room_keys = layer.keys.new_empty(rows, heads, room, layer.keys.shape[-1])
        self.room_values = layer.values.new_empty(rows, heads, room, layer.values.shape[-1])
        self.keys, self.values = self.room_keys[:, :, :0], self.room_values[:, :, :0]
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds (B, K, n, D) and returns all that was generated, without the prompts."""
        end = self.decoded + key_states.shape[2]
        if end > self.room_keys.shape[2]:
            raise Unshareable(f"more than the {self.room_keys.shape[2]} tokens it has room for were generated")
        self.room_keys[:, :, self.decoded : end] = key_states
        self.room_values[:, :, self.decoded : end] = value_states
        self.decoded = end
        self.keys, self.values = self.room_keys[:, :, :end], self.room_values[:, :, :end]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.prompt_length + self.decoded

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, L + decoded, D) as a cache without sharing holds them."""
        prompts = (x.repeat_interleave(self.generations, 0) for x in (self.prompt_keys, self.prompt_values))
        keys, values = (torch.cat(pair, 2) for pair in zip(prompts, (self.keys, self.values), strict=True))
        return keys, values

    def attend(self, query: Tensor, scaling: float | None = None) -> Tensor:
        """The new token of every row (B, H, 1, D) to its prompt and to what follows it: (B, 1, H, D).

        One softmax over both parts; the prompt's keys meet all the queries of its group in one product.
        """
        rows, heads, _, width = query.shape
        groups, kv = self.generations, self.keys.shape[1]
        prompts, repeats, decoded = rows // groups, heads // kv, self.decoded
        scale = width**-0.5 if scaling is None else scaling
        queries = query.view(prompts, groups, kv, repeats, width).transpose(1, 2) * scale  # (P, K, G, R, D)
        queries = queries.reshape(prompts, kv, groups * repeats, width)
        to_prompt = queries @ self.prompt_keys.transpose(-1, -2)  # (P, K, G * R, L)
        if self.padding is not None:
            to_prompt = to_prompt.masked_fill(~self.padding[:, None, None], float("-inf"))
        own = queries.view(prompts, kv, groups, repeats, width).transpose(1, 2)  # (P, G, K, R, D)
        keys = self.keys.view(prompts, groups, kv, decoded, width)
        to_own = (own @ keys.transpose(-1, -2)).transpose(1, 2).reshape(prompts, kv, groups * repeats, decoded)
        weights = torch.cat([to_prompt, to_own], -1).softmax(-1, torch.float32).to(query.dtype)
        from_prompt = weights[..., : self.prompt_length] @ self.prompt_values  # (P, K, G * R, Dv)
        own = weights[..., self.prompt_length :].view(prompts, kv, groups, repeats, decoded).transpose(1, 2)
        from_own = own @ self.values.view(prompts, groups, kv, decoded, -1)  # (P, G, K, R, Dv)
        out = from_prompt.view(prompts, kv, groups, repeats, -1).transpose(1, 2) + from_own
        return out.reshape(rows, 1, heads, -1)


def share(cache: Any, index: Any, generations: int | None, room: int, padding: Tensor, whole: tuple[int, ...]) -> Any:
    """A cache filled by prompts, for rows that continue them.

    Args:
        cache: as the model made it, rows are prompts.
        index: (B,) the prompt of each row.
        generations: rows of each prompt where all have as many and stand together, else None: nothing is shared then.
        room: tokens that may follow.
        padding: (P, L) True at real tokens.
        whole: numbers of layers that hold no keys of the prompt's tokens (cross-attention).
    """
    masked = None if bool(padding.all()) else padding
    for number, layer in enumerate(cache.layers):
        plain = type(layer) is DynamicLayer and layer.is_initialized and number not in whole
        if generations is not None and plain:
            cache.layers[number] = SharedLayer(layer, generations, room, masked)
        elif not isinstance(layer, DynamicLayer) or layer.is_initialized:
            layer.reorder_cache(index)
    return cache
