"""A reward model on held-out pairs: which response it scores higher, with its media and without, and whether it likes
length."""

from .figures import figures, longer_wins, pair_change
from .held_out import HeldOutPairs
from .judging import JudgedPair, PairEvaluation, judge_pairs
from .page import page, sentences

__all__ = [
    "HeldOutPairs",
    "JudgedPair",
    "PairEvaluation",
    "figures",
    "judge_pairs",
    "longer_wins",
    "page",
    "pair_change",
    "sentences",
]
