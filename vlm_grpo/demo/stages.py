"""What the demos' algorithms share: the configs of their runs, and looking at the result."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import RunConfig
from .recipes import Recipe

_HELD_OUT = "held-out.jsonl"


def whole(result: Any) -> Any:
    """The result of a stage that nobody interrupted; the same demo again goes on with one that was."""
    if result.stopped in ("Ctrl-C", "SIGTERM"):
        raise KeyboardInterrupt
    return result


def warm_config(recipe: Recipe, folder: Path, seed: int) -> RunConfig:
    """The supervised warm start."""
    return RunConfig.model_validate(
        {
            "model": str(folder / "model"),
            "data": {"train": str(folder / "data" / "labels.jsonl"), "eval": str(folder / "data" / _HELD_OUT)},
            "rewards": ["accuracy"],
            "output": str(folder / "warm"),
            "train": {**recipe.warm, "seed": seed},
        }
    )


def grpo_config(
    recipe: Recipe,
    folder: Path,
    seed: int,
    full: bool,
    rewards: Sequence[str | dict[str, Any]] = ("accuracy",),
    rows: str = "train.jsonl",
) -> RunConfig:
    """GRPO on the rows whose labels only the reward sees."""
    return RunConfig.model_validate(
        {
            "model": str(folder / "warm"),
            "lora": None if full else recipe.lora,
            "data": {"train": str(folder / "data" / rows), "eval": str(folder / "data" / _HELD_OUT)},
            "rewards": list(rewards),
            "output": str(folder / "grpo"),
            "train": {**recipe.grpo, "seed": seed, **(recipe.full if full else {})},
        }
    )


def ppo_config(
    recipe: Recipe,
    folder: Path,
    seed: int,
    full: bool,
    rewards: Sequence[str | dict[str, Any]] | None = None,
    rows: str = "train.jsonl",
    name: str = "ppo",
) -> RunConfig:
    """PPO in GRPO's place: the same rows and completions a step, from the recipe's rewards for it."""
    config = grpo_config(recipe, folder, seed, full, recipe.ppo_rewards if rewards is None else rewards, rows)
    values = config.model_dump()
    values["train"] = {key: value for key, value in values["train"].items() if key != "beta"} | recipe.ppo
    return RunConfig.model_validate({**values, "algorithm": "ppo", "output": str(folder / name)})


def continued_config(recipe: Recipe, folder: Path, seed: int, seconds: float) -> RunConfig:
    """The warm start, gone on with for as long as GRPO took."""
    config = warm_config(recipe, folder, seed).model_dump()
    config |= {"model": str(folder / "warm"), "output": str(folder / "continued"), "max_minutes": seconds / 60}
    config["train"] |= {"max_steps": 100_000, "save_steps": 100_000}
    return RunConfig.model_validate(config)


def figures_of(warm: Any, grpo: Any, continued: Any) -> dict[str, Any]:
    """Held-out accuracies with 95% intervals, and the reward of the first and last steps, as the JSON object has them.

    Args:
        warm, grpo, continued: the results of the three runs.
    """
    from ..report import read_jsonl

    rewards = [record["reward"] for record in read_jsonl(grpo.run_dir / "metrics.jsonl") if "reward" in record]
    few = max(1, len(rewards) // 15)
    before, after = warm.evaluation["after"], grpo.evaluation["after"]
    return {
        "accuracy_before": before["accuracy"],
        "ci95_before": before["ci95"],
        "accuracy_after": after["accuracy"],
        "ci95_after": after["ci95"],
        "accuracy_sft_only": continued.evaluation["after"]["accuracy"],
        "accuracy_control": grpo.evaluation["control"]["accuracy"],
        "reward_first": math.fsum(rewards[:few]) / few,
        "reward_last": math.fsum(rewards[-few:]) / few,
        "steps": grpo.steps,
        "seconds": round(grpo.seconds, 1),
        "run_dir": str(grpo.run_dir),
    }


def look(recipe: Recipe, folder: Path, run_dir: Path, shown: int = 60, learned: str = "GRPO") -> dict[str, Any]:
    """Draw the first held-out rows with the trained model's answers; what it says of media played backwards."""
    from ..data import load_data, to_sample
    from ..evaluate import evaluate
    from ..models import load_model
    from ..report import contact_sheet

    model, processor = load_model(str(run_dir))
    length = {"max_new_tokens": recipe.grpo["max_completion_length"]}
    rows: list[Any] = list(load_data(str(folder / "data" / _HELD_OUT), limit=shown))
    seen = evaluate(model, processor, rows, **length)
    captions = [
        answer if right else f"{answer} ({row['answer']})"
        for answer, right, row in zip(seen.answers, seen.correct, rows, strict=True)
    ]
    pictures = [recipe.picture(to_sample(row).media[0]) for row in rows]
    title = f"Held-out {recipe.rows} after {learned}"
    layout = {"columns": recipe.columns, "cell": recipe.cell}
    contact_sheet(pictures, captions, seen.correct, run_dir / "held-out.png", title=title, **layout)
    backwards = folder / "data" / "reversed.jsonl"
    if not backwards.exists():
        return {}
    return {"accuracy_reversed": evaluate(model, processor, load_data(str(backwards)), **length).accuracy}


def percent(value: float, interval: list[float] | None = None) -> str:
    """A share for a table, with its interval where there is one."""
    between = f"  [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{100 * value:.1f}%{between}"
