"""``vlm-grpo chat``."""

from typing import Annotated

import typer

from .base import app, say, set_up_logging


@app.command(
    epilog="Without --prompt it reads questions: from a terminal, where /help lists the commands (/image PATH shows a "
    "picture), or one a line from a pipe."
)
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
    system: Annotated[str | None, typer.Option("--system", help="What stands before the first question.")] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="Draw answers at this temperature; 0 is greedy.")
    ] = 0.0,
    compare_base: Annotated[
        bool,
        typer.Option("--compare-base", "--compare_base", help="Let the model as it was before training answer too."),
    ] = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print answers as they come.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for every question.")] = False,
) -> None:
    """Talk to a trained model about pictures, videos and sounds."""
    set_up_logging()
    from ..models import import_unsloth_first, is_adapter

    import_unsloth_first("auto", is_adapter(run))
    from .. import chat as chats

    try:
        chats.chat(
            run,
            image,
            prompt,
            max_new_tokens,
            videos=video,
            audios=audio,
            system=system,
            temperature=temperature,
            compare_base=compare_base,
            stream=stream,
            as_json=as_json,
        )
    except KeyboardInterrupt as error:
        say("Stopped.")
        raise typer.Exit(130) from error
