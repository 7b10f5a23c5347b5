"""One sample to one encoded prompt; the processor is called once a prompt."""

import base64
import inspect
import random
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from .config import MediaOptions
from .data import Sample
from .errors import EncodingError, VLMGRPOError
from .media import KINDS, Kind, Medium
from .media.hearing import as_wav, extractor_of, hear

# Never token-level, whatever their shape: a prompt may happen to have as many tokens as a sound has mel frames.
_ABOUT_MEDIA = re.compile(
    r"pixel|input_feature|feature|input_image|input_audio|audio|image_(sizes|grid|attention|embeds)|video|aspect"
    r"|second_per|num_|spatial"
)


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """What the processor made of one prompt.

    Attributes:
        input_ids: the L prompt tokens, media placeholders expanded.
        tokens: token-level extras, each (1, L, ...), such as ``mm_token_type_ids``.
        media: everything else, such as ``pixel_values``; the first dimension counts images, patches, tiles or sounds.
        options: keyword arguments of the model that are no tensors; rows of one batch agree on them.
        senses: which towers the media reach, ``vision`` and ``audio``.
        after: what a token-level extra is for every token that follows the prompt, where that is not 0.
    """

    input_ids: list[int]
    tokens: dict[str, Tensor]
    media: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    senses: tuple[str, ...] = ()
    after: dict[str, int] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> "EncodedPrompt":
        return self  # immutable, and shared by the completions of a group


def encode(
    processor: Any,
    sample: Sample,
    tools: list | None = None,
    media: MediaOptions | None = None,
    draw: random.Random | None = None,
    **template_kwargs: Any,
) -> EncodedPrompt:
    """Encode one prompt with one processor call.

    Args:
        processor: a processor or, for text-only rows, a tokenizer.
        sample: the row. A string prompt is taken as already templated; messages go through the chat template.
        tools: functions offered to the model by the chat template.
        media: how media are opened.
        draw: chooses the frames of videos under ``dynamic_sample``.
        template_kwargs: passed to ``apply_chat_template``, such as ``chat_template``.

    Raises:
        EncodingError: the prompt is empty, its media tokens do not match the row's media, or the processor refuses it.
        MediaError: a medium that cannot be opened.
    """
    media = media or MediaOptions()
    _check_slots(processor, sample)
    try:
        if _takes_files(processor) and (sample.media or not isinstance(sample.prompt, str)):
            encoded = _of_files(processor, sample, tools, media, template_kwargs)
        elif hasattr(processor, "tokenizer"):
            _check_kinds(processor, sample, template_kwargs)
            text = _render(processor, sample.prompt, tools, template_kwargs)
            encoded = _call(processor, text, sample, media, draw)
        elif isinstance(sample.prompt, str):
            encoded = processor(text=[sample.prompt], return_tensors="pt")
        else:
            options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            plain = as_texts(sample.prompt)
            encoded = processor.apply_chat_template(plain, tools=tools or None, **options, **template_kwargs)
    except (ValueError, TypeError, LookupError, RuntimeError, TemplateError) as error:
        if isinstance(error, VLMGRPOError):
            raise
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise EncodingError(
            f"The processor refuses a row ({reason}) — {where_of(sample)}. Change or remove it."
        ) from error
    heard = media.audio_in_video and any(medium.kind == "video" for medium in sample.media)
    senses = ["audio" if medium.kind == "audio" else "vision" for medium in sample.media] + ["audio"] * heard
    options = {"use_audio_in_video": True} if heard else {}
    return EncodedPrompt(**_split(dict(encoded), sample), options=options, senses=tuple(sorted(set(senses))))


def _takes_files(processor: Any) -> bool:
    """Whether the processor hears through its chat template only, which takes files (Mistral's)."""
    call = inspect.signature(type(processor).__call__).parameters
    return extractor_of(processor) is not None and not {"audio", "raw_speech"} & set(call)


def _of_files(
    processor: Any, sample: Sample, tools: list | None, options: MediaOptions, template_kwargs: dict[str, Any]
) -> dict[str, Any]:
    if isinstance(sample.prompt, str):
        raise EncodingError(
            f"{type(processor).__name__} hears messages only, and the prompt is a templated text — {where_of(sample)}. "
            "Give a list of messages."
        )
    rate = extractor_of(processor).sampling_rate
    messages = [{**m, "content": [_as_file(p, processor, options, rate) for p in m["content"]]} for m in sample.prompt]
    arguments = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **template_kwargs}
    return processor.apply_chat_template([messages], **arguments, **({"tools": tools} if tools else {}))


