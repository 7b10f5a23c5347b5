"""What differs from one model family to the next, in one table. No other module names a family.

A model has towers: ``vision`` encodes images and videos, ``audio`` encodes sounds, ``projector`` maps features into the
language model's width, ``language`` writes the answer. Every fact is keyed by ``config.model_type``; names are parts of
module paths, so they hold for the plain model, under PEFT's ``base_model.model.`` and for the layouts of older
checkpoints.
"""

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..media import KINDS, Kind

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import LoraOptions
    from ..encode import EncodedPrompt

_LOG = logging.getLogger("vlm_grpo")

# The decoder of most families below; a vision tower of the CLIP kind; one of the Qwen kind.
_DECODER_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_DECODER_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_CLIP_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_CLIP_MLP = ("mlp.fc1", "mlp.fc2")
_QWEN_ATTENTION = ("attn.qkv", "attn.proj")
# The encoder of sounds of most families.
_WHISPER_MLP = ("fc1", "fc2")
# A decoder that is not a module of its own; towers within the same module are told from it by their own names.
_BARE_DECODER = ("layers", "embed_tokens", "norm")


@dataclass(frozen=True)
class Family:
    """The facts of one model family.

    Attributes:
        model_type: ``config.model_type`` of the whole model.
        vision, audio, projector, language: module paths of the towers, without leading ``model.``; a projector inside
            a tower of media counts as projector.
        vision_attention, vision_mlp, audio_attention, audio_mlp, language_attention, language_mlp: linear layers of one
            block, as path endings. A tower without any is adapted by ``lora.targets`` only.
        apart: media tensors that a row may share a forward over only with rows whose own have the same shape, because
            the model cannot pad them or lets the padding through into other rows' results.
        counted: config attributes of further tokens by which the model counts media: a sampled one would crash it.
        encoders: methods of the model, or of modules in it, that turn media into features for the language model; those
            that a model does not have are skipped. ``audio`` is in the name of those that encode sounds.
        float16_overflows: whether its activations or gradients exceed what float16 holds (65504), as Unsloth found.
        tested: whether the row below was checked against the family's published shape.
    """

    model_type: str
    vision: tuple[str, ...] = ()
    projector: tuple[str, ...] = ()
    language: tuple[str, ...] = ("language_model",)
    audio: tuple[str, ...] = ()
    vision_attention: tuple[str, ...] = _CLIP_ATTENTION
    vision_mlp: tuple[str, ...] = _CLIP_MLP
    audio_attention: tuple[str, ...] = _CLIP_ATTENTION
    audio_mlp: tuple[str, ...] = _WHISPER_MLP
    language_attention: tuple[str, ...] = _DECODER_ATTENTION
    language_mlp: tuple[str, ...] = _DECODER_MLP
    apart: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ("get_image_features", "get_video_features", "get_audio_features")
    float16_overflows: bool = False
    tested: bool = True


