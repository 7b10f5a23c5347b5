"""Pictures of a run: its learning curves, contact sheets of answered media, and one page that shows all of it."""

from .curves import draw_curves
from .page import PAGE, write_report
from .pairs import verdicts
from .previews import MediaFolder
from .records import duration, read_jsonl
from .sheet import contact_sheet, filmstrip, spectrogram
from .style import HUES, INK, MUTED, PAPER, RULE

__all__ = [
    "HUES",
    "INK",
    "MUTED",
    "PAGE",
    "PAPER",
    "RULE",
    "MediaFolder",
    "contact_sheet",
    "draw_curves",
    "duration",
    "filmstrip",
    "read_jsonl",
    "spectrogram",
    "verdicts",
    "write_report",
]
