"""``vlm-grpo eval``: a run or model measured on held-out rows, beside a baseline and without its media."""

from .job import Report, evaluate_run
from .plan import Request

__all__ = ["Report", "Request", "evaluate_run"]
