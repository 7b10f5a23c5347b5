"""The demo of a reward model: it learns from pairs which answer about a picture is better, then GRPO learns from it.

All stand on one base, the warm start: the policy's adapter, and the reward model's with its head. None of the pictures
that GRPO asks about is in a pair, and its only reward is the reward model's score: what is right is measured beside it
and teaches nothing.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..config import RunConfig
from .models import save_tiny_model
from .preferences import CAPTIONS, HELD_OUT_PAIRS, JUDGE, PAIRS, PROMPTS, STEM, WORDS, write_preferences
from .recipes import Recipe
from .stages import continued_config, figures_of, grpo_config, look, percent, warm_config, whole

REWARD = {
    "max_steps": 300,
    "per_device_train_batch_size": 48,  # pairs
    "learning_rate": 4e-3,
    "warmup_steps": 20,
    "max_grad_norm": 1.0,
    "save_steps": 50,
    "per_device_eval_batch_size": 64,
    "gradient_checkpointing": False,
}
# A score also ranks wrong answers: a group without a right one teaches a wrong one, and the right one dies out before
# it was ever sampled. More answers a group, and the warm start's own, keep it alive.
FROM_SCORES = {"num_generations": 16, "beta": 0.05}


def from_reward_model(recipe: Recipe, folder: Path, seed: int, full: bool, console: Console) -> dict[str, Any]:
    """Warm start, a reward model without and one with captions, GRPO from the first; prints the tables."""
    from .. import run

    recipe = judged(recipe)
    warm, judge, informed = begin(recipe, folder, seed, console, 5)
    console.print("[bold]4/5[/] GRPO from the first reward model's score")
    rewards = [{"model": str(judge.run_dir)}, "accuracy=0"]
    grpo = whole(run.train(grpo_config(recipe, folder, seed, full, rewards, PROMPTS)))
    console.print("[bold]5/5[/] for comparison: the warm start continued for the same time")
    continued = whole(run.sft(continued_config(recipe, folder, seed, grpo.seconds)))
    figures = pair_figures(judge, informed) | scores_of(grpo) | figures_of(warm, grpo, continued)
    look(recipe, folder, grpo.run_dir)
    print_pairs(console, recipe, figures, judge)
    _print_table(console, recipe, figures, grpo.evaluation["after"]["rows"])
    return figures


def begin(recipe: Recipe, folder: Path, seed: int, console: Console, stages: int, **train: Any) -> tuple[Any, Any, Any]:
    """The first three of so many stages: the warm start, and two reward models; the second one also reads captions.

    ``train``: options of the reward models' training that differ.
    """
    from .. import run

    recipe.write_data(folder / "data", seed)
    recipe.save_model(folder / "model", seed)
    console.print(f"[bold]1/{stages}[/] warm start on {recipe.labels} labels")
    warm = whole(run.sft(warm_config(recipe, folder, seed)))
    console.print(f"[bold]2/{stages}[/] a reward model from pairs of a right and a wrong reading")
    judge = whole(run.reward_train(reward_config(recipe, folder, seed, **train)))
    console.print(f"[bold]3/{stages}[/] another one, that also reads captions")
    return warm, judge, whole(run.reward_train(reward_config(recipe, folder, seed, captions=True, **train)))


def judged(recipe: Recipe) -> Recipe:
    """The image demo's recipe with pairs among its rows, the judge's words, and what a score asks for."""
    own = {"save_model": partial(save_tiny_model, words=WORDS), "grpo": {**recipe.grpo, **FROM_SCORES}}
    return replace(recipe, write_data=write_preferences, **own)


def reward_config(recipe: Recipe, folder: Path, seed: int, captions: bool = False, **train: Any) -> RunConfig:
    """A reward model on the warm start's base; ``train`` holds options that differ."""
    data = folder / "data"
    judge = {"prompt": str(data / JUDGE), "stem": STEM, "captions": str(data / CAPTIONS) if captions else None}
    return RunConfig.model_validate(
        {
            "model": str(folder / "warm"),
            "lora": recipe.lora,
            "data": {"train": str(data / PAIRS), "eval": str(data / HELD_OUT_PAIRS)},
            "judge": judge,
            "output": str(folder / ("reward-model-captions" if captions else "reward-model")),
            "train": {**REWARD, **train, "seed": seed},
        }
    )


def pair_figures(judge: Any, informed: Any) -> dict[str, Any]:
    """How often each reward model scores the right reading higher, with the pictures and without."""
    found: dict[str, Any] = {}
    for result, end in ((judge, ""), (informed, "_with_captions")):
        seen, blank = result.evaluation["after"], result.evaluation["control"]
        found |= {
            f"reward_model_pair_accuracy{end}": seen["accuracy"],
            f"reward_model_pair_ci95{end}": seen["ci95"],
            f"reward_model_blanked_accuracy{end}": blank["accuracy"],
            f"reward_model_blanked_ci95{end}": blank["ci95"],
        }
    return found | {"reward_model_seconds": round(judge.seconds, 1), "reward_model_dir": str(judge.run_dir)}


def scores_of(grpo: Any) -> dict[str, float]:
    """The mean score of the held-out answers, which GRPO raises, beside their accuracy, which is the point."""
    return {f"score_{state}": grpo.evaluation[state]["reward"] for state in ("before", "after")}


def print_pairs(console: Console, recipe: Recipe, figures: dict[str, Any], judge: Any) -> None:
    seconds = figures["reward_model_seconds"]
    rows = judge.evaluation["after"]["rows"]
    title = f"{rows} held-out pairs: is the right reading scored higher? ({judge.steps} steps, {seconds:.0f} s)"
    table = Table(title=title)
    table.add_column("reward model")
    table.add_column("pair accuracy  [95% interval]", justify="right")
    table.add_column(recipe.blanked, justify="right")
    for name, end, style in (("sees the image", "", "bold green"), ("and reads a caption of it", "_with_captions", "")):
        seen = percent(figures[f"reward_model_pair_accuracy{end}"], figures[f"reward_model_pair_ci95{end}"])
        table.add_row(name, seen, percent(figures[f"reward_model_blanked_accuracy{end}"]), style=style)
    console.print(table)


def _print_table(console: Console, recipe: Recipe, figures: dict[str, Any], rows: int) -> None:
    title = f"{rows} held-out {recipe.rows}, greedy ({figures['steps']} GRPO steps, {figures['seconds']:.0f} s)"
    table = Table(title=title)
    table.add_column("model")
    table.add_column("score", justify="right")
    table.add_column("truth: accuracy  [95% interval]", justify="right")
    before = percent(figures["accuracy_before"], figures["ci95_before"])
    table.add_row(f"warm start, {recipe.labels} labels", f"{figures['score_before']:.2f}", before)
    table.add_row("warm start continued as long", "", percent(figures["accuracy_sft_only"]))
    after = percent(figures["accuracy_after"], figures["ci95_after"])
    table.add_row("after GRPO from the score", f"{figures['score_after']:.2f}", after, style="bold green")
    table.add_row(f"after GRPO, {recipe.blanked}", "", percent(figures["accuracy_control"]))
    console.print(table)
    folders = f"{figures['run_dir']}; {figures['reward_model_dir']}"
    console.print(f"report.html, curves.png, held-out.png, samples.jsonl: {folders}", highlight=False)
