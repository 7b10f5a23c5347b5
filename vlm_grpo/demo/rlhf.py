"""The demo of the whole chain of LLaVA-RLHF: warm start, reward models from pairs, PPO that climbs their score.

It climbs the score of one that sees the pictures, and of another one that also reads what is in them; what is true is
measured beside both and teaches nothing.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .judging import begin, judged, pair_figures, print_pairs, scores_of
from .preferences import CAPTIONS, PROMPTS, write_preferences
from .recipes import Recipe
from .stages import continued_config, figures_of, look, percent, ppo_config, whole

JUDGE_STEPS = 420  # with a sixth more rows than the reward model's demo has
# A score goes from -10 to 10, and a KL is of a nat or so.
FROM_SCORES = {"normalize_scores": True, "kl_coef": 0.2}


def from_preferences(recipe: Recipe, folder: Path, seed: int, full: bool, console: Console) -> dict[str, Any]:
    """Warm start, a reward model without and one with captions, PPO from each; prints the tables."""
    from .. import run

    # With captions a judge that never saw silence rejected liked it better than a word, and PPO found that out.
    pairs = partial(write_preferences, silent=True)
    recipe = replace(judged(recipe), write_data=pairs, ppo={**recipe.ppo, **FROM_SCORES})
    warm, judge, informed = begin(recipe, folder, seed, console, 6, max_steps=JUDGE_STEPS)
    console.print("[bold]4/6[/] PPO from the first reward model's score")
    given: list[Any] = [{"model": str(judge.run_dir)}, "accuracy=0"]
    ppo = whole(run.train(ppo_config(recipe, folder, seed, full, given, PROMPTS)))
    console.print("[bold]5/6[/] PPO from the score of the one that reads captions")
    given = [{"model": str(informed.run_dir), "captions": str(folder / "data" / CAPTIONS)}, "accuracy=0"]
    other = whole(run.train(ppo_config(recipe, folder, seed, full, given, PROMPTS, "ppo-captions")))
    console.print("[bold]6/6[/] for comparison: the warm start continued for the same time")
    continued = whole(run.sft(continued_config(recipe, folder, seed, ppo.seconds)))
    figures = pair_figures(judge, informed) | scores_of(ppo) | figures_of(warm, ppo, continued) | _with_captions(other)
    look(recipe, folder, ppo.run_dir, learned="PPO")
    print_pairs(console, recipe, figures, judge)
    _print_table(console, recipe, figures, ppo.evaluation["after"]["rows"])
    return figures


def _with_captions(ppo: Any) -> dict[str, Any]:
    after = ppo.evaluation["after"]
    scores = {f"{name}_with_captions": value for name, value in scores_of(ppo).items()}
    return scores | {
        "accuracy_after_with_captions": after["accuracy"],
        "ci95_after_with_captions": after["ci95"],
        "run_dir_with_captions": str(ppo.run_dir),
    }


def _print_table(console: Console, recipe: Recipe, figures: dict[str, Any], rows: int) -> None:
    title = f"{rows} held-out {recipe.rows}, greedy ({figures['steps']} PPO steps, {figures['seconds']:.0f} s)"
    table = Table(title=title)
    for name in ("model", "score", "truth: accuracy  [95% interval]"):
        table.add_column(name, justify="left" if name == "model" else "right")
    before = percent(figures["accuracy_before"], figures["ci95_before"])
    table.add_row(f"warm start, {recipe.labels} labels", f"{figures['score_before']:.2f}", before)
    table.add_row("warm start continued as long", "", percent(figures["accuracy_sft_only"]))
    for name, end in (("after PPO from the score", ""), ("from that of the one with captions", "_with_captions")):
        truth = percent(figures[f"accuracy_after{end}"], figures[f"ci95_after{end}"])
        table.add_row(name, f"{figures[f'score_after{end}']:.2f}", truth, style="bold green")
    table.add_row(f"after PPO, {recipe.blanked}", "", percent(figures["accuracy_control"]))
    console.print(table)
    folders = "; ".join(figures[name] for name in ("run_dir", "run_dir_with_captions", "reward_model_dir"))
    console.print(f"report.html, curves.png, held-out.png, samples.jsonl: {folders}", highlight=False)
