"""A conversation with a model: several turns, media in any of them, streamed, as trained or as it was before."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from .config import MediaOptions
from .encode import EncodedPrompt
from .errors import ConfigError, OverlongError
from .evaluate import complete
from .intake import Intake
from .media import KINDS, Kind, Medium
from .models.families import placeholder_ids_by_kind


@dataclass(frozen=True)
class Question:
    """One turn of the user: the message, and all turns up to it as the model takes them."""

    message: dict[str, Any]
    encoded: EncodedPrompt


class Conversation:
    """Questions and answers. Every answer sees all turns before it, with their media.

    Args:
        model: its mode is restored after each answer.
        processor: the model's.
        media: how media are opened.
        system: what stands before the first question.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 answers greedily; otherwise answers are drawn from the model's whole distribution, as in
            training.
        base: the model before training, where it is another one; None: the same model with its adapter off.
        template: keyword arguments of the chat template, as in training (``chat_template_kwargs``).

    Attributes:
        messages: what was said.

    >>> conversation = Conversation(model, processor)  # doctest: +SKIP
    >>> conversation.ask("How many squares are there?", images=["a.png"])  # doctest: +SKIP
    'three'
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        media: MediaOptions | None = None,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        base: Any = None,
        template: dict[str, Any] | None = None,
    ) -> None:
        if max_new_tokens < 1 or temperature < 0:
            raise ConfigError(
                f"max_new_tokens={max_new_tokens}, temperature={temperature}: an answer has a token or more, and a "
                "temperature is 0 (greedy) or above. Correct them."
            )
        self.model, self.processor, self.base, self.system = model, processor, base, system
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self._intake = Intake(processor, placeholder_ids_by_kind(model.config, processor), media, template=template)
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def ask(
        self,
        text: str = "",
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        audios: Sequence[Any] = (),
        of_base: bool = False,
        show: Callable[[str], None] | None = None,
    ) -> str:
        """Ask and keep the turn.

        Args:
            text: the question; it may be empty beside media.
            images, videos, audios: what it is about, as paths or as anything a row may hold.
            of_base: the model before training answers.
            show: called with each piece of the answer as it comes; together they are the answer.

        Raises:
            MediaError, EncodingError: a medium that cannot be opened, or that the model does not take.
            OverlongError: the conversation has grown beyond the model's positions.
            ConfigError: an empty question, or ``of_base`` without a base. Nothing is kept after any of them.
        """
        question = self.read(text, images=images, videos=videos, audios=audios)
        answer = self.answer(question, of_base=of_base, show=show)
        self.keep(question, answer)
        return answer

    def compare(
        self, text: str = "", *, images: Sequence[Any] = (), videos: Sequence[Any] = (), audios: Sequence[Any] = ()
    ) -> tuple[str, str]:
        """The answers of the model and of its base to the same conversation, which goes on with the model's.

        Arguments and errors: as for ``ask``.
        """
        question = self.read(text, images=images, videos=videos, audios=audios)
        answer, before = self.answer(question), self.answer(question, of_base=True)
        self.keep(question, answer)
        return answer, before

    def reset(self) -> None:
        """Forget all turns; the system text stays."""
        self.messages = [_message("system", self.system)] if self.system else []

    def read(
        self, text: str = "", *, images: Sequence[Any] = (), videos: Sequence[Any] = (), audios: Sequence[Any] = ()
    ) -> Question:
        """The first part of ``ask``: the question with all turns before it. Arguments and errors: as there."""
        given = dict(zip(KINDS, (images, videos, audios), strict=True))
        parts = [{"type": kind, kind: Medium.of(value, kind)} for kind, values in given.items() for value in values]
        if not parts and not text.strip():
            raise ConfigError("The question is empty. Give it a text, or a picture, video or sound.")
        message = _message("user", text, parts)
        _, encoded = self._intake.read({"prompt": [*self.messages, message]})
        limit = positions(self.model)
        if limit is not None and len(encoded.input_ids) >= limit:
            raise OverlongError(
                f"The conversation has {len(encoded.input_ids)} tokens, media included, and the model takes {limit} "
                "with its answer. Start a new one, or give fewer or smaller media."
            )
        return Question(message, encoded)

    def answer(self, question: Question, *, of_base: bool = False, show: Callable[[str], None] | None = None) -> str:
        """The second part of ``ask``: the answer, which is not kept yet. An exception of ``show`` ends it."""
        options: dict[str, Any] = {}
        if self.temperature:  # a published model's own top_k of 1 would undo every temperature
            options |= {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        if show is not None:
            options["streamer"] = _Pieces(self.processor, show)
        room = (positions(self.model) or float("inf")) - len(question.encoded.input_ids)
        length = int(min(self.max_new_tokens, room))
        model = self.base if of_base and self.base is not None else self.model
        with without_adapter(model) if of_base and self.base is None else nullcontext():
            return complete(model, self.processor, [question.encoded], length, **options)[0]

    def keep(self, question: Question, answer: str) -> None:
        """The third part of ``ask``: the turn belongs to the conversation from now on."""
        self.messages += [question.message, _message("assistant", answer)]

    def check(self, medium: Any, kind: Kind) -> None:
        """Raise ``MediaError`` or ``EncodingError`` where a medium cannot be opened or the model does not take it."""
        part = {"type": kind, kind: Medium.of(medium, kind)}
        self._intake.read({"prompt": [_message("user", "", [part])]})


def _message(role: str, text: str, parts: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    words = [{"type": "text", "text": text}] if text or not parts else []
    return {"role": role, "content": [*(parts or []), *words]}


def positions(model: Any) -> int | None:
    """How many tokens a model's language model has positions for, or None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The model as it was before its adapter was trained; afterwards, as it came, also after an exception.

    Modules that were trained whole beside an adapter (``modules_to_save``) are their originals too.

    Raises:
        ConfigError: the model has no adapter.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError("The model has no adapter that could be switched off. Give the model it was trained from.")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        with model.disable_adapter():
            yield
    finally:  # switching adapters on again makes all of them trainable
        for name, parameter in model.named_parameters():
            if parameter.requires_grad != (name in trained):
                parameter.requires_grad_(name in trained)


class _Pieces:
    """A streamer for ``generate``: what each token adds to the decoded answer, once no later token can change it.

    A character may be made of several tokens, and the white space around an answer is not part of it.
    """

    def __init__(self, processor: Any, show: Callable[[str], None]) -> None:
        self._tokenizer, self._show = getattr(processor, "tokenizer", processor), show
        self._ids: list[int] | None = None
        self._shown = ""

    def put(self, value: Any) -> None:
        if self._ids is None:  # the prompt comes first
            self._ids = []
            return
        self._ids += value.reshape(-1).tolist()
        self._add(self._text().rstrip("\ufffd").rstrip())

    def end(self) -> None:
        text = self._text()
        if text.startswith(self._shown):
            self._add(text)
        else:  # a tokenizer that mends what it decoded before
            self._show("\n" + text)

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids or [], skip_special_tokens=True).strip()

    def _add(self, text: str) -> None:
        if len(text) > len(self._shown) and text.startswith(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text
