"""Formats of rows, told apart by their columns, and the one canonical form that they all become.

Canonical are ``prompt`` (messages with list contents, or a string to which the chat template has been applied), media
columns ``image(s)``, ``video(s)``, ``audio(s)``, ``answer``, ``completion`` (a message of the assistant), and every
other column of the row as it was.
"""

from .base import Format
from .detection import FORMATS, canonical, detect
from .table import as_canonical

__all__ = ["FORMATS", "Format", "as_canonical", "canonical", "detect"]
