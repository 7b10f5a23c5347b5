"""``ModelReward``: a text reward model, a sequence classification model of one label, as a reward function."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..config import Dtype
from ..data import MEDIA_COLUMNS
from ..errors import RewardError
from ..media import KINDS
from .text import completion_text

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


def kind_of(options: dict[str, Any]) -> type:
    """What scores by ``options["model"]``: a reward model of ours, which sees the media, or one that reads texts.

    Raises:
        RewardError: no model is given, or one of ours that is not finished.
    """
    from .judge import JudgeReward
    from .reward_run import is_reward_run

    if "model" not in options:
        raise RewardError(
            'The reward "model" needs the option model: the folder of a reward model, or the name of a text one.'
        )
    return JudgeReward if is_reward_run(options["model"]) else ModelReward


class ModelReward:
    """Scores prompt and completion by a model's one logit, as TRL does where it is given the model itself.

    Conversations go through the chat template of the model's own tokenizer; plain strings are joined. The model is in
    evaluation mode and frozen, and belongs to no trainer: nothing of it is in a checkpoint. It reads text; media in a
    prompt are left out, which is said once.

    Args:
        model: a folder, a hub name, or a loaded model.
        tokenizer: of the model; None loads the one beside it.
        batch_size: texts a forward.
        max_length: in tokens; of a longer text the end is scored, which holds the completion. None cuts nothing.
        dtype: number type of a model that is loaded here; auto is the one it was saved in.
        device: where it runs; None is the GPU where there is one.
        chat_template_kwargs: further arguments of the chat template.
        model_kwargs: further arguments of ``from_pretrained``, such as ``revision``.
        name: what metrics call it; None is the last part of the model's name.

    Raises:
        RewardError: not found, no model of one label, without a trained head, or without a tokenizer.
    """

    def __init__(
        self,
        model: "str | nn.Module",
        *,
        tokenizer: Any = None,
        batch_size: int = 8,
        max_length: int | None = None,
        dtype: Dtype = "auto",
        device: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        import torch

        for what, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise RewardError(f"{what}={value!r} must be a whole number from 1 on. Correct it.")
        given = isinstance(model, str)
        self.model: Any = _load(model, dtype, model_kwargs or {}) if given else model
        own_name = getattr(getattr(model, "config", None), "_name_or_path", "")
        self.label = model if given else own_name or type(model).__name__
        _refuse_labels(self.model, self.label)
        self.tokenizer = _tokenizer(tokenizer, self.label, model_kwargs or {})
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id  # it scores the last real token
        if given or device is not None:  # a loaded model stays where its owner put it
            self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.eval().requires_grad_(False)
        self.batch_size, self.max_length = batch_size, max_length
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.__name__ = name or self.label.rstrip("/").split("/")[-1]
        self._said: set[str] = set()
        self._one_at_a_time = threading.Lock()  # a tokenizer's padding is its own state

    def __repr__(self) -> str:
        return f"ModelReward({self.label!r})"

    def __call__(self, completions: list[Any], prompts: list[Any] | None = None, **columns: Any) -> list[float]:
        """One score a completion.

        Args:
            completions: strings or message lists.
            prompts: alike; None scores the completions alone.
            columns: of the rows; only looked at for media.

        Raises:
            RewardError: the tokenizer has no chat template for conversations.
        """
        import torch

        prompts = prompts if prompts is not None else [_empty(completion) for completion in completions]
        self._say_media(prompts, columns)
        texts = [self._text(*pair) for pair in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        with self._one_at_a_time, torch.inference_mode():
            for start in range(0, len(texts), self.batch_size):
                inputs = self._inputs(texts[start : start + self.batch_size])
                scores += self.model(**inputs).logits[:, 0].float().tolist()
        return scores

    def _text(self, prompt: Any, completion: Any) -> str:
        from trl.data_utils import apply_chat_template

        if isinstance(prompt, str):
            return prompt + completion_text(completion)
        if not self.tokenizer.chat_template:
            raise RewardError(
                f'the tokenizer of "{self.label}" has no chat template, and the rows are conversations. Give prompts '
                "as plain strings, or a tokenizer with a template."
            )
        answer = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        messages = [_without_media(message) for message in [*prompt, *answer]]
        return apply_chat_template({"messages": messages}, self.tokenizer, **self.chat_template_kwargs)["text"]

    def _inputs(self, texts: list[str]) -> Any:
        inputs = self.tokenizer(texts, add_special_tokens=False)
        longest = max(map(len, inputs["input_ids"]))
        if self.max_length is not None and longest > self.max_length:
            self._say(
                "long",
                f'The reward model "{self.label}" is given the last {self.max_length} tokens of longer texts (one has '
                f"{longest}): max_length.",
            )
            inputs = {key: [row[-self.max_length :] for row in rows] for key, rows in inputs.items()}
        padded = self.tokenizer.pad(inputs, padding=True, padding_side="right", return_tensors="pt")
        return padded.to(next(self.model.parameters()).device)

    def _say_media(self, prompts: list[Any], columns: dict[str, Any]) -> None:
        in_columns = any(any(columns.get(name) or ()) for name in MEDIA_COLUMNS if isinstance(columns.get(name), list))
        parts = (part for prompt in prompts if not isinstance(prompt, str) for part in _parts(prompt))
        if in_columns or any(part.get("type") in KINDS for part in parts):
            self._say(
                "media",
                f'The reward model "{self.label}" reads text only: it does not see the images, videos and sounds of '
                "the prompts. A model of vlm-grpo reward train sees them.",
            )

    def _say(self, what: str, sentence: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(sentence)


def _load(model: str, dtype: Dtype, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with _naming(model):
        config = AutoConfig.from_pretrained(model, **options)
    kind = next(iter(config.architectures or []), config.model_type)
    if "Classification" not in kind and "Reward" not in kind:
        raise RewardError(
            f'"{model}" is a {kind}, which has no scoring head. Give a sequence classification model of one label.'
        )
    _refuse_count(config.num_labels or 0, model)
    with _naming(model):
        loaded, about = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=dtype, output_loading_info=True, **options
        )
    if about["missing_keys"]:  # transformers fills them with random numbers, and says so among many other lines
        missing = sorted(about["missing_keys"])
        raise RewardError(
            f'The reward model "{model}" lacks weights ({missing[0]}), which would be random. Give a model whose '
            "scoring head is trained."
        )
    return loaded


@contextmanager
def _naming(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise RewardError(
            f'The reward model "{model}" cannot be loaded ({reason}). Give a folder or hub name of a sequence '
            "classification model."
        ) from error


def _refuse_labels(model: Any, label: str) -> None:
    if not hasattr(model, "config"):
        raise RewardError(f'"{label}" is no model of transformers. Give a sequence classification model, or its name.')
    _refuse_count(model.config.num_labels, label)


def _refuse_count(labels: int, model: str) -> None:
    if labels != 1:
        raise RewardError(
            f'"{model}" has {labels} labels, so that none of its outputs is the score. Give a reward model, which has '
            "one label."
        )


def _tokenizer(tokenizer: Any, label: str, options: dict[str, Any]) -> Any:
    if tokenizer is None or isinstance(tokenizer, str):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer or label, **options)
        except (OSError, ValueError) as error:
            raise RewardError(f'The reward model "{label}" has no tokenizer beside it. Give tokenizer.') from error
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _empty(completion: Any) -> Any:
    return "" if isinstance(completion, str) else []


def _parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]


def _without_media(message: dict[str, Any]) -> dict[str, Any]:
    """Its texts as one string, which every template of a text model takes."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(part.get("text") or "" for part in content)}
