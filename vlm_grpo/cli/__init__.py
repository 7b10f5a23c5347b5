"""The command line: one thin function a command. Nothing heavy is imported before a command runs."""

# isort: off
from . import train
from . import chat
from . import demo
from . import bench
from . import doctor
from . import export

# isort: on
from .base import app

__all__ = ["app", "bench", "chat", "demo", "doctor", "export", "main", "train"]


def main() -> None:
    """The ``vlm-grpo`` command."""
    app()
