"""A response and the request to judge it, as the tokens that follow a policy's own encoded prompt."""

import re
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from ..data import Sample
from ..encode import as_texts, where_of, without_media
from ..errors import EncodingError
from ..media import KINDS

# What a template makes of its arguments is found by rendering it, so it may refuse them in any of these ways.
_REFUSALS = (TemplateError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError)


def suffix_ids(
    processor: Any, sample: Sample, response: str, request: str, stem: str, template_kwargs: dict[str, Any]
) -> list[int]:
    """The tokens of response, end of turn, request, generation prompt and stem; see ``JudgePrompt.suffix``.

    Where the chat template continues its own generation prompt, prompt and suffix are the tokens of the whole
    conversation. Where it does not, or changes the response (those that leave earlier thoughts out), the response
    follows the prompt as it is, and the template only writes what comes after it. A processor without a template in
    Jinja gets the response, its EOS, and the request as a conversation of its own.

    Raises:
        EncodingError: the stem holds a media token.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    special, media = _special(processor)
    if any(token in stem for token in media):
        raise EncodingError(
            f"The stem {stem!r} of the judge's prompt holds a media token — {where_of(sample)}. Remove it: media stand "
            "in the row's own prompt only."
        )
    response, request = _plain(response, special), _plain(request, special)
    if getattr(processor, "chat_template", None) is None and "chat_template" not in template_kwargs:
        return _alone(processor, response, request, stem)
    writer = _Writer(processor, template_kwargs)
    prompt, rest = writer.continued(sample, response, request)
    return _behind(tokenizer, prompt, rest + stem)


def _behind(tokenizer: Any, prompt: str, rest: str) -> list[int]:
    """The tokens of ``rest``, which some tokenizers begin otherwise behind a prompt than alone."""
    before = _ids(tokenizer, prompt)
    whole = _ids(tokenizer, prompt + rest)
    return whole[len(before) :] if whole[: len(before)] == before else _ids(tokenizer, rest)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


class _Writer:
    """Writes conversations by a chat template, as texts."""

    def __init__(self, processor: Any, template_kwargs: dict[str, Any]) -> None:
        self.processor, self.template_kwargs = processor, template_kwargs
        self.in_parts = hasattr(processor, "tokenizer")

    def continued(self, sample: Sample, response: str, request: str) -> tuple[str, str]:
        """(the prompt, what follows it up to the stem)."""
        messages = self._messages(sample)
        prompt = self._written(messages)
        shown = sample.prompt if isinstance(sample.prompt, str) else prompt or ""
        mark = _unused("response", [shown, request])
        marked = self._written([*messages, self._turn("assistant", mark), self._turn("user", request)])
        if marked is None or marked.count(mark) != 1:
            return shown, response + self._end(request)
        before, _, after = marked.partition(mark)
        if prompt is None or not before.startswith(prompt):
            return shown, response + after
        return shown, before[len(prompt) :] + self._kept(messages, before, response, request, after) + after

    def _kept(self, messages: list[dict[str, Any]], before: str, response: str, request: str, after: str) -> str:
        """The response, without the white space around it where the template strips it."""
        if response == response.strip():
            return response
        whole = self._written([*messages, self._turn("assistant", response), self._turn("user", request)])
        return response.strip() if whole == before + response.strip() + after else response

    def _end(self, request: str) -> str:
        """EOS, and the request as a conversation of its own."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        alone = self._written([self._turn("user", request)]) or request + "\n"
        return (tokenizer.eos_token or "\n") + alone.removeprefix(tokenizer.bos_token or "")

    def _messages(self, sample: Sample) -> list[dict[str, Any]]:
        if isinstance(sample.prompt, str):  # templated already: another question shows how a template goes on
            return [self._turn("user", "?")]
        return without_media(sample.prompt) if self.in_parts else as_texts(sample.prompt)

    def _turn(self, role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if self.in_parts else text}

    def _written(self, messages: list[dict[str, Any]]) -> str | None:
        """The conversation and the generation prompt; None where the template refuses it."""
        options = {"tokenize": False, "add_generation_prompt": True, **self.template_kwargs}
        try:
            return self.processor.apply_chat_template(messages, **options)
        except _REFUSALS:
            return None


def _unused(name: str, texts: list[str]) -> str:
    while any(name in text for text in texts):
        name += "x"
    return name


def _alone(processor: Any, response: str, request: str, stem: str) -> list[int]:
    """Without a template in Jinja: Mistral's processors write tokens, and others write nothing."""
    tokenizer = getattr(processor, "tokenizer", processor)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    messages = [{"role": "user", "content": [{"type": "text", "text": request}]}]
    try:
        encoded = processor.apply_chat_template([messages], tokenize=True, return_dict=True)
        asked = [int(token) for token in encoded["input_ids"][0]]
    except _REFUSALS:
        asked = _ids(tokenizer, request + "\n")
    asked = asked[1:] if asked and asked[0] == tokenizer.bos_token_id else asked
    return _ids(tokenizer, response) + end + asked + _ids(tokenizer, stem)


@lru_cache(maxsize=4)
def _special(processor: Any) -> tuple[re.Pattern[str], tuple[str, ...]]:
    """(what finds a special token in a text, the tokens that stand for media)."""
    tokenizer = getattr(processor, "tokenizer", processor)
    media: set[str] = set()
    for kind in KINDS:
        token, token_id = (getattr(processor, f"{kind}_token{end}", None) for end in ("", "_id"))
        written = tokenizer.convert_ids_to_tokens(token_id) if isinstance(token_id, int) else None
        media |= {str(name) for name in (token, written) if name}
    added = getattr(tokenizer, "added_tokens_decoder", None)
    listed = added.values() if isinstance(added, dict) else ()  # Mistral's reads no control token from a text
    special = {token.content for token in listed if token.special} | set(tokenizer.all_special_tokens) | media
    longest_first = sorted((token for token in special if token.strip()), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)"), tuple(sorted(media))


def _plain(text: str, special: re.Pattern[str]) -> str:
    """The text with a space inside whatever would be read as a special token.

    A model can write the letters of any token. As the token itself, one that stands for a medium crashes the forward,
    and an end of turn would let a response speak to its judge.
    """
    while special.search(text):
        text = special.sub(lambda found: f"{found[0][0]} {found[0][1:]}" if len(found[0]) > 1 else "", text)
    return text
