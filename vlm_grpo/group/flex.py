"""Attention over a packed row in one kernel: FlexAttention, which leaves out the blocks that no token may see.

The same as ``packed_attention``, whose two passes copy the prompt's keys once per completion and, with a mask and
grouped queries on a GPU, once per query head. Here nothing is copied.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils._triton import has_triton

from .layout import Layout, Packed

_LOG = logging.getLogger("vlm_grpo")
_BLOCK = 128  # tokens along each side of a block, FlexAttention's own default
_SMALLEST_HEAD = 16  # of its kernels on a GPU

# Whether the token at place q sees the one at place k: (batch, head, q, k), indices of the packed row, to bool.
MaskMod = Callable[[Any, Any, Tensor, Tensor], Tensor]


class _Seen(NamedTuple):
    """What the tokens of a row see: ``rule`` says it of each pair, ``blocks`` which pairs a kernel need not look at."""

    rule: MaskMod
    blocks: BlockMask


# All layers of a forward hold one Packed, also when checkpointing runs them again.
_SEEN: WeakKeyDictionary[Packed, dict[torch.device, _Seen]] = WeakKeyDictionary()


def fuses(query: Tensor, value: Tensor, packed: Packed, dropout: float = 0.0) -> bool:
    """Whether ``flex_packed_attention`` computes this; where it does not, ``packed_attention`` does.

    Args:
        query: (1, H, length, D).
        value: (1, K, length, Dv).
        packed: the row's layout and masks.
        dropout: on the weights, of which FlexAttention has none.
    """
    own = [mask for mask in (packed.prompt, packed.suffix) if mask is not None]
    if dropout > 0 or any(mask.shape[1] > 1 for mask in own):
        return False
    if query.device.type != "cuda":
        return query.device.type == "cpu"
    # A row of a single block has nothing to leave out, and would be compiled for itself.
    small = packed.layout.length <= _BLOCK or min(query.shape[-1], value.shape[-1]) < _SMALLEST_HEAD
    return not small and _compiles()


@cache
def _compiles() -> bool:
    found = has_triton()
    if not found:
        _LOG.warning('group_attention="flex" needs triton, which is missing or too old here: "reference" is used.')
    return found


def flex_packed_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None = None
) -> Tensor:
    """Attention over a packed row: the prompt to itself, each completion to the prompt and to itself.

    Compiled on a GPU. On a CPU it is slow and only for tests; gradients come from dense attention by the same rule
    there, since FlexAttention has none.

    Args:
        query: (1, H, length, D); ``key``, ``value``: (1, K, length, D) with H a multiple of K, never expanded to H.
        packed: the row's layout and masks, for which ``fuses`` is true.
        scaling: of the scores; 1 / sqrt(D) by default.

    Returns:
        (1, H, length, D).
    """
    device = query.device
    # FlexAttention takes one dtype: rotary embeddings may have made 32 bits of queries and keys alone.
    mixed = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if mixed else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    seen = _seen(packed, device)
    grouped = query.shape[1] != key.shape[1]
    if device.type == "cpu" and (query.requires_grad or key.requires_grad or value.requires_grad):
        mask = _dense(seen.rule, packed.layout.length, device)
        return scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=grouped)
    attend: Any = _compiled() if device.type == "cuda" else flex_attention
    return attend(query, key, value, block_mask=seen.blocks, scale=scaling, enable_gqa=grouped)


@cache
def _compiled() -> Callable[..., Tensor]:
    # Rows differ in length from step to step.
    return torch.compile(flex_attention, dynamic=True)


def _seen(packed: Packed, device: torch.device) -> _Seen:
    own = _SEEN.setdefault(packed, {})
    if device not in own:
        rule = mask_mod(packed, device)
        own[device] = _Seen(rule, block_mask(rule, packed.layout.length, device))
    return own[device]


def mask_mod(packed: Packed, device: torch.device | str) -> MaskMod:
    """The rule by which tokens of a packed row see each other, in indices of the row.

    A token's place is the one it has in a row of prompt and one completion, its segment 0 for the prompt and 1 to G for
    the completions. It sees what the model's own mask lets it see from place to place, of the prompt and its segment.

    Numbers would be compiled into the kernel, anew for each layout: the rule holds tensors only.
    """
    layout = packed.layout
    place = layout.repeat(torch.arange(layout.logical, device=device, dtype=torch.int32), 0)
    completions = torch.arange(1, layout.suffixes + 1, device=device, dtype=torch.int32)
    segment = pad(completions.repeat_interleave(layout.width), (layout.prefix, 0))
    _vary(place, segment)
    if packed.prompt is None and packed.suffix is None:

        def causal(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
            return (place[k] <= place[q]) & ((segment[k] == 0) | (segment[k] == segment[q]))

        return causal

    own = _own_mask(packed, device)
    _vary(own)

    def masked(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
        return own[place[q], place[k]] & ((segment[k] == 0) | (segment[k] == segment[q]))

    return masked


def _own_mask(packed: Packed, device: torch.device | str) -> Tensor:
    """The model's own mask over a row of prompt and one completion (logical, logical)."""
    layout: Layout = packed.layout
    own = torch.ones(layout.logical, layout.logical, dtype=torch.bool, device=device).tril()
    if packed.prompt is not None:
        own[: layout.prefix, : layout.prefix] = packed.prompt[0, 0]
    if packed.suffix is not None:
        own[layout.prefix :] = packed.suffix[0, 0]
    return own


def block_mask(rule: MaskMod, length: int, device: torch.device | str) -> BlockMask:
    """Which blocks of a row a kernel leaves out, and in which it looks at the rule.

    The same as torch's ``create_block_mask``, which holds a number for each pair of tokens at once.
    """
    places, blocks, counts = torch.arange(length, device=device), -(-length // _BLOCK), []
    zero = places.new_zeros(())
    for start in range(0, length, _BLOCK):
        seen = rule(zero, zero, places[start : start + _BLOCK, None], places[None])  # (<= _BLOCK, length)
        counts.append(pad(seen, (0, blocks * _BLOCK - length)).unflatten(1, (blocks, _BLOCK)).sum((0, 2)))
    count = torch.stack(counts)  # (blocks, blocks)
    full = count == _BLOCK**2
    out = BlockMask.from_kv_blocks(
        *_listed((count > 0) & ~full), *_listed(full), BLOCK_SIZE=_BLOCK, mask_mod=rule, seq_lengths=(length, length)
    )
    _vary(*(part for part in out.as_tuple() if isinstance(part, Tensor)))
    return out


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are meant (1, 1, blocks), and their columns first (1, 1, blocks, blocks)."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return blocks.sum(-1, dtype=torch.int32)[None, None], columns.contiguous()[None, None]


def _dense(rule: MaskMod, length: int, device: torch.device | str) -> Tensor:
    places = torch.arange(length, device=device)
    zero = places.new_zeros(())
    return rule(zero, zero, places[:, None], places[None])


def _vary(*tensors: Tensor) -> None:
    """Compile for any size at once: of tensors that a mask holds, torch would first take the sizes for fixed."""
    for tensor in tensors:
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
