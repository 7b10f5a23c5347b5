"""The demos from a correctness reward, by GRPO or by PPO: on images, videos or sounds."""

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .recipes import Recipe
from .stages import continued_config, figures_of, grpo_config, look, percent, ppo_config, warm_config, whole

_CONFIGS = {"GRPO": grpo_config, "PPO": ppo_config}


def from_correctness(
    recipe: Recipe, folder: Path, seed: int, full: bool, console: Console, learned: str = "GRPO"
) -> dict[str, Any]:
    """Warm start, GRPO or PPO (``learned``), the warm start continued for the same time; prints the table."""
    from .. import run

    recipe.write_data(folder / "data", seed)
    recipe.save_model(folder / "model", seed)
    console.print(f"[bold]1/3[/] warm start on {recipe.labels} labels")
    warm = whole(run.sft(warm_config(recipe, folder, seed)))
    console.print(f"[bold]2/3[/] {learned} from a correctness reward")
    better = whole(run.train(_CONFIGS[learned](recipe, folder, seed, full)))
    console.print("[bold]3/3[/] for comparison: the warm start continued for the same time")
    continued = whole(run.sft(continued_config(recipe, folder, seed, better.seconds)))
    figures = figures_of(warm, better, continued) | look(recipe, folder, better.run_dir, learned=learned)
    _print_table(console, recipe, figures, better.evaluation["after"]["rows"], learned)
    return figures


by_ppo = partial(from_correctness, learned="PPO")


def _print_table(console: Console, recipe: Recipe, figures: dict[str, Any], rows: int, learned: str) -> None:
    title = f"{rows} held-out {recipe.rows}, greedy ({figures['steps']} {learned} steps, {figures['seconds']:.0f} s)"
    table = Table(title=title)
    table.add_column("model")
    table.add_column("accuracy  [95% interval]", justify="right")
    table.add_row(f"warm start, {recipe.labels} labels", percent(figures["accuracy_before"], figures["ci95_before"]))
    table.add_row("warm start continued as long", percent(figures["accuracy_sft_only"]))
    table.add_row(f"after {learned}", percent(figures["accuracy_after"], figures["ci95_after"]), style="bold green")
    table.add_row(f"after {learned}, {recipe.blanked}", percent(figures["accuracy_control"]))
    if "accuracy_reversed" in figures:
        turned = percent(figures["accuracy_reversed"])
        table.add_row(f"after {learned}, {recipe.rows} reversed: the opposite", turned)
    console.print(table)
    console.print(f"report.html, curves.png, held-out.png, samples.jsonl: {figures['run_dir']}", highlight=False)
