"""What every command shares: the application, its two streams, and how errors end it."""

import logging
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from typer.core import TyperGroup

from .. import __version__
from ..config import RunConfig
from ..errors import VLMGRPOError

out = Console()
err = Console(stderr=True)


class _Commands(TyperGroup):
    """User errors become one sentence on stderr and exit code 2; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        ours = logging.getLogger("vlm_grpo")
        try:
            return super().invoke(ctx)
        except VLMGRPOError as error:
            say(str(error))
            raise typer.Exit(2) from error
        except ValidationError as error:
            problem = error.errors()[0]
            say(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']} (given {problem['input']!r}).")
            raise typer.Exit(2) from error
        except (ImportError, RuntimeError) as error:
            if not _is_of_packages(error):
                raise
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            say(f"An installed package cannot be imported ({reason}). vlm-grpo doctor says which one and what to do.")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            again = "The same command again continues from the last checkpoint, if one was written."
            say(f"Stopped. {again}" if ctx.invoked_subcommand in ("train", "sft", "demo") else "Stopped.")
            raise typer.Exit(130) from error
        finally:
            ours.propagate = True


def _is_of_packages(error: Exception) -> bool:
    """Whether another package is missing or broken: transformers says so by a RuntimeError, torchvision by another."""
    if isinstance(error, ImportError):
        return not (error.name or "").startswith("vlm_grpo")
    return any(text in str(error) for text in ("Failed to import", "operator torchvision::"))


def say(text: str) -> None:
    err.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def help_of(name: str, model: Any = RunConfig) -> str:
    return model.model_fields[name].description


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__, highlight=False)
        raise typer.Exit


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Teach a multimodal model a checkable skill by reinforcement learning."""


class _OnScreen(logging.Handler):
    """Our own log lines (the backend and why, a resumed checkpoint), on the standard error stream."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def set_up_logging() -> None:
    # What two libraries warn about while they are imported stays off the screen: nobody here can act on it.
    for name in ("torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ours = logging.getLogger("vlm_grpo")
    ours.setLevel(logging.INFO)
    ours.propagate = False  # during the command: libraries give the root logger handlers that would say it twice
    if not any(isinstance(handler, _OnScreen) for handler in ours.handlers):
        ours.addHandler(_OnScreen())
