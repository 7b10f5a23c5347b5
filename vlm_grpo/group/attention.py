"""Attention that knows of groups: a packed row in training, a prompt kept once in generation.

Every implementation of attention that transformers knows gets a twin, registered by transformers' own interface. The
twin does what the original does, except for a packed row (``Packed`` in the place of the mask) and for a cache with a
shared prompt (``SharedLayer``).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import SharedLayer
from .flex import flex_packed_attention, fuses
from .layout import Layout, Packed
from .reasons import Unshareable

_PREFIX = "shared_"
# The row that the next masks are made for. Layers never read it: checkpointing runs them again, outside of it.
_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)
_CACHE: ContextVar[Any] = ContextVar("cache", default=None)
_FUSED: ContextVar[bool] = ContextVar("fused", default=False)


def install(model: Any) -> None:
    """Give the language model of ``model`` the twin of its attention. Without a packed row nothing changes.

    Raises:
        Unshareable: the model computes attention in a way of its own.
    """
    if not len(getattr(model.get_decoder(), "layers", ())):
        raise Unshareable("its language model keeps its layers under a name that is not known")
    for config in _text_configs(model):
        name = config._attn_implementation
        if name.startswith(_PREFIX):
            continue
        if name != "eager" and name not in ALL_ATTENTION_FUNCTIONS:
            raise Unshareable(f"its attention ({name}) is not one of transformers' own")
        _register(name)
        config._attn_implementation = {"": _PREFIX + name}  # not that of the towers of media below it


def is_installed(model: Any) -> bool:
    """Whether all of the language model still has the twin: users may set another implementation at any time."""
    return all(config._attn_implementation.startswith(_PREFIX) for config in _text_configs(model))


def uninstall(model: Any) -> None:
    """Give the language model of ``model`` back the attention it came with."""
    for config in _text_configs(model):
        if config._attn_implementation.startswith(_PREFIX):
            config._attn_implementation = {"": config._attn_implementation.removeprefix(_PREFIX)}


def _text_configs(model: Any) -> list[Any]:
    """The language model's config, and the copies that its modules hold."""
    text = model.config.get_text_config()
    found = {id(text): text}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "model_type", None) == text.model_type:
            found[id(config)] = config
    return list(found.values())


def _register(name: str) -> None:
    twin = _PREFIX + name
    if twin in ALL_ATTENTION_FUNCTIONS:
        return

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(mask, Packed):
            return _packed(module, query, key, value, mask, **kwargs), None
        layer = _shared_layer(module, key)
        if layer is not None and query.shape[2] == 1 and not _unknown(kwargs):
            return layer.attend(query, kwargs.get("scaling")), None
        if layer is not None:
            key, value = layer.expanded()
        return _original(name, module)(module, query, key, value, mask, *args, **kwargs)

    def mask(**kwargs: Any) -> Any:
        layout = _LAYOUT.get()
        if layout is None or kwargs["q_length"] != layout.length:
            return ALL_MASK_ATTENTION_FUNCTIONS[name](**kwargs)
        own = {key: kwargs[key] for key in _KEPT if key in kwargs}
        own["attention_mask"] = padding = _logical(kwargs.get("attention_mask"), layout)

        def mask_of(length: int) -> Tensor | None:
            return sdpa_mask(q_length=length, kv_length=length, **own)

        return Packed.of(layout, mask_of, _FUSED.get(), padding)

    AttentionInterface.register(twin, attention)
    AttentionMaskInterface.register(twin, mask)


# What describes the model's own mask, and not the length of the rows.
_KEPT = ("batch_size", "mask_function", "local_size", "allow_is_causal_skip", "use_vmap", "device")


def _logical(mask: Tensor | None, layout: Layout) -> Tensor | None:
    """The padding of packed rows (n, length) as that of logical rows: only prompts are padded."""
    if mask is None or bool(mask[:, : layout.prefix].all()):
        return None
    return torch.cat([mask[:, : layout.prefix], mask.new_ones(len(mask), layout.width)], 1)


def _original(name: str, module: Any) -> Any:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward


@contextmanager
def packing(layout: Layout, fused: bool = False) -> Iterator[None]:
    """Within it, a forward over ``layout.length`` tokens is one over a packed row.

    Args:
        layout: the row's sizes.
        fused: compute its attention by FlexAttention.
    """
    token, kernel = _LAYOUT.set(layout), _FUSED.set(fused)
    try:
        yield
    finally:
        _LAYOUT.reset(token)
        _FUSED.reset(kernel)


@contextmanager
def decoding(cache: Any) -> Iterator[None]:
    """Within it, layers of ``cache`` that share their prompt are attended to as such."""
    token = _CACHE.set(cache)
    try:
        yield
    finally:
        _CACHE.reset(token)


def _shared_layer(module: Any, key: Tensor) -> SharedLayer | None:
    cache = _CACHE.get()
    if cache is None:
        return None
    number = getattr(module, "kv_shared_layer_index", None)  # reads another layer's keys
    number = module.layer_idx if number is None else number
    layer = cache.layers[number] if number < len(cache.layers) else None
    return layer if isinstance(layer, SharedLayer) and key.shape[2] == layer.decoded else None


def _packed(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Packed,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> Tensor:
    for name in _unknown(kwargs):
        raise Unshareable(f"its attention takes {name}, which the packed row does not know")
    if packed.fused and fuses(query, value, packed, dropout):
        out = flex_packed_attention(query, key, value, packed, scaling)
    else:
        out = packed_attention(query, key, value, packed, scaling, dropout)
    return out.transpose(1, 2).contiguous()


def _unknown(kwargs: dict[str, Any]) -> list[str]:
    """What an attention is given that changes its scores, and that only the original computes."""
    return [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention over packed rows: the prompt to itself, each completion to the prompt and to itself.

    Args:
        query: (n, H, length, D); ``key``, ``value``: (n, K, length, D) with H a multiple of K, never expanded to H.
        packed: the row's layout and masks.
        scaling: of the scores; 1 / sqrt(D) by default.
        dropout: on the weights.

    Returns:
        (n, H, length, D).
    """
    layout = packed.layout
    prefix, groups, width = layout.prefix, layout.suffixes, layout.width
    options = {"scale": scaling, "dropout_p": dropout}

    def completions(x: Tensor) -> Tensor:  # (n, h, G * C, D) to (n * G, h, C, D)
        return x[:, :, prefix:].unflatten(2, (groups, width)).transpose(1, 2).flatten(0, 1)

    def with_prefix(x: Tensor) -> Tensor:  # (n * G, K, prefix + C, D)
        repeated = x[:, None, :, :prefix].expand(-1, groups, -1, -1, -1).flatten(0, 1)
        return torch.cat([repeated, completions(x)], 2)

    parts = []
    if prefix:
        q, k, v = query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix]
        parts.append(_attend(q, k, v, packed.prompt, is_causal=packed.prompt is None, **options))
    mask = packed.suffix
    if mask is None:
        mask = torch.ones(width, prefix + width, dtype=torch.bool, device=query.device).tril(prefix)
    elif len(mask) > 1:
        mask = mask.repeat_interleave(groups, 0)
    suffix = _attend(completions(query), with_prefix(key), with_prefix(value), mask, **options)
    parts.append(suffix.unflatten(0, (-1, groups)).transpose(1, 2).flatten(2, 3))
    return torch.cat(parts, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """torch's attention for grouped queries, in the form that has a fast kernel on this device."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and query.is_cuda and mask is not None:  # masks and grouped queries together have none there
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        repeats = 1
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=repeats > 1, **options)
