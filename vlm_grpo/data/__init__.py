"""Rows of any format in, one ``Sample`` out."""

from .blank import blanked
from .columns import decoded, undecoded
from .load import load_data
from .sample import MEDIA_COLUMNS, Sample, to_sample

__all__ = ["MEDIA_COLUMNS", "Sample", "blanked", "decoded", "load_data", "to_sample", "undecoded"]
