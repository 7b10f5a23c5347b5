"""Talk to a trained run: one question, or a conversation about pictures, videos and sounds, on a terminal or a pipe."""

import logging
from typing import Any

from peft import PeftModel

from .config import MediaOptions, RunConfig
from .conversation import Conversation
from .errors import ConfigError, MediaError
from .folder import CONFIG
from .media import KINDS, Kind, Medium
from .media.check import check_medium
from .models import load_model, refuse_reward_model
from .terminal import Terminal
from .trained import as_trained, config_of, template_of

_LOG = logging.getLogger("vlm_grpo")


def chat(
    run: str,
    images: list[str] | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 256,
    *,
    videos: list[str] | None = None,
    audios: list[str] | None = None,
    system: str | None = None,
    temperature: float = 0.0,
    compare_base: bool = False,
    stream: bool = True,
    as_json: bool = False,
) -> str:
    """Answer ``prompt`` about some media, printed; without a prompt, hold a conversation.

    On a terminal questions and commands (``/help`` lists them) are read until ``/quit`` or the end of input; from a
    pipe each line is one.

    Args:
        run: a run folder, one of its checkpoints, or anything ``load_model`` takes.
        images, videos, audios: media files, shown with the first question.
        prompt: the question; it may be empty beside media. None reads questions.
        max_new_tokens: longest answer, in tokens.
        system: what stands before the first question.
        temperature: 0 answers greedily.
        compare_base: the model before training answers too, after the trained one; the conversation goes on with the
            trained one's answer. Of an adapter, that is the same model with it off; of a run that trained the model
            itself, the model it started from is loaded as well.
        stream: print an answer token by token.
        as_json: print a line of JSON a question instead: ``question``, ``answer``, ``base_answer``.

    Returns:
        The last answer, of the trained model where both answer.

    Raises:
        MediaError, EncodingError: a medium that cannot be opened, or that the model does not take.
        OverlongError: the prompt has more tokens than the model has positions.
        ConfigError: no such run, or nothing to compare it with.
    """
    refuse_reward_model(run, "chat")
    config = config_of(run)
    media = config.media if config is not None else MediaOptions()
    given: dict[Kind, list[str]] = {
        kind: list(paths or []) for kind, paths in zip(KINDS, (images, videos, audios), strict=True)
    }
    _check_files(given, media)
    model, processor = load_model(run, **as_trained(run, config))
    conversation = Conversation(
        model,
        processor,
        media=media,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        template=template_of(config),
    )
    talk = Terminal(conversation, lambda: _base(run, config, model), given, stream=stream, as_json=as_json)
    if compare_base:
        talk.switch("both")
    if prompt is not None:
        return talk.ask(prompt)
    return talk.hold(run)


def _check_files(given: dict[Kind, list[str]], options: MediaOptions) -> None:
    """Refuse a missing or broken file before a model is loaded for minutes."""
    for kind, paths in given.items():
        for path in paths:
            medium = Medium.of(path, kind)
            problem = check_medium(medium, "headers", options, options.audio_in_video)
            if problem:
                raise MediaError(f'The {kind} "{medium.label}" {problem}. Correct the path, or replace the file.')


def _base(run: str, config: RunConfig | None, model: Any) -> Any:
    """The model a run started from, or None where the run's model is that one once its adapter is off."""
    if isinstance(model, PeftModel):
        return None
    if config is None:
        raise ConfigError(
            f"{run} has no adapter, and no {CONFIG} that names the model it was trained from: there is nothing to "
            "compare it with. Give a run folder, or ask without the base."
        )
    _LOG.info("This run trained the model itself: %s is loaded beside it, with as much memory again.", config.model)
    return load_model(config.model, **as_trained(run, config))[0]
