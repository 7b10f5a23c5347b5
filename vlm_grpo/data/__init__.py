"""Rows of any format in, one ``Sample`` out."""

from .load import load_data
from .sample import MEDIA_COLUMNS, Sample, to_sample

__all__ = ["MEDIA_COLUMNS", "Sample", "load_data", "to_sample"]
