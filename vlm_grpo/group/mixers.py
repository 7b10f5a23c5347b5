"""Layers with a state in the place of attention: the state after the prompt is what all completions start from.

Linear attention and short convolutions read tokens one behind the other, so a packed row is no row to them. They run
twice, by the path that generation takes: over the prompt, with an empty state, and over the completions as rows of
their own, each with the prompt's state. Both runs happen within the layer: checkpointing may repeat it.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_masks_for_generate

from ..patches.transformers import wrap_method
from .attention import packing
from .layout import Layout, Packed, at_completions
from .reasons import Unshareable

_CACHE_NAMES = ("cache_params", "past_key_values")


def prepared_masks(model: Any, layout: Layout, fused: bool = False) -> dict[str, Any] | None:
    """What a model with such layers takes in the place of an attention mask: the packed row, by type of layer.

    Transformers drops a mask that hides nothing before it reaches them. None for models without such layers, to which
    the row comes by their own masks.

    Args:
        model: the plain model, installed.
        layout: the row's sizes.
        fused: compute its attention by FlexAttention.

    Raises:
        Unshareable: the model has layers whose mask is not known.
    """
    text = model.config.get_text_config()
    kinds = _kinds_with_state(text)
    if not kinds:
        return None
    own = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    row = torch.ones(1, layout.length, dtype=torch.long, device=model.device)
    embedded = torch.empty(1, layout.length, 0, dtype=model.dtype, device=model.device)
    with packing(layout, fused):
        masks = own(config=text, inputs_embeds=embedded, attention_mask=row, past_key_values=None, position_ids=None)
    if not isinstance(masks, dict):
        raise Unshareable("the masks of its layers are not known to transformers")
    return {**masks, **{kind: Packed(layout) for kind in kinds}}


def install_mixers(model: Any) -> None:
    """Make the layers of ``model`` that have a state know packed rows. Without one nothing changes; once is enough.

    Args:
        model: the plain model, adapters included.

    Raises:
        Unshareable: such a layer keeps its state in a way of its own.
    """
    text = model.config.get_text_config()
    kinds = _kinds_with_state(text)
    if not kinds:
        return
    decoder = model.get_decoder()
    for kind in sorted(kinds):
        if issubclass(DYNAMIC_LAYER_TYPE_MAPPING[kind], CacheLayerMixin):
            raise Unshareable(f"its layers of type {kind} have attention and a state side by side")
    # The convention of transformers' models for masks that are prepared outside of them.
    if "dict" not in inspect.unwrap(type(decoder).forward).__code__.co_names:
        raise Unshareable("its language model takes no masks by type of layer")
    mixers = {module.layer_idx: module for module in _with_cache(decoder)}
    for number, kind in enumerate(text.layer_types):
        if kind not in kinds:
            continue
        if number not in mixers:
            raise Unshareable(f"its layer {number} ({kind}) keeps a state in a way of its own")
        wrap_method(mixers[number], "forward", _forward)


def has_mixers(model: Any) -> bool:
    """Whether a model has such layers."""
    return bool(_kinds_with_state(model.config.get_text_config()))


def _kinds_with_state(text: Any) -> set[str]:
    """The types of layers that transformers keeps a state for, and makes a mask for."""
    kinds = set(getattr(text, "layer_types", None) or ()) & set(LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING)
    return {k for k in kinds if issubclass(DYNAMIC_LAYER_TYPE_MAPPING.get(k, object), LinearAttentionCacheLayerMixin)}


def _with_cache(decoder: nn.Module) -> list[Any]:
    """The innermost modules that take a cache and a mask, and know their place in the cache."""

    def takes_both(module: nn.Module) -> bool:
        names = _parameters(type(module))
        return "attention_mask" in names and any(n in names for n in _CACHE_NAMES) and hasattr(module, "layer_idx")

    found = [module for module in decoder.modules() if takes_both(module)]
    return [m for m in found if not any(inner is not m and takes_both(inner) for inner in m.modules())]


@cache
def _parameters(module_class: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(module_class.forward).parameters)[1:]


def _forward(forward: Callable[..., Any], mixer: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of ``mixer.forward``, which is ``forward``."""
    names = _parameters(type(mixer))
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    packed = given.pop("attention_mask", None)
    if not isinstance(packed, Packed):
        return forward(*args, **kwargs)
    layout, state = packed.layout, _State()
    cache_name = next(name for name in _CACHE_NAMES if name in names)
    given.pop(cache_name, None)
    own = {cache_name: Cache(layers=[state] * (mixer.layer_idx + 1))}
    prompt = None
    if layout.prefix:
        prompt = forward(**{name: _at_prompt(value, layout) for name, value in given.items()}, **own)
        state.repeat(layout.suffixes)
    return _joined(prompt, forward(**{n: _at_completions(value, layout) for n, value in given.items()}, **own), layout)


def _at_prompt(value: Any, layout: Layout) -> Any:
    return _of_tokens(value, layout, lambda row: row[:, : layout.prefix])


def _at_completions(value: Any, layout: Layout) -> Any:
    def part(row: Tensor) -> Tensor:
        rows = at_completions(layout, row)
        # One token and a state are a step of generation to a layer: written into the state, and without a gradient
        # where kernels do it. Behind it nothing is read from a second.
        return torch.cat([rows, rows], 1) if layout.width == 1 else rows

    return _of_tokens(value, layout, part)


def _of_tokens(value: Any, layout: Layout, part: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_of_tokens(item, layout, part) for item in value)
    if not isinstance(value, Tensor):
        return value
    if value.shape[:2] != (1, layout.length):
        raise Unshareable(
            f"a layer with a state is given a tensor of shape {tuple(value.shape)}, not one row of tokens"
        )
    return part(value)


def _joined(prompt: Any, completions: Any, layout: Layout) -> Any:
    """One row of what a layer returned for the prompt (None where there is none) and for the completions."""
    if isinstance(completions, tuple):  # the layer's output, and what nobody reads in training
        return (_joined(prompt[0] if prompt else None, completions[0], layout), *completions[1:])
    row = completions[:, : layout.width].flatten(0, 1)[None]
    return row if prompt is None else torch.cat([prompt, row], 1)


class _State(LinearAttentionLayer):
    """A state that is replaced, never written into: gradients flow through it from the completions to the prompt."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Adds (B, D, n) to the last tokens and returns both."""
        before = self.conv_states[state_idx]
        if before is None:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            row = pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
            self.is_conv_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
        else:
            size = before.shape[-1]
            row = torch.cat([before, conv_states], -1)
        self.conv_states[state_idx] = row[..., row.shape[-1] - size :]
        return row

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    def repeat(self, count: int) -> None:
        """One row becomes ``count`` rows."""
        for states in (self.conv_states, self.recurrent_states):
            rows = {i: state.expand(count, *state.shape[1:]) for i, state in states.items() if state is not None}
            states.update({i: state.contiguous() for i, state in rows.items()})
