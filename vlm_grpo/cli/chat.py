"""``vlm-grpo chat``."""

from typing import Annotated

import typer

from .base import app, set_up_logging


@app.command()
def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or any model that train takes.")],
    image: Annotated[list[str] | None, typer.Option("--image", help="A picture to ask about. Repeatable.")] = None,
    video: Annotated[list[str] | None, typer.Option("--video", help="A video to ask about. Repeatable.")] = None,
    audio: Annotated[list[str] | None, typer.Option("--audio", help="A sound to ask about. Repeatable.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask this and stop; without it, a conversation.")] = (
        None
    ),
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--max_new_tokens", min=1, help="Longest answer, in tokens.")
    ] = 256,
) -> None:
    """Talk to a trained model."""
    set_up_logging()
    from .. import chat as chats

    chats.chat(run, image, prompt, max_new_tokens, videos=video, audios=audio)
