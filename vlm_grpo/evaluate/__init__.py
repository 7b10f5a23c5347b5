"""Held-out figures: greedy answers measured by every reward, intervals, paired changes, and controls without media."""

from .answering import complete, completion_tokens, decoded_texts
from .controls import CONTROLS, Control
from .evaluation import Answered, Evaluation, evaluate
from .figures import change, figures
from .scoring import Yardstick, accuracy_of_learned, learned_yardstick, yardstick_of
from .statistics import mcnemar, paired_change, pass_at_k, war_uar, wilson, yes_no

__all__ = [
    "CONTROLS",
    "Answered",
    "Control",
    "Evaluation",
    "Yardstick",
    "accuracy_of_learned",
    "change",
    "complete",
    "completion_tokens",
    "decoded_texts",
    "evaluate",
    "figures",
    "learned_yardstick",
    "mcnemar",
    "paired_change",
    "pass_at_k",
    "war_uar",
    "wilson",
    "yardstick_of",
    "yes_no",
]