_FAMILIES = (
    Family("qwen2_vl", vision=("visual",), projector=("visual.merger",), vision_attention=_QWEN_ATTENTION),
    Family(
        "qwen2_5_vl",
        vision=("visual",),
        projector=("visual.merger",),
        vision_attention=_QWEN_ATTENTION,
        vision_mlp=_DECODER_MLP,
    ),
    Family(
        "qwen3_vl",
        vision=("visual",),
        projector=("visual.merger", "visual.deepstack_merger_list"),
        vision_attention=_QWEN_ATTENTION,
        vision_mlp=("mlp.linear_fc1", "mlp.linear_fc2"),
    ),
    Family(
        "qwen3_5",
        vision=("visual",),
        projector=("visual.merger",),
        vision_attention=_QWEN_ATTENTION,
        vision_mlp=("mlp.linear_fc1", "mlp.linear_fc2"),
        language_attention=(
            *_DECODER_ATTENTION,
            *(f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")),
        ),
        float16_overflows=True,
    ),
    Family(
        "qwen2_5_omni_thinker",
        vision=("visual",),
        audio=("audio_tower",),
        projector=("visual.merger", "audio_tower.proj"),
        language=_BARE_DECODER,
        counted=("audio_start_token_id", "vision_start_token_id"),
        vision_attention=("attn.q", "attn.k", "attn.v", "attn.proj"),
        vision_mlp=_DECODER_MLP,
    ),
    Family("smolvlm", vision=("vision_model",), projector=("connector",), language=("text_model",)),
    # The first SmolVLM checkpoints say so too.
    Family("idefics3", vision=("vision_model",), projector=("connector",), language=("text_model",)),
    Family("llava", vision=("vision_tower",), projector=("multi_modal_projector",)),
    Family("llava_next", vision=("vision_tower",), projector=("multi_modal_projector", "image_newline")),
    Family(
        "llava_onevision",
        vision=("vision_tower",),
        projector=("multi_modal_projector", "image_newline"),
        apart=("pixel_values_videos",),  # every frame given becomes tokens, also one of zeros
    ),
    Family(
        "internvl",
        vision=("vision_tower",),
        projector=("multi_modal_projector",),
        vision_attention=("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.projection_layer"),
    ),
    Family(
        "lfm2_vl",
        vision=("vision_tower",),
        projector=("multi_modal_projector",),
        language_attention=(*_CLIP_ATTENTION, "conv.in_proj", "conv.out_proj"),  # most layers mix by a convolution
        language_mlp=("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    ),
    Family("paligemma", vision=("vision_tower",), projector=("multi_modal_projector",)),
    Family("gemma3", vision=("vision_tower",), projector=("multi_modal_projector",), float16_overflows=True),
    Family(
        "aria",
        vision=("vision_tower",),
        projector=("multi_modal_projector",),
        language_mlp=tuple(f"mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    ),
    Family(
        "mllama",
        vision=("vision_model",),
        projector=("multi_modal_projector",),
        vision_attention=_DECODER_ATTENTION,
        language_attention=(*_DECODER_ATTENTION, *(f"cross_attn.{name[0]}_proj" for name in "qkvo")),
        # Tokens in front of a row's first picture read all of the row's pictures, padding included.
        apart=("pixel_values",),
        encoders=("vision_model.forward",),
    ),
    Family(
        "qwen2_audio",
        audio=("audio_tower",),
        projector=("multi_modal_projector",),
        encoders=("audio_tower.forward",),
    ),
    Family("voxtral", audio=("audio_tower",), projector=("multi_modal_projector",)),
    Family(
        "gemma3n",
        vision=("vision_tower",),
        audio=("audio_tower",),
        projector=("embed_vision", "embed_audio"),
        vision_attention=(),  # convolutions all through
        vision_mlp=(),
        audio_attention=("attention.attn.q_proj", "attention.attn.k_proj", "attention.attn.v_proj", "attention.post"),
        audio_mlp=tuple(f"ffw_layer_{end}.ffw_layer_{number}" for end in ("start", "end") for number in (1, 2)),
        float16_overflows=True,
        apart=("input_features",),  # its first layers blend the frames behind a clip's end into its last token
    ),
    Family(
        "phi4_multimodal",
        vision=("image_embed.img_processor",),
        audio=("audio_embed.encoder",),
        projector=("embed_tokens_extend",),
        language=_BARE_DECODER,
        audio_attention=_DECODER_ATTENTION,
        audio_mlp=tuple(f"feed_forward_{end}.{name}_proj" for end in ("in", "out") for name in ("gate_up", "down")),
        language_attention=("self_attn.qkv_proj", "self_attn.o_proj"),
        language_mlp=("mlp.gate_up_proj", "mlp.down_proj"),
        # Padded frames are attended to; sounds take another projector beside pictures; and a mask that hides nothing is
        # dropped, which makes the vision tower causal.
        apart=("image_pixel_values", "image_attention_mask", "audio_input_features", "audio_attention_mask"),
        encoders=(
            "embed_tokens_extend.image_embed.get_img_features",
            "embed_tokens_extend.audio_embed.encoder.forward",
        ),
    ),
)
FAMILIES = {family.model_type: family for family in _FAMILIES}
# Further model types that overflow in float16; what they begin with.
_OVERFLOWING = ("embedding_gemma2", "gemma3", "gemma4", "glm4_moe", "gpt_oss", "qwen3_5", "qwen3_moe")


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
        vision=("visual", "vision_tower", "vision_model", "vision_encoder", "vision", "image_encoder"),
        audio=("audio_tower", "audio_encoder", "audio_model"),
        projector=("visual.merger", "merger", "multi_modal_projector", "connector", "mm_projector", "aligner"),
        language=("language_model", "text_model", "layers", "embed_tokens", "norm"),
        vision_attention=(*_CLIP_ATTENTION, "self_attn.o_proj", "attn.qkv", "attn.proj", "attention.o_proj"),
        vision_mlp=(*_CLIP_MLP, *_DECODER_MLP, "mlp.linear_fc1", "mlp.linear_fc2"),
        float16_overflows=model_type.startswith(_OVERFLOWING),
        tested=False,
    )


def tower_of(family: Family, name: str) -> str:
    """The tower of a parameter or module name: ``vision``, ``audio``, ``projector``, ``language`` or ``other``."""
    path = f".{name}."
    # A projector may sit inside a tower of media, and such a tower inside the projector: the innermost it is.
    found = [
        (path.rindex(f".{prefix}.") + len(prefix), tower)
        for tower in ("vision", "audio", "projector")
        for prefix in getattr(family, tower)
        if f".{prefix}." in path
    ]
    if found:
        return max(found)[1]
    if any(f".{prefix}." in path for prefix in (*family.language, "lm_head")):
        return "language"
    return "other"


def lora_targets(
    family: Family, model: Any, lora: "LoraOptions", parts: Collection[str] | None = None
) -> str | list[str]:
    """What PEFT's ``target_modules`` should be: ``lora.targets`` if given, else one regular expression.

    Chosen are towers (vision, audio, language) times kinds of linear layer (attention, MLP). Projector and output head
    are never chosen; name them in ``targets`` to train them.

    Args:
        family: the model's row of the table.
        model: the model, plain or with adapters; its module names decide.
        lora: the options; any object with the attributes of ``LoraOptions``.
        parts: the towers that get adapters; by default those that ``lora`` switches on.

    Returns:
        a regular expression over full module names, or ``lora.targets`` as it is.

    Raises:
        ConfigError: a switch or an entry of ``targets`` matches no module, or nothing is switched on.
    """
    names = [name for name, _ in model.named_modules()]
    if lora.targets:
        _check_targets(lora.targets, names)
        return lora.targets
    if parts is None:
        parts = [tower for tower in ("vision", "language") if getattr(lora, tower)]
    chosen = [
        _kind_of_layer(family, tower, kind, names)
        for tower in ("vision", "audio", "language")
        for kind in ("attention", "mlp")
        if tower in parts and getattr(lora, kind)
    ]
    if not chosen:
        raise ConfigError(
            f"LoRA: nothing would be trained with vision={lora.vision}, language={lora.language}, "
            f"attention={lora.attention}, mlp={lora.mlp}. Switch on a tower and a kind of layer, or give lora.targets."
        )
    return "|".join(chosen)


def _kind_of_layer(family: Family, tower: str, kind: str, names: list[str]) -> str:
    layers = getattr(family, f"{tower}_{kind}") if getattr(family, tower) else ()
    expression = _block_layers(family, tower, layers)
    if not layers or not any(re.fullmatch(expression, name) for name in names):
        raise ConfigError(
            f"LoRA: model type {family.model_type!r} has no {kind} layer of a known name in its {tower} tower. "
            f"Switch {'' if tower == 'audio' else 'lora.'}{tower} or lora.{kind} off, or name the layers in "
            "lora.targets."
        )
    return expression


def _block_layers(family: Family, tower: str, endings: tuple[str, ...]) -> str:
    """Layers of a tower's numbered blocks: the number keeps single layers (projectors, heads) out."""

    def either(names: Collection[str]) -> str:
        return "(?:" + "|".join(re.escape(name) for name in names) + ")"

    # A tower may be as short as "layers", which those of media have as well.
    media = {"vision": family.vision, "audio": family.audio}
    others = [name for other, prefixes in media.items() if other != tower for name in prefixes]
    elsewhere = rf"(?!(?:.*\.)?{either(others)}\.)" if others else ""
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
    (from the processor). Start and end markers around them are ordinary tokens and stay free to be sampled, except
    where the model counts media by them: every suppressed token is one the log-probabilities still count.
    """
    found = {i for ids in placeholder_ids_by_kind(config, processor).values() for i in ids}
    counted = {getattr(config, name, None) for name in family_of(config).counted}
    return tuple(sorted(found | {i for i in counted if isinstance(i, int)}))


def placeholder_ids_by_kind(config: Any, processor: Any = None) -> dict[Kind, tuple[int, ...]]:
    """``placeholder_ids`` by the kind of medium that leaves them in a prompt, sorted; kinds without any are not in it.

    Where the model has no token for a video of its own, the frames of a video stand as images: their ids are a video's.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    replaced = {kind: _ids_of(_with_parts(config), kind, tokenizer) for kind in KINDS}
    expanded = {kind: _ids_of([processor], kind, tokenizer) for kind in KINDS}
    found = {kind: replaced[kind] | expanded[kind] for kind in KINDS}
    if found["video"] and not replaced["video"]:
        found["video"] |= replaced["image"]
    return {kind: tuple(sorted(found[kind])) for kind in KINDS if found[kind]}


def _with_parts(config: Any) -> list[Any]:
    """The config, and those of its towers, where some models write the ids."""
    return [config, *(part for kind in ("vision", "audio") if (part := getattr(config, f"{kind}_config", None)))]


def _ids_of(sources: list[Any], kind: Kind, tokenizer: Any) -> set[int]:
    ids = set()
    for source in sources:
        for end in ("_id", "_index", ""):
            value = getattr(source, f"{kind}_token{end}", None)
            if isinstance(value, str) and tokenizer is not None:
                value = tokenizer.get_vocab().get(value)
            if isinstance(value, int):
                ids.add(value)
    return ids


def together(family: Family, encodings: "Sequence[EncodedPrompt]") -> list[list[int]]:
    """The numbers of the rows that may share a forward: one list where the family has no exceptions.

    Args:
        family: the model's row of the table.
        encodings: the rows.
    """
    groups: dict[tuple, list[int]] = {}
    for number, encoded in enumerate(encodings):
        groups.setdefault((*sorted(encoded.options.items()), *_sizes(family, encoded.media)), []).append(number)
    return list(groups.values())


def _sizes(family: Family, media: "dict[str, Tensor]") -> list[Any]:
    """Of each tensor to keep apart: the sizes of one medium and, of a mask, whether it hides anything."""
    return [
        (*media[name].shape[1:], name.endswith("mask") and not bool(media[name].all())) if name in media else None
        for name in family.apart
    ]
