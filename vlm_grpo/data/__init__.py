"""Rows of any format in, one ``Sample`` out."""

from .blank import blanked
from .columns import decoded, undecoded
from .formats import FORMATS, Format, as_canonical, canonical, detect
from .load import load_data
from .reading import raw_rows
from .sample import MEDIA_COLUMNS, Sample, to_sample

__all__ = [
    "FORMATS",
    "MEDIA_COLUMNS",
    "Format",
    "Sample",
    "as_canonical",
    "blanked",
    "canonical",
    "decoded",
    "detect",
    "load_data",
    "raw_rows",
    "to_sample",
    "undecoded",
]
