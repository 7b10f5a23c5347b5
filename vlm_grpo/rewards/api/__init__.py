"""Scores from a server: one that speaks the scoring protocol, or a judge behind chat completions."""

from .options import ApiOptions
from .reward import ApiReward

__all__ = ["ApiOptions", "ApiReward"]
