"""Talk to a trained run: one question, or a conversation about some pictures, videos or sounds."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.prompt import Prompt

from .config import RunConfig, load_config
from .data import to_sample
from .encode import encode
from .evaluate import greedy
from .folder import CONFIG
from .models import load_model

_LEAVE = {"", "exit", "quit", "/exit", "/quit"}


def chat(
    run: str,
    images: list[str] | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 256,
    *,
    videos: list[str] | None = None,
    audios: list[str] | None = None,
) -> str:
    """Answer ``prompt`` about some media greedily; without a prompt, hold a conversation on the terminal.

    Args:
        run: a run folder, or anything ``load_model`` takes.
        images, videos, audios: media files, shown with the first question.
        prompt: the question; None reads questions until an empty line.
        max_new_tokens: longest answer, in tokens.

    Returns:
        The last answer, also printed.

    Raises:
        MediaError: a medium that cannot be opened.
    """
    config = _config(run)
    model, processor = load_model(run, **_as_trained(config))
    media = config.media if config is not None else None
    model.eval()
    console, answer = Console(), ""
    messages: list[dict[str, Any]] = []
    question = prompt if prompt is not None else _ask()
    while question is not None:
        given = {"image": images, "video": videos, "audio": audios} if not messages else {}
        parts = [
            {"type": kind, kind: str(Path(path).expanduser())} for kind, paths in given.items() for path in paths or []
        ]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        answer = greedy(
            model, processor, [encode(processor, to_sample({"prompt": messages}), media=media)], max_new_tokens
        )[0]
        console.print(answer, markup=False, highlight=False, soft_wrap=True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        question = None if prompt is not None else _ask()
    return answer


def _config(run: str) -> RunConfig | None:
    file = Path(run).expanduser() / CONFIG
    return load_config(file) if file.is_file() else None


def _as_trained(config: RunConfig | None) -> dict[str, Any]:
    """How a run loaded its model: answers from other weights would not be those that were trained and measured."""
    if config is None:
        return {}
    return {"load_in_4bit": config.load_in_4bit, "dtype": config.dtype, "backend": config.backend}


def _ask() -> str | None:
    try:
        text = Prompt.ask("[bold]you[/bold] (empty line to leave)", default="", show_default=False).strip()
    except EOFError:
        return None
    return None if text.lower() in _LEAVE else text
