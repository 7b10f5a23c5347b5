"""The demo of GRPO from a correctness reward: on images, videos or sounds."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .recipes import Recipe
from .stages import continued_config, figures_of, grpo_config, look, percent, warm_config, whole


def from_correctness(recipe: Recipe, folder: Path, seed: int, full: bool, console: Console) -> dict[str, Any]:
    """Warm start, GRPO, the warm start continued for the same time; prints the table."""
    from .. import run

    recipe.write_data(folder / "data", seed)
    recipe.save_model(folder / "model", seed)
    console.print(f"[bold]1/3[/] warm start on {recipe.labels} labels")
    warm = whole(run.sft(warm_config(recipe, folder, seed)))
    console.print("[bold]2/3[/] GRPO from a correctness reward")
    grpo = whole(run.train(grpo_config(recipe, folder, seed, full)))
    console.print("[bold]3/3[/] for comparison: the warm start continued for the same time")
    continued = whole(run.sft(continued_config(recipe, folder, seed, grpo.seconds)))
    figures = figures_of(warm, grpo, continued) | look(recipe, folder, grpo.run_dir)
    _print_table(console, recipe, figures, grpo.evaluation["after"]["rows"])
    return figures


def _print_table(console: Console, recipe: Recipe, figures: dict[str, Any], rows: int) -> None:
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
