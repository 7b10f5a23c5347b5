"""The main job on embedded defaults: a tiny model learns by GRPO or PPO to read digits, see motion or hear words.

Everything is real but small: scanned digits, clips of them that move, or spoken words as files; a model built here
with random weights; a supervised warm start on few labels; then GRPO or PPO on the other rows, from a correctness
reward alone or from a reward model. This package writes the data, the model and the configs; ``run.py`` does the rest,
exactly as for a user's run.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import ConfigError
from .correctness import by_ppo, from_correctness
from .digits import DIGITS, QUESTION, write_digits
from .judging import from_reward_model
from .models import save_tiny_model
from .recipes import RECIPES
from .rlhf import from_preferences
from .stages import continued_config, grpo_config, warm_config

__all__ = [
    "ALGORITHMS",
    "DIGITS",
    "QUESTION",
    "RECIPES",
    "continued_config",
    "demo",
    "grpo_config",
    "save_tiny_model",
    "warm_config",
    "write_digits",
]


@dataclass(frozen=True)
class Algorithm:
    """A chain of runs that ends in a better policy.

    Attributes:
        go: does it, given (recipe, folder, seed, full, console), and prints what came of it; returns the figures.
        modalities: those it can be shown on.
    """

    go: Callable[..., dict[str, Any]]
    modalities: tuple[str, ...]


ALGORITHMS = {
    "grpo": Algorithm(from_correctness, tuple(RECIPES)),
    "ppo": Algorithm(by_ppo, tuple(name for name, recipe in RECIPES.items() if recipe.ppo)),
    "reward-model": Algorithm(from_reward_model, ("image",)),
    "rlhf": Algorithm(from_preferences, ("image",)),
}


def demo(
    modality: str = "image",
    seed: int = 0,
    output: str | None = None,
    as_json: bool = False,
    full: bool = False,
    algorithm: str = "grpo",
) -> dict[str, Any]:
    """Warm start, GRPO or PPO, the warm start continued for the same time, and a table of held-out figures.

    Args:
        modality: ``image`` (which digit), ``video`` (which way a digit moves) or ``audio`` (which word).
        seed: of the weights, the choice of labels and all sampling; the held-out rows are always the same.
        output: folder for data, model and runs; by default ``runs/demo-ALGORITHM-MODALITY-SEED``, without the algorithm
            where it is GRPO, and without the modality where it has but one.
        as_json: print one JSON object as the last line of stdout.
        full: train all weights by reinforcement instead of a LoRA adapter.
        algorithm: ``grpo`` or ``ppo`` (from a correctness reward); ``reward-model`` (GRPO from one that is learned
            first) or ``rlhf`` (PPO from such).

    Returns:
        the object that ``as_json`` prints.

    Raises:
        ConfigError: no such modality or algorithm, or its data need a package that is missing.
    """
    if modality not in RECIPES:
        raise ConfigError(f'demo: there is no modality "{modality}". Use {", ".join(RECIPES)}.')
    if algorithm not in ALGORITHMS:
        raise ConfigError(f'demo: there is no algorithm "{algorithm}". Use {", ".join(ALGORITHMS)}.')
    chosen = ALGORITHMS[algorithm]
    several = len(chosen.modalities) > 1
    if modality not in chosen.modalities:
        raise ConfigError(
            f"demo: {algorithm} is shown with {' and '.join(chosen.modalities)}, not with {modality}. "
            + ("Choose one of these." if several else "Leave --modality out.")
        )
    ending = [name for name in (algorithm if algorithm != "grpo" else "", modality if several else "") if name]
    folder = Path(output or "-".join(["runs/demo", *ending, str(seed)]))
    console = Console(stderr=as_json)
    found = chosen.go(RECIPES[modality], folder, seed, full, console)
    figures = {"modality": modality, "algorithm": algorithm, "seed": seed, **found}
    if as_json:
        print(json.dumps(figures))
    return figures
