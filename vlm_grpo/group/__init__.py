"""Work that the completions of a group share: media encoded, prompts prefilled and scored once."""

from .report import SharingReport
from .rollout import unique, up_to_end
from .sharing import GroupSharing
from .units import advice, from_units, to_units, unit_of

__all__ = [
    "GroupSharing",
    "SharingReport",
    "advice",
    "from_units",
    "to_units",
    "unique",
    "unit_of",
    "up_to_end",
]