def _as_file(part: dict[str, Any], processor: Any, options: MediaOptions, rate: int) -> dict[str, Any]:
    if part["type"] != "audio":
        return part
    return {"type": "audio", "base64": base64.b64encode(as_wav(hear(part["audio"], processor, options), rate)).decode()}


def where_of(sample: Sample) -> str:
    """How the user finds the row again."""
    if sample.media and not sample.where:
        return sample.media[0].where or sample.media[0].label
    return sample.where or repr(sample.prompt)[:80]


def _render(processor: Any, prompt: Any, tools: list | None, template_kwargs: dict[str, Any]) -> str:
    if isinstance(prompt, str):
        return prompt
    options = {"add_generation_prompt": True, "tokenize": False}
    return processor.apply_chat_template(without_media(prompt), tools=tools or None, **options, **template_kwargs)


def as_texts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as a tokenizer's template takes them: contents are strings."""
    return [{**m, "content": "".join(part.get("text", "") for part in m["content"])} for m in messages]


def without_media(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with bare slots: chat templates look at the type of a part only."""
    return [
        {**message, "content": [{"type": p["type"]} if p["type"] in KINDS else p for p in message["content"]]}
        for message in messages
    ]


def _call(
    processor: Any, text: str, sample: Sample, options: MediaOptions, draw: random.Random | None
) -> dict[str, Any]:
    """The processor's output for one text and its media."""
    media = _opened(processor, sample, options, draw)
    bos = processor.tokenizer.bos_token
    arguments: dict[str, Any] = {"text": [text], "return_tensors": "pt", **media}
    if not isinstance(sample.prompt, str) and bos and text.startswith(bos):
        arguments["add_special_tokens"] = False  # the template has written it
    encoded = dict(processor(**arguments))
    seconds = encoded.get("video_second_per_grid")
    if seconds is not None:  # one rate for all videos of a call, where each has its own
        frames = processor.video_processor.temporal_patch_size
        rates = [metadata.sampled_fps for metadata in media["videos_kwargs"]["video_metadata"][0]]
        if len(set(rates)) > 1 and options.audio_in_video:  # the processor has woven in the sounds at the first's
            raise EncodingError(
                f"{type(processor).__name__} cannot hear videos of different frame rates in one row "
                f"({', '.join(f'{rate:.3g}' for rate in rates)} frames taken a second) — {where_of(sample)}. "
                "Put them into rows of their own, or set the row's fps, min_frames and max_frames alike."
            )
        encoded["video_second_per_grid"] = torch.tensor([frames / rate for rate in rates])
    return encoded


def _opened(processor: Any, sample: Sample, options: MediaOptions, draw: random.Random | None) -> dict[str, Any]:
    """The processor's arguments for the sample's media, each kind in the order of its slots."""
    images, videos, sounds = [], [], []
    own = _own_bounds(processor, sample, options)
    unbounded = options.model_copy(update={"min_pixels": None, "max_pixels": None})
    extractor = extractor_of(processor)
    for medium in sample.media:
        if medium.kind == "image":
            images.append(_unbounded(medium).open(unbounded) if own else medium.open(options))
        elif medium.kind == "video":
            videos.append(medium.open_video(options, draw))
        if medium.kind == "audio" or (medium.kind == "video" and options.audio_in_video):
            if extractor is None:
                raise EncodingError(_cannot(processor, sample, "audio"))
            sounds.append(hear(medium, processor, options))
    arguments: dict[str, Any] = {}
    if images:
        arguments |= {"images": [images]} | ({"images_kwargs": own} if own else {})
    if videos:
        arguments |= {"videos": [[video.frames for video in videos]], "videos_kwargs": _timing(videos)}
        if options.audio_in_video:
            arguments["videos_kwargs"]["use_audio_in_video"] = True
    if sounds:
        arguments |= {"audio": sounds, "audio_kwargs": {"sampling_rate": extractor.sampling_rate}}
    return arguments


def _timing(videos: list[Any]) -> dict[str, Any]:
    """When each frame was taken: without it temporal positions collapse, or 24 frames a second are assumed."""
    from transformers.video_utils import VideoMetadata

    metadata = [
        VideoMetadata(
            total_num_frames=video.total,
            fps=video.fps,
            width=video.frames.shape[2],
            height=video.frames.shape[1],
            duration=video.duration,
            frames_indices=list(video.indices),
        )
        for video in videos
    ]
    return {"do_sample_frames": False, "video_metadata": [metadata], "fps": videos[0].sampled_fps}


def _own_bounds(processor: Any, sample: Sample, run: MediaOptions) -> dict[str, int]:
    """Pixel limits handed to a processor that has such itself, which then rounds to its patches in one resize.

    Empty where the processor has none or the row's images differ in theirs: then each image is resized on its own.
    """
    bounds = {
        (options.min_pixels, options.max_pixels)
        for medium in sample.media
        if medium.kind == "image"
        for options in [medium.options(run)]
    }
    image_processor = getattr(processor, "image_processor", None)
    known = getattr(getattr(image_processor, "valid_kwargs", None), "__annotations__", {})
    if len(bounds) != 1 or bounds == {(None, None)} or not {"min_pixels", "max_pixels"} <= set(known):
        return {}
    ((low, high),) = bounds
    size = getattr(image_processor, "size", None)
    defaults = (getattr(size, "shortest_edge", None), getattr(size, "longest_edge", None))
    least, most = low or defaults[0], high or defaults[1]
    if least is None or most is None:
        return {}
    return {"min_pixels": min(least, most) if low is None else least, "max_pixels": max(least, most)}


def _unbounded(medium: Medium) -> Medium:
    kept = {key: value for key, value in medium.overrides.items() if not key.endswith("_pixels")}
    return Medium(medium.kind, medium.source, medium.where, kept, medium.rate)


def _slots(processor: Any) -> dict[str, Kind]:
    """The tokens that a processor expands into media placeholders, and the placeholders themselves."""
    tokenizer = getattr(processor, "tokenizer", processor)
    out: dict[str, Kind] = {}
    for kind in KINDS:
        token, token_id = (getattr(processor, f"{kind}_token{end}", None) for end in ("", "_id"))
        found = [token, tokenizer.convert_ids_to_tokens(token_id) if isinstance(token_id, int) else None]
        out |= {str(name): kind for name in found if name}
    return out


def _check_slots(processor: Any, sample: Sample) -> None:
    """One token a medium in a templated text, and none in the text parts of messages.

    Processors take the two apart by position: one token too many and a row reads another's picture, or crashes.
    """
    slots = _slots(processor)
    if not isinstance(sample.prompt, str):
        texts = [part["text"] for message in sample.prompt for part in message["content"] if part["type"] == "text"]
        for slot, kind in slots.items():
            if any(slot in text for text in texts):
                raise EncodingError(
                    f"A text of the prompt holds the {kind} token {slot} — {where_of(sample)}. "
                    f"Remove it, or write {_article(kind)} part in its place."
                )
        return
    counts = {kind: sum(sample.prompt.count(slot) for slot, own in slots.items() if own == kind) for kind in KINDS}
    token = {kind: slot for slot, kind in reversed(slots.items())}
    for kind in KINDS:
        media = sum(medium.kind == kind for medium in sample.media)
        if counts[kind] and counts[kind] != media:
            raise EncodingError(
                f"The prompt has {counts[kind]} {kind} token{'s' * (counts[kind] != 1)} ({token[kind]}) but the row "
                f"has {media} {kind}{'s' * (media != 1)} — {where_of(sample)}. Give one {kind} per token."
            )


def _article(kind: str) -> str:
    return f"{'a' if kind == 'video' else 'an'} {kind}"


def _check_kinds(processor: Any, sample: Sample, template_kwargs: dict[str, Any]) -> None:
    """The processor takes every kind of the row, and the template renders it: otherwise it is dropped silently."""
    kinds: list[Kind] = list(dict.fromkeys(medium.kind for medium in sample.media))
    if "image" in kinds and "video" in kinds and _overwrites(processor):
        raise EncodingError(
            f"{type(processor).__name__} cannot take images and a video in one row: it writes both into the same "
            f"tensor — {where_of(sample)}. Put them into rows of their own."
        )
    for kind in kinds:
        if not _takes(processor, kind):
            raise EncodingError(_cannot(processor, sample, kind))
        if isinstance(sample.prompt, str):
            continue
        bare = [
            {**message, "content": [part for part in message["content"] if part["type"] != kind]}
            for message in sample.prompt
        ]
        if _render(processor, bare, None, template_kwargs) == _render(processor, sample.prompt, None, template_kwargs):
            raise EncodingError(
                f"The chat template of {type(processor).__name__} renders nothing for {_article(kind)} part — "
                f"{where_of(sample)}. Use a chat template that does, or remove the {kind} parts."
            )


def _takes(processor: Any, kind: Kind) -> bool:
    if kind == "audio":
        return extractor_of(processor) is not None
    return getattr(processor, f"{kind}_processor", None) is not None


def _overwrites(processor: Any) -> bool:
    """Whether pictures and videos come out under one name, so that one of them is lost."""
    names = [getattr(getattr(processor, f"{kind}_processor", None), "model_input_names", []) for kind in KINDS[:2]]
    return bool(set(names[0]) & set(names[1]))


def _cannot(processor: Any, sample: Sample, kind: str) -> str:
    return (
        f"{type(processor).__name__} cannot take {_article(kind)} part: it has no {kind} processor — "
        f"{where_of(sample)}. Remove the part, or use a model that takes {kind}."
    )


def _split(encoded: dict[str, Any], sample: Sample) -> dict[str, Any]:
    """Ids, token-level tensors, and all others, as fields of an ``EncodedPrompt``."""
    input_ids = torch.as_tensor(encoded.pop("input_ids")).reshape(-1).tolist()
    encoded.pop("attention_mask", None)
    # Labels come with types that tell a prompt, which reads itself in both directions (0), from an answer (1).
    after = {} if encoded.pop("labels", None) is None else {"token_type_ids": 1}
    if not input_ids:
        raise EncodingError("The prompt is empty after tokenization. Give it a text, or check the chat template.")
    tokens, media = {}, {}
    for key, value in encoded.items():
        value = torch.atleast_1d(value if isinstance(value, Tensor) else torch.as_tensor(value))
        fits = value.ndim >= 2 and value.shape[:2] == (1, len(input_ids)) and not value.is_floating_point()
        (tokens if fits and not _ABOUT_MEDIA.match(key) else media)[key] = value
    if sample.media and not media:
        raise EncodingError(
            f"The row has {_count(sample)} but the processor returned none of them — {where_of(sample)}. "
            "Use a processor and chat template that know them."
        )
    return {"input_ids": input_ids, "tokens": tokens, "media": media, "after": after}


def _count(sample: Sample) -> str:
    kinds = [medium.kind for medium in sample.media]
    return " and ".join(f"{kinds.count(kind)} {kind}(s)" for kind in dict.fromkeys(kinds))


def check_placeholders(encoded: EncodedPrompt, sample: Sample, placeholders: dict[Kind, tuple[int, ...]]) -> None:
    """Raise ``EncodingError`` when a kind of medium left no placeholder in the tokens, or one is there without it."""
    present = set(encoded.input_ids)
    kinds: set[Kind] = {medium.kind for medium in sample.media}
    for kind in kinds:
        if placeholders.get(kind) and not present & set(placeholders[kind]):
            raise EncodingError(
                f"The row has {_count(sample)} but its encoded prompt has no {kind} token — {where_of(sample)}. "
                f"Use a chat template that renders {kind} parts, or write the {kind} token into the prompt."
            )
    allowed = {token for kind in kinds for token in placeholders.get(kind, ())}
    if "video" in kinds and encoded.options.get("use_audio_in_video"):
        allowed |= set(placeholders.get("audio", ()))
    for kind, ids in placeholders.items():
        if present & set(ids) - allowed:
            raise EncodingError(
                f"The prompt's text holds {_article(kind)} token but the row has no {kind} — {where_of(sample)}. "
                f"Add the {kind}, or remove the token from the text."
            )


def completion_ids(processor: Any, sample: Sample, completion: str) -> list[int]:
    """The tokens a model should produce for ``completion``, ending with the turn's end token.

    They are what the chat template puts after the generation prompt, up to and including the tokenizer's EOS; where
    the template does not continue its own generation prompt, the completion's own tokens and EOS.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    text = completion
    if not isinstance(sample.prompt, str) and not _takes_files(processor):  # those continue no generation prompt
        is_processor = hasattr(processor, "tokenizer")
        messages = without_media(sample.prompt) if is_processor else as_texts(sample.prompt)
        answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        answers = [answer] if is_processor else [{"role": "assistant", "content": text}]
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = processor.apply_chat_template(messages + answers, tokenize=False)
        if whole.startswith(prompt):
            text = whole[len(prompt) :].split(tokenizer.eos_token)[0]
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
