"""Talk to a trained run: one question, or a conversation about some pictures."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.prompt import Prompt

from .config import load_config
from .data import to_sample
from .encode import encode
from .evaluate import greedy
from .folder import CONFIG
from .models import load_model

_LEAVE = {"", "exit", "quit", "/exit", "/quit"}


def chat(run: str, images: list[str], prompt: str | None = None, max_new_tokens: int = 256) -> str:
    """Answer ``prompt`` about ``images`` greedily; without a prompt, hold a conversation on the terminal.

    Args:
        run: a run folder, or anything ``load_model`` takes.
        images: picture files, shown with the first question.
        prompt: the question; None reads questions until an empty line.
        max_new_tokens: longest answer, in tokens.

    Returns:
        The last answer, also printed.

    Raises:
        MediaError: a picture that cannot be opened.
    """
    model, processor = load_model(run, **_as_trained(run))
    model.eval()
    console, answer = Console(), ""
    messages: list[dict[str, Any]] = []
    question = prompt if prompt is not None else _ask()
    while question is not None:
        pictures = images if not messages else []
        parts = [{"type": "image", "image": str(Path(path).expanduser())} for path in pictures]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        answer = greedy(model, processor, [encode(processor, to_sample({"prompt": messages}))], max_new_tokens)[0]
        console.print(answer, markup=False, highlight=False, soft_wrap=True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        question = None if prompt is not None else _ask()
    return answer


def _as_trained(run: str) -> dict[str, Any]:
    """How a run loaded its model: answers from other weights would not be those that were trained and measured."""
    file = Path(run).expanduser() / CONFIG
    if not file.is_file():
        return {}
    config = load_config(file)
    return {"load_in_4bit": config.load_in_4bit, "dtype": config.dtype, "backend": config.backend}


def _ask() -> str | None:
    try:
        text = Prompt.ask("[bold]you[/bold] (empty line to leave)", default="", show_default=False).strip()
    except EOFError:
        return None
    return None if text.lower() in _LEAVE else text
