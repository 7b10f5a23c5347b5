"""What differs from one model family to the next, in one table. No other module names a family.

A model has three towers: ``vision`` encodes the media, ``projector`` maps features into the language model's width,
``language`` writes the answer. Every fact is keyed by ``config.model_type``; names are parts of module paths, so they
hold for the plain model, under PEFT's ``base_model.model.`` and for the layouts of older checkpoints.
"""

import logging
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config import LoraOptions

_LOG = logging.getLogger("vlm_grpo")

# The decoder of every family below; a vision tower of the CLIP kind.
_DECODER_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_DECODER_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_CLIP_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_CLIP_MLP = ("mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class Family:
    """The facts of one model family.

    Attributes:
        model_type: ``config.model_type`` of the whole model.
        vision, projector, language: module paths of the three towers, without leading ``model.``; a projector inside
            the vision tower counts as projector.
        vision_attention, vision_mlp, language_attention, language_mlp: linear layers of one block, as path endings.
        tested: whether the row below was checked against the family's published shape.
    """

    model_type: str
    vision: tuple[str, ...]
    projector: tuple[str, ...]
    language: tuple[str, ...]
    vision_attention: tuple[str, ...] = _CLIP_ATTENTION
    vision_mlp: tuple[str, ...] = _CLIP_MLP
    language_attention: tuple[str, ...] = _DECODER_ATTENTION
    language_mlp: tuple[str, ...] = _DECODER_MLP
    tested: bool = True


_FAMILIES = (
    Family(
        "qwen2_vl",
        vision=("visual",),
        projector=("visual.merger",),
        language=("language_model",),
        vision_attention=("attn.qkv", "attn.proj"),
    ),
    Family(
        "qwen2_5_vl",
        vision=("visual",),
        projector=("visual.merger",),
        language=("language_model",),
        vision_attention=("attn.qkv", "attn.proj"),
        vision_mlp=_DECODER_MLP,
    ),
    Family("smolvlm", vision=("vision_model",), projector=("connector",), language=("text_model",)),
    # The first SmolVLM checkpoints say so.
    Family("idefics3", vision=("vision_model",), projector=("connector",), language=("text_model",)),
    Family("llava", vision=("vision_tower",), projector=("multi_modal_projector",), language=("language_model",)),
    Family("gemma3", vision=("vision_tower",), projector=("multi_modal_projector",), language=("language_model",)),
)
FAMILIES = {family.model_type: family for family in _FAMILIES}

# Config and processor attributes that name a token the model replaces by features, or the processor expands into such.
_PLACEHOLDERS = tuple(f"{medium}_token{end}" for medium in ("image", "video", "audio") for end in ("_id", "_index", ""))


def family_of(config: Any) -> Family:
    """The row of the table for a model's config.

    A model type that is not in the table works too: its towers and linear layers are then recognised by the names that
    transformers' models commonly use, which is said once in a warning.
    """
    model_type = str(getattr(config, "model_type", ""))
    return FAMILIES.get(model_type) or _guess(model_type)


@cache
def _guess(model_type: str) -> Family:
    _LOG.warning(
        'Model type "%s" has no row in the table of tested families: its towers and LoRA layers are found by name.',
        model_type,
    )
    return Family(
        model_type,
        vision=("visual", "vision_tower", "vision_model", "vision_encoder", "vision", "image_encoder", "audio_tower"),
        projector=("visual.merger", "merger", "multi_modal_projector", "connector", "mm_projector", "aligner"),
        language=("language_model", "text_model", "layers", "embed_tokens", "norm"),
        vision_attention=(*_CLIP_ATTENTION, "self_attn.o_proj", "attn.qkv", "attn.proj", "attention.o_proj"),
        vision_mlp=(*_CLIP_MLP, *_DECODER_MLP, "mlp.linear_fc1", "mlp.linear_fc2"),
        tested=False,
    )


def tower_of(family: Family, name: str) -> str:
    """``"vision"``, ``"projector"``, ``"language"`` or ``"other"``: the tower of a parameter or module name."""
    path = f".{name}."
    for tower in ("projector", "vision", "language"):  # a projector may sit inside the vision tower
        if any(f".{prefix}." in path for prefix in getattr(family, tower)):
            return tower
    return "language" if ".lm_head." in path else "other"


def lora_targets(family: Family, model: Any, lora: "LoraOptions") -> str | list[str]:
    """What PEFT's ``target_modules`` should be: ``lora.targets`` if given, else one regular expression.

    The four switches choose towers (vision, language) times kinds of linear layer (attention, MLP). Projector and
    output head are never chosen; name them in ``targets`` to train them.

    Args:
        family: the model's row of the table.
        model: the model, plain; its module names decide.
        lora: the options; any object with the attributes of ``LoraOptions``.

    Returns:
        a regular expression over full module names, or ``lora.targets`` as it is.

    Raises:
        ConfigError: a switch or an entry of ``targets`` matches no module, or nothing is switched on.
    """
    names = [name for name, _ in model.named_modules()]
    if lora.targets:
        _check_targets(lora.targets, names)
        return lora.targets
    parts = []
    for tower in ("vision", "language"):
        for kind in ("attention", "mlp"):
            if not (getattr(lora, tower) and getattr(lora, kind)):
                continue
            part = _block_layers(family, tower, getattr(family, f"{tower}_{kind}"))
            if not any(re.fullmatch(part, name) for name in names):
                raise ConfigError(
                    f"LoRA: model type {family.model_type!r} has no {kind} layer of a known name in its {tower} tower. "
                    f"Switch lora.{tower} or lora.{kind} off, or name the layers in lora.targets."
                )
            parts.append(part)
    if not parts:
        raise ConfigError(
            f"LoRA: nothing would be trained with vision={lora.vision}, language={lora.language}, "
            f"attention={lora.attention}, mlp={lora.mlp}. Switch on a tower and a kind of layer, or give lora.targets."
        )
    return "|".join(parts)


def _block_layers(family: Family, tower: str, endings: tuple[str, ...]) -> str:
    """Layers of a tower's numbered blocks: the number keeps single layers (projectors, heads) out."""

    def either(names: tuple[str, ...]) -> str:
        return "(?:" + "|".join(re.escape(name) for name in names) + ")"

    # A guessed tower may be as short as "layers", which a vision tower has as well.
    elsewhere = rf"(?!(?:.*\.)?{either(family.vision)}\.)" if tower == "language" else ""
    return rf"{elsewhere}(?:.*\.)?{either(getattr(family, tower))}\.(?:.*\.)?\d+\.{either(endings)}"


def _check_targets(targets: str | list[str], names: list[str]) -> None:
    if targets == "all-linear":
        return
    for target in [targets] if isinstance(targets, str) else [[entry] for entry in targets]:
        if not any(is_target(name, target) for name in names):
            rule = "a regular expression over whole module names" if isinstance(target, str) else "a module name"
            raise ConfigError(
                f"LoRA: lora.targets: {targets if isinstance(target, str) else target[0]!r} matches no module of the "
                f"model as {rule}. Give a list of names, such as [q_proj, v_proj], or a matching expression."
            )


def is_target(name: str, targets: str | list[str]) -> bool:
    """PEFT's rule: a string is a regular expression over the whole name, a list holds names or their endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def placeholder_ids(config: Any, processor: Any = None) -> tuple[int, ...]:
    """Token ids that stand for media, sorted: a sampled one would crash the next forward, or steal a feature.

    These are the ids the model replaces by features (from its config) and the ones the processor expands into those
    (from the processor). Start and end markers around them are ordinary tokens and stay free to be sampled: every
    suppressed token is one the log-probabilities still count.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    found: set[int] = set()
    for source in (config, processor):
        for attribute in _PLACEHOLDERS:
            value = getattr(source, attribute, None)
            if isinstance(value, str) and tokenizer is not None:
                value = tokenizer.get_vocab().get(value)
            if isinstance(value, int):
                found.add(value)
    return tuple(sorted(found))
