"""Generation with one prefill per unique prompt."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..collate import collate
from ..encode import EncodedPrompt
from .attention import decoding
from .cache import SharedLayer, share
from .features import Features
from .reasons import Unshareable


@dataclass(frozen=True)
class Prompts:
    """Unique prompts.

    Attributes:
        ids: their tokens; behind those of the encoding may stand turns with tools.
        encodings: one each.
    """

    ids: list[list[int]]
    encodings: list[EncodedPrompt]

    def inputs(self, pad_token_id: int, device: Any, rows: list[int] | None = None) -> dict[str, Any]:
        """Arguments of ``generate``, left-padded to (P, L), for all prompts or for ``rows`` of them."""
        rows = list(range(len(self.ids))) if rows is None else rows
        ids, encodings = [self.ids[row] for row in rows], [self.encodings[row] for row in rows]
        width = max(map(len, ids))
        padded = [[pad_token_id] * (width - len(row)) + row for row in ids]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
        extra = [len(row) - len(encoded.input_ids) for row, encoded in zip(ids, encodings, strict=True)]
        return {
            "input_ids": torch.tensor(padded, device=device),
            "attention_mask": torch.tensor(mask, device=device),
            **collate(encodings, extra=extra, device=device),
        }

    @property
    def tokens(self) -> tuple[str, ...]:
        """Names of the arguments with one value a token."""
        return tuple(dict.fromkeys(name for encoded in self.encodings for name in encoded.tokens))


def unique(ids: list[list[int]], encodings: list[EncodedPrompt]) -> tuple[Prompts, list[int]]:
    """The unique prompts of rows, and the prompt of each row."""
    found: dict[tuple, int] = {}
    index = [found.setdefault((id(e), tuple(row)), len(found)) for row, e in zip(ids, encodings, strict=True)]
    first = [index.index(number) for number in range(len(found))]
    return Prompts([ids[row] for row in first], [encodings[row] for row in first]), index


def up_to_end(completions: Tensor, eos_token_ids: list[int]) -> list[list[int]]:
    """Each row of (B, T) up to and with its first end token."""
    ends = set(eos_token_ids)
    rows = []
    for row in completions.tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
        rows.append(row[: end + 1])
    return rows


def generation_reason(config: GenerationConfig) -> str | None:
    """What about the way of generating needs a cache of its own, or None."""
    if config.cache_implementation is not None:
        return f"cache_implementation={config.cache_implementation!r} asks for a cache of another kind"
    if config.use_cache is False:
        return "use_cache=False"
    if config.prefill_chunk_size is not None:
        return "prefill_chunk_size splits the prefill"
    if (config.num_beams or 1) > 1:
        return f"num_beams={config.num_beams} moves the caches of the rows"
    return None


def generate(
    model: Any,
    features: Features,
    inputs: dict[str, Any],
    tokens: tuple[str, ...],
    index: Tensor,
    config: GenerationConfig,
    generate_with: Callable[..., Any] | None = None,
) -> Any:
    """Completions of prompts, each prompt processed once: as ``model.generate`` on the repeated prompts.

    Args:
        model: the plain model, adapters included.
        features: of the model, with the prompts' media in it.
        inputs: the prompts' arguments of ``generate``, left-padded; ``input_ids`` and ``attention_mask`` are (P, L).
        tokens: names of ``inputs`` with one value a token.
        index: (B,) the prompt of each row to generate.
        config: how to generate.
        generate_with: the method to generate with, where a wrapper has one of its own.

    Returns:
        (B, L + new tokens): prompts and completions, as ``generate`` returns them.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    prefix = ids.shape[1] - 1
    by_token = {name: inputs[name] for name in tokens if name in inputs}
    media = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", *by_token)}
    places = positions(model, ids, mask, {**by_token, **media})
    placed = {} if places is None else {"position_ids": places[..., :-1]}
    cache = model(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        **placed,
        **{name: value[:, :-1] for name, value in by_token.items()},
        **media,
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    if cache is None:
        raise Unshareable("its forward returns no cache")
    whole = tuple(getattr(model.config.get_text_config(), "cross_attention_layers", None) or ())
    cache = share(cache, index, _group_size(index), _room(config, prefix), mask[:, :-1].bool(), whole)
    shared = any(isinstance(layer, SharedLayer) for layer in cache.layers)
    rows = {name: value[index] for name, value in by_token.items()}
    if places is not None:
        rows["position_ids"] = places.index_select(-2, index)
    options = {k: v for k, v in media.items() if not isinstance(v, Tensor)}
    with decoding(cache if shared else None):
        return (generate_with or model.generate)(
            input_ids=ids[index],
            attention_mask=mask[index],
            **rows,
            **options,
            past_key_values=cache,
            generation_config=config,
        )


def positions(model: Any, ids: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor | None:
    """The places (axes?, B, L) that the model's own generation gives to tokens; None where it takes none.

    Families with rotary axes for height, width and time compute them here from the media.
    """
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return None
    kwargs = {"attention_mask": mask, **inputs}
    places = model._prepare_position_ids_for_generation(ids, kwargs)
    return places.expand(*places.shape[:-2], *ids.shape)


def _group_size(index: Tensor) -> int | None:
    """G where every prompt has G adjacent rows, in order."""
    prompts, counts = torch.unique_consecutive(index, return_counts=True)
    same = bool((counts == counts[0]).all()) and torch.equal(prompts, torch.arange(len(prompts), device=index.device))
    return int(counts[0]) if same else None


def _room(config: GenerationConfig, prefix: int) -> int:
    """The tokens that may come behind the prefix: the last of the prompt, and what is generated."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens + 1
    return max(1, (config.max_length or 0) - prefix)
