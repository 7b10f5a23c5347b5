"""The command line: one thin function a command. Nothing heavy is imported before a command runs."""

# isort: off
from . import train
from . import chat
from . import eval
from . import export
from . import report
from . import demo
from . import doctor
from . import bench
from . import data
from . import reward

# isort: on
from .base import app

__all__ = ["app", "bench", "chat", "data", "demo", "doctor", "eval", "export", "main", "report", "reward", "train"]


def main() -> None:
    """The ``vlm-grpo`` command."""
    app()
