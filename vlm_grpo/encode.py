"""One sample to one encoded prompt (the processor is called once a prompt), and encoded prompts to model inputs."""

from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from .data import Sample
from .errors import EncodingError


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """What the processor made of one prompt.

    Attributes:
        input_ids: the L prompt tokens, media placeholders expanded.
        tokens: token-level extras, each (1, L, ...), such as ``mm_token_type_ids``.
        media: everything else, such as ``pixel_values``; the first dimension counts images, patches or tiles.
    """

    input_ids: list[int]
    tokens: dict[str, Tensor]
    media: dict[str, Tensor]

    def __deepcopy__(self, memo: dict) -> "EncodedPrompt":
        return self  # immutable, and shared by the completions of a group


def encode(processor: Any, sample: Sample, tools: list | None = None, **template_kwargs: Any) -> EncodedPrompt:
    """Encode one prompt with one processor call.

    Args:
        processor: a processor or, for text-only rows, a tokenizer.
        sample: the row. A string prompt is taken as already templated; messages go through the chat template.
        tools: functions offered to the model by the chat template.
        template_kwargs: passed to ``apply_chat_template``, such as ``chat_template``.

    Raises:
        EncodingError: the prompt is empty, its image tokens do not match the row's media, or the processor refuses it.
        MediaError: a medium that cannot be opened.
    """
    _check_slots(processor, sample)
    if isinstance(sample.prompt, str):
        images = {"images": [medium.open() for medium in sample.media]} if sample.media else {}
        call, arguments = processor, {"text": [sample.prompt], **images}
    else:
        arguments = {"conversation": _conversation(processor, sample.prompt), "tools": tools or None, **template_kwargs}
        arguments |= {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        call = processor.apply_chat_template
    try:
        encoded = call(**arguments, return_tensors="pt")
    except (ValueError, TypeError, LookupError, TemplateError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise EncodingError(
            f"The processor refuses a row ({reason}) — {_where(sample)}. Change or remove it."
        ) from error
    return _split(dict(encoded), sample)


def _where(sample: Sample) -> str:
    """How the user finds the row again."""
    if sample.media:
        return sample.media[0].where or sample.media[0].label
    return repr(sample.prompt)[:80]


def _slots(processor: Any) -> list[str]:
    """The tokens that a processor expands into media placeholders, and the placeholders themselves."""
    names = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
    ids = [getattr(processor, f"{kind}_token_id", None) for kind in ("image", "video", "audio")]
    tokenizer = getattr(processor, "tokenizer", processor)
    names += [tokenizer.convert_ids_to_tokens(i) for i in ids if isinstance(i, int)]
    return list(dict.fromkeys(str(name) for name in names if name))


def _check_slots(processor: Any, sample: Sample) -> None:
    """One image token a medium in a templated text, and none in the text parts of messages.

    Processors take the two apart by position: one token too many and a row reads another's picture, or crashes.
    """
    slots = _slots(processor)
    if isinstance(sample.prompt, str):
        texts = [sample.prompt]
    else:
        texts = [part["text"] for message in sample.prompt for part in message["content"] if part["type"] == "text"]
    found = [slot for text in texts for slot in slots for _ in range(text.count(slot))]
    if found and not isinstance(sample.prompt, str):
        raise EncodingError(
            f"A text of the prompt holds the image token {found[0]} — {_where(sample)}. "
            "Remove it, or write an image part in its place."
        )
    if found and len(found) != len(sample.media):
        raise EncodingError(
            f"The prompt has {len(found)} image token{'s' * (len(found) != 1)} ({found[0]}) but the row has "
            f"{len(sample.media)} image{'s' * (len(sample.media) != 1)} — {_where(sample)}. Give one image per token."
        )


def _conversation(processor: Any, messages: list[dict[str, Any]]) -> list[Any]:
    """Open the media; a tokenizer's template takes strings, and wants no batch dimension."""
    if not hasattr(processor, "tokenizer"):
        return [{**m, "content": "".join(part.get("text", "") for part in m["content"])} for m in messages]
    opened = [
        {
            **message,
            "content": [
                {"type": "image", "image": part["image"].open()} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
    return [opened]


def _split(encoded: dict[str, Any], sample: Sample) -> EncodedPrompt:
    input_ids = torch.as_tensor(encoded.pop("input_ids")).reshape(-1).tolist()
    encoded.pop("attention_mask", None)
    length = len(input_ids)
    if length == 0:
        raise EncodingError("The prompt is empty after tokenization. Give it a text, or check the chat template.")
    tokens, media = {}, {}
    for key, value in encoded.items():
        value = value if isinstance(value, Tensor) else torch.as_tensor(value)
        (tokens if value.ndim >= 2 and value.shape[:2] == (1, length) else media)[key] = value
    if sample.media and not media:
        raise EncodingError(
            f"The row has {len(sample.media)} image(s) but the processor returned none of them — {_where(sample)}. "
            "Use a processor and chat template that know images."
        )
    return EncodedPrompt(input_ids, tokens, media)


def check_placeholders(encoded: EncodedPrompt, sample: Sample, placeholder_ids: tuple[int, ...]) -> None:
    """Raise ``EncodingError`` when the row has media but its tokens hold no placeholder for them, or the reverse."""
    present = any(token in placeholder_ids for token in encoded.input_ids)
    if bool(sample.media) == present or not placeholder_ids:
        return
    if sample.media:
        raise EncodingError(
            f"The row has {len(sample.media)} image(s) but its encoded prompt has no image token — {_where(sample)}. "
            "Use a chat template that renders image parts, or write the image token into the prompt."
        )
    raise EncodingError(
        f"The prompt's text holds an image token but the row has no image — {_where(sample)}. "
        "Add the image, or remove the token from the text."
    )


def collate(
    encodings: list[EncodedPrompt], width: int | None = None, extra: list[int] | None = None, device: Any = None
) -> dict[str, Tensor]:
    """Encoded prompts to the model's keyword arguments, all families by one rule, without ids and mask.

    Token-level tensors are left-padded to the prompts' common width and extended over what follows the prompt;
    everything else is zero-padded on its trailing dimensions and concatenated on dimension 0.

    Args:
        encodings: one per row (B); rows of a group may share one object.
        width: total width of the sequences; by default the longest row.
        extra: per row, how many tokens follow the prompt (completion, tool results, right padding); default 0.
        device: where the tensors go.

    Returns:
        token-level tensors (B, width, ...) and media tensors (sum of first dimensions, ...).
    """
    extra = [0] * len(encodings) if extra is None else extra
    lengths = [len(encoded.input_ids) + more for encoded, more in zip(encodings, extra, strict=True)]
    width = max(lengths) if width is None else width
    inputs = {}
    for key in dict.fromkeys(key for encoded in encodings for key in encoded.tokens):
        example = next(encoded.tokens[key] for encoded in encodings if key in encoded.tokens)
        rows = [_extend(e, key, example, width - n, more) for e, n, more in zip(encodings, lengths, extra, strict=True)]
        inputs[key] = _pad_and_concatenate(rows).to(device)
    for key in dict.fromkeys(key for encoded in encodings for key in encoded.media):
        rows = [encoded.media[key] for encoded in encodings if key in encoded.media]
        inputs[key] = _pad_and_concatenate(rows).to(device)
    return inputs


def _extend(encoded: EncodedPrompt, key: str, example: Tensor, left: int, right: int) -> Tensor:
    value = encoded.tokens.get(key)
    if value is None:  # a text row between image rows
        value = example.new_zeros((1, len(encoded.input_ids), *example.shape[2:]))
    # Type ids are 0 for text. A mask over media (L, ...) keeps the last prompt token's view of them.
    tail = value[:, -1:].expand(-1, right, *value.shape[2:]) if value.ndim > 2 else value.new_zeros((1, right))
    return torch.cat([value.new_zeros((1, left, *value.shape[2:])), value, tail], 1)


def _pad_and_concatenate(tensors: list[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        if list(tensor.shape[1:]) != shape:
            larger = tensor.new_zeros((tensor.shape[0], *shape))
            larger[tuple([slice(None), *(slice(0, size) for size in tensor.shape[1:])])] = tensor
            tensor = larger
        padded.append(tensor)
    return torch.cat(padded)


def model_inputs(encodings: list[EncodedPrompt], pad_token_id: int, device: Any = None) -> dict[str, Tensor]:
    """A left-padded batch for ``generate``: ``input_ids`` and ``attention_mask`` (B, L) with ``collate``'s tensors."""
    width = max(len(encoded.input_ids) for encoded in encodings)
    ids = [[pad_token_id] * (width - len(e.input_ids)) + e.input_ids for e in encodings]
    mask = [[0] * (width - len(e.input_ids)) + [1] * len(e.input_ids) for e in encodings]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        **collate(encodings, device=device),
    }


def pack_rollout(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """A buffered rollout as plain containers and tensors; encodings that rows share are kept once."""
    unique: dict[int, int] = {}
    plain, packed = [], []
    for batch in batches:
        index = []
        for encoded in batch["encodings"]:
            if id(encoded) not in unique:
                unique[id(encoded)] = len(plain)
                plain.append({"input_ids": encoded.input_ids, "tokens": encoded.tokens, "media": encoded.media})
            index.append(unique[id(encoded)])
        packed.append({**batch, "encodings": index})
    return {"encodings": plain, "batches": packed}


def unpack_rollout(state: dict[str, Any], device: Any) -> list[dict[str, Any]]:
    """The inverse of ``pack_rollout``; a batch's own tensors go to ``device``, encodings stay where they are made."""
    encodings = [EncodedPrompt(**plain) for plain in state["encodings"]]
    return [
        {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        | {"encodings": [encodings[i] for i in batch["encodings"]]}
        for batch in state["batches"]
    ]


def completion_ids(processor: Any, sample: Sample, completion: str) -> list[int]:
    """The tokens a model should produce for ``completion``, ending with the turn's end token.

    They are what the chat template puts after the generation prompt, up to and including the tokenizer's EOS; where
    the template does not continue its own generation prompt, the completion's own tokens and EOS.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    text = completion
    if not isinstance(sample.prompt, str):
        messages = _without_media(sample.prompt, processor)
        answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        answers = [answer] if hasattr(processor, "tokenizer") else [{"role": "assistant", "content": text}]
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = processor.apply_chat_template(messages + answers, tokenize=False)
        if whole.startswith(prompt):
            text = whole[len(prompt) :].split(tokenizer.eos_token)[0]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids + [tokenizer.eos_token_id]


def _without_media(messages: list[dict[str, Any]], processor: Any) -> list[dict[str, Any]]:
    if not hasattr(processor, "tokenizer"):
        return _conversation(processor, messages)
    return [
        {**message, "content": [part if part["type"] == "text" else {"type": "image"} for part in message["content"]]}
        for message in messages
    ]
