"""What the rewards of a run are for: which count, which are only watched, which judge and which know the answer."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .records import finite

# Built-in rewards: what a model (or a service) thinks of a completion, and what the row's own answer says of it.
_JUDGES = ("model", "api")
_TRUTHS = ("accuracy", "asr", "grounding", "counting", "ocr", "actions")


class Rewards(NamedTuple):
    """The rewards of a run, by the names that its logs have for them.

    Attributes:
        weights: of each; empty where it is not known what they are.
        judge: the reward that a model gives; empty where there is none, or no ``truth`` beside it.
        truth: the reward that looks at the answer.
    """

    weights: dict[str, float]
    judge: str = ""
    truth: str = ""

    @property
    def watched(self) -> list[str]:
        """Those of weight 0: logged, and no part of the reward."""
        return [name for name, weight in self.weights.items() if weight == 0]


def rewards_of(config: dict[str, Any], names: Iterable[str]) -> Rewards:
    """Match the rewards of a config with the names in the logs, which stand in the config's order.

    Args:
        config: of the run.
        names: of the rewards, in the order of a log.
    """
    listed = config.get("rewards")
    specs = [spec if isinstance(spec, Mapping) else {} for spec in listed] if isinstance(listed, list) else []
    weights = [finite(spec.get("weight", 1.0)) for spec in specs]
    names = list(names)
    if not names or len(names) != len(specs):
        return Rewards({})
    known = {name: weight for name, weight in zip(names, weights, strict=True) if weight is not None}
    if len(known) != len(specs):
        return Rewards({})
    kinds = {name: str(spec.get("name")) for name, spec in zip(names, specs, strict=True)}
    # Of several the one that counts most: it is what the policy learns from.
    judges = sorted((name for name in names if kinds[name] in _JUDGES), key=lambda name: -abs(known[name]))
    truths = sorted((name for name in names if kinds[name] in _TRUTHS), key=lambda name: _TRUTHS.index(kinds[name]))
    both = judges and truths
    return Rewards(known, judges[0] if both else "", truths[0] if both else "")


def logged_rewards(records: list[dict[str, Any]]) -> list[str]:
    """The names of the rewards in the lines of metrics.jsonl, in their order."""
    keys = dict.fromkeys(key for record in records for key in record if key.startswith("rewards/"))
    return [key[len("rewards/") : -len("/mean")] for key in keys if key.endswith("/mean")]
