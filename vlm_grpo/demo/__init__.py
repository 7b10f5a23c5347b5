"""The main job on embedded defaults: a tiny model learns by GRPO to read digits, to see motion or to hear words.

Everything is real but small: scanned digits, clips of them that move, or spoken words as files; a model built here
with random weights; a supervised warm start on few labels; then GRPO from a correctness reward alone on the other
rows. This package writes the data, the model and the configs; ``run.py`` does the rest, exactly as for a user's run.
"""

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..config import RunConfig
from ..errors import ConfigError
from .digits import DIGITS, QUESTION, write_digits
from .models import save_tiny_model
from .recipes import RECIPES, Recipe

__all__ = ["DIGITS", "QUESTION", "RECIPES", "demo", "save_tiny_model", "write_digits"]


def demo(
    modality: str = "image", seed: int = 0, output: str | None = None, as_json: bool = False, full: bool = False
) -> dict[str, Any]:
    """Warm start, GRPO, the warm start continued for the same time, and a table of held-out figures.

    Args:
        modality: ``image`` (which digit), ``video`` (which way a digit moves) or ``audio`` (which word).
        seed: of the weights, the choice of labels and all sampling; the held-out rows are always the same.
        output: folder for data, model and runs; by default ``runs/demo-MODALITY-SEED``.
        as_json: print one JSON object as the last line of stdout.
        full: train all weights by GRPO instead of a LoRA adapter.

    Returns:
        the object that ``as_json`` prints.

    Raises:
        ConfigError: no such modality, or its data need a package that is missing.
    """
    from .. import run

    recipe = RECIPES.get(modality)
    if recipe is None:
        raise ConfigError(f'demo: there is no modality "{modality}". Use {", ".join(RECIPES)}.')
    folder = Path(output or f"runs/demo-{modality}-{seed}")
    console = Console(stderr=as_json)
    recipe.write_data(folder / "data", seed)
    recipe.save_model(folder / "model", seed)
    console.print(f"[bold]1/3[/] warm start on {recipe.labels} labels")
    warm = _whole(run.sft(warm_config(recipe, folder, seed)))
    console.print("[bold]2/3[/] GRPO from a correctness reward")
    grpo = _whole(run.train(grpo_config(recipe, folder, seed, full)))
    console.print("[bold]3/3[/] for comparison: the warm start continued for the same time")
    continued = _whole(run.sft(continued_config(recipe, folder, seed, grpo.seconds)))
    figures = _figures(modality, seed, warm, grpo, continued) | _look(recipe, folder, grpo.run_dir)
    _print_table(console, recipe, figures, grpo.evaluation["after"]["rows"])
    if as_json:
        print(json.dumps(figures))
    return figures


def _whole(result: Any) -> Any:
    """The result of a stage that nobody interrupted; the same demo again goes on with one that was."""
    if result.stopped in ("Ctrl-C", "SIGTERM"):
        raise KeyboardInterrupt
    return result


def warm_config(recipe: Recipe, folder: Path, seed: int) -> RunConfig:
    """The supervised warm start."""
    return RunConfig.model_validate(
        {
            "model": str(folder / "model"),
            "data": {"train": str(folder / "data" / "labels.jsonl"), "eval": str(folder / "data" / "held-out.jsonl")},
            "rewards": ["accuracy"],
            "output": str(folder / "warm"),
            "train": {**recipe.warm, "seed": seed},
        }
    )


def grpo_config(recipe: Recipe, folder: Path, seed: int, full: bool) -> RunConfig:
    """GRPO on the rows whose labels only the reward sees."""
    return RunConfig.model_validate(
        {
            "model": str(folder / "warm"),
            "lora": None if full else recipe.lora,
            "data": {"train": str(folder / "data" / "train.jsonl"), "eval": str(folder / "data" / "held-out.jsonl")},
            "rewards": ["accuracy"],
            "output": str(folder / "grpo"),
            "train": {**recipe.grpo, "seed": seed, **(recipe.full if full else {})},
        }
    )


def continued_config(recipe: Recipe, folder: Path, seed: int, seconds: float) -> RunConfig:
    """The warm start, gone on with for as long as GRPO took."""
    config = warm_config(recipe, folder, seed).model_dump()
    config |= {"model": str(folder / "warm"), "output": str(folder / "continued"), "max_minutes": seconds / 60}
    config["train"] |= {"max_steps": 100_000, "save_steps": 100_000}
    return RunConfig.model_validate(config)


def _figures(modality: str, seed: int, warm: Any, grpo: Any, continued: Any) -> dict[str, Any]:
    """The JSON object: held-out accuracies with 95% intervals, and the reward of the first and last steps."""
    from ..report import read_jsonl

    rewards = [record["reward"] for record in read_jsonl(grpo.run_dir / "metrics.jsonl") if "reward" in record]
    few = max(1, len(rewards) // 15)
    before, after = warm.evaluation["after"], grpo.evaluation["after"]
    return {
        "modality": modality,
        "algorithm": "grpo",
        "seed": seed,
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


def _look(recipe: Recipe, folder: Path, run_dir: Path, shown: int = 60) -> dict[str, Any]:
    """Draw the first held-out rows with the trained model's answers; what it says of media played backwards."""
    from ..data import load_data, to_sample
    from ..evaluate import evaluate
    from ..models import load_model
    from ..report import contact_sheet

    model, processor = load_model(str(run_dir))
    length = {"max_new_tokens": recipe.grpo["max_completion_length"]}
    rows: list[Any] = list(load_data(str(folder / "data" / "held-out.jsonl"), limit=shown))
    seen = evaluate(model, processor, rows, **length)
    captions = [
        answer if right else f"{answer} ({row['answer']})"
        for answer, right, row in zip(seen.answers, seen.correct, rows, strict=True)
    ]
    pictures = [recipe.picture(to_sample(row).media[0]) for row in rows]
    title = f"Held-out {recipe.rows} after GRPO"
    layout = {"columns": recipe.columns, "cell": recipe.cell}
    contact_sheet(pictures, captions, seen.correct, run_dir / "held-out.png", title=title, **layout)
    backwards = folder / "data" / "reversed.jsonl"
    if not backwards.exists():
        return {}
    return {"accuracy_reversed": evaluate(model, processor, load_data(str(backwards)), **length).accuracy}


def _print_table(console: Console, recipe: Recipe, figures: dict[str, Any], rows: int) -> None:
    def percent(value: float, interval: list[float] | None = None) -> str:
        between = f"  [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
        return f"{100 * value:.1f}%{between}"

    title = f"{rows} held-out {recipe.rows}, greedy ({figures['steps']} GRPO steps, {figures['seconds']:.0f} s)"
    table = Table(title=title)
    table.add_column("model")
    table.add_column("accuracy  [95% interval]", justify="right")
    table.add_row(f"warm start, {recipe.labels} labels", percent(figures["accuracy_before"], figures["ci95_before"]))
    table.add_row("warm start continued as long", percent(figures["accuracy_sft_only"]))
    table.add_row("after GRPO", percent(figures["accuracy_after"], figures["ci95_after"]), style="bold green")
    table.add_row(f"after GRPO, {recipe.blanked}", percent(figures["accuracy_control"]))
    if "accuracy_reversed" in figures:
        table.add_row(f"after GRPO, {recipe.rows} reversed: the opposite", percent(figures["accuracy_reversed"]))
    console.print(table)
    console.print(f"report.html, curves.png, held-out.png, samples.jsonl: {figures['run_dir']}", highlight=False)
