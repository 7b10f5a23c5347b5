"""The command line: one thin function a command. Nothing heavy is imported before a command runs."""

# isort: off
from . import train
from . import chat
from . import export
from . import demo
from . import doctor
from . import bench

# isort: on
from .base import app

__all__ = ["app", "bench", "chat", "demo", "doctor", "export", "main", "train"]


def main() -> None:
    """The ``vlm-grpo`` command."""
    app()
