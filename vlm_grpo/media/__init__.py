"""One medium of a prompt: opened, checked, resized and sampled only when a step needs it; never copied."""

from .medium import KINDS, OVERRIDES, Kind, Medium, Video

__all__ = ["KINDS", "OVERRIDES", "Kind", "Medium", "Video"]
