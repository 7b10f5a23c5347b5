"""The model card of a run: data, rewards, options, results, versions, and how to load what was trained.

It names no folder of this machine, and claims no licence: whether the base model's allows one is not known here.
"""

import math
import re
import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from .config import RewardSpec, RunConfig, method
from .folder import EVALUATION, METRICS, RESULT, read_json
from .models import REWARD_MODEL, is_adapter
from .models.hf import looks_like_path
from .report import duration, read_jsonl, verdicts

CARD = "README.md"
_REWARD_TRAIN = "reward-train"
_ALGORITHMS = {
    "train": "GRPO",
    "ppo": "PPO",
    "sft": "supervised fine-tuning",
    _REWARD_TRAIN: "pairwise reward modelling",
}
_TAGS = {"train": "grpo", "ppo": "ppo", "sft": "sft", _REWARD_TRAIN: "reward-model"}
_STATES = {"before": "before training", "after": "after training", "control": "after training, media blanked"}
_OPTIONS = (
    *("seed", "learning_rate", "vision_learning_rate", "audio_learning_rate", "projector_learning_rate"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "generation_batch_size"),
    *("num_iterations", "max_prompt_length", "max_completion_length", "temperature", "top_p", "beta", "epsilon"),
    *("loss_type", "scale_rewards", "resample_dead_groups", "center_rewards_coefficient", "bf16", "fp16"),
    *("kl_coef", "kl_estimator", "kl_target", "kl_horizon", "gamma", "lam", "vf_coef", "cliprange_value"),
    *("whiten_advantages", "whiten_rewards", "normalize_scores", "score_clip", "missing_eos_penalty"),
    "value_learning_rate",
)
_OF_GROUPS = ("beta", "scale_rewards")  # which PPO has no use for
_PACKAGES = ("vlm-grpo", "torch", "transformers", "trl", "peft", "datasets")
_FEW = 10  # logs that the reward at the start and at the end is the mean of


def write_run_card(folder: Path, config: RunConfig, command: str, rows: int | None, held_out_rows: int) -> None:
    """``README.md`` of a run folder that is a model; in place of what other libraries wrote there.

    Args:
        folder: with ``result.json``, and with ``evaluation.json`` where there were held-out rows.
        config: the run's.
        command: ``train``, ``sft`` or ``reward-train``.
        rows, held_out_rows: how many were used; None of a stream.
    """
    adapter, result = is_adapter(str(folder)), read_json(folder / RESULT)
    figures, is_judge = read_json(folder / EVALUATION), command == _REWARD_TRAIN
    left_out = result.get("left_out", {})
    library = "peft" if adapter else "transformers"
    parts = [
        front_matter(config.model, library, method(config, command), ["lora"] if adapter and config.lora else []),
        f"# {title(folder.name, config.model)}",
        f"Trained by {_ALGORITHMS[method(config, command)]} with vlm-grpo {_version('vlm-grpo')}.",
        *section("What it judges", _judges(folder) if is_judge else []),
        *section("Data", _data(config, rows, held_out_rows, left_out, "pairs" if is_judge else "rows")),
        *section("Rewards", _rewards_table(config) if command == "train" else []),
        *section("Training", _training(folder, config, command, adapter, result)),
        *(_held_out_pairs(folder, figures) if is_judge else held_out(figures, _watched(config))),
        *section("Judge prompt", _judge_prompt(folder) if is_judge else []),
        *section("Versions", _versions(config)),
        *section("How to load it", (_judging if is_judge else _loading)(folder.name, config.model, adapter)),
    ]
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# ---- what an export's card has too ------------------------------------------------------------------------------


def front_matter(base: str | None, library: str, command: str | None, tags: list[str]) -> str:
    """The YAML head of a card; ``base_model`` only where it is a name that others can look up."""
    lines = ["---", f"library_name: {library}"]
    if base and not is_local(base):
        lines.append(f"base_model: {base}")
    algorithm = _TAGS.get(command or "")
    every = ["vlm-grpo", *([algorithm] if algorithm else []), *tags]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in every), "---"])


def title(name: str, base: str | None) -> str:
    """``run, from base``."""
    return f"{name}, from {name_of(base)}" if base else name


def name_of(path_or_name: str) -> str:
    """A name as others know it: of a folder or file on this machine, its last part."""
    return Path(path_or_name).name if is_local(path_or_name) else path_or_name


def is_local(name: str) -> bool:
    """Whether a name is one of this machine only."""
    return looks_like_path(name) or Path(name).exists()


def section(heading: str, lines: list[str]) -> list[str]:
    """A heading and its lines; nothing without any."""
    return [f"## {heading}", "\n".join(lines)] if lines else []


def algorithm(config: RunConfig, command: str | None, adapter: bool, in_4bit: bool) -> str:
    """``- algorithm: GRPO (4-bit base, language by LoRA, rank 16)``."""
    rank = f", rank {config.lora.r}" if config.lora else ""
    trained = f"{config.parts}{rank}" if adapter else "all weights"
    weights = "4-bit base, " if in_4bit else ""
    return f"- algorithm: {_ALGORITHMS.get(learns := method(config, command), learns)} ({weights}{trained})"


def rewards_line(config: RunConfig) -> str:
    """``- rewards: accuracy x 1, format x 0.5``; what has weight 0 is named apart."""
    named = ", ".join(f"{_reward_of(spec)} x {spec.weight:g}" for spec in config.rewards if spec.weight)
    watched = ", ".join(_reward_of(spec) for spec in config.rewards if not spec.weight)
    return f"- rewards: {named}" + (f"; only watched: {watched}" if watched else "")


def held_out(figures: dict[str, Any], watched: Collection[str] = ()) -> list[str]:
    """The section on held-out rows, from what ``evaluation.json`` holds; nothing where it is empty.

    Args:
        figures: of the file.
        watched: rewards that are no part of the reward.
    """
    states = {title: figures[key] for key, title in _STATES.items() if key in figures}
    if not states:
        return []
    rewards = list(dict.fromkeys(name for found in states.values() for name in found.get("rewards", {})))
    head = [
        "model",
        "accuracy",
        "95% interval",
        "rows",
        *(f"{'watched' if name in watched else 'reward'} {_cell(_reward(name))}" for name in rewards),
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, found in states.items():
        low, high = found["ci95"]
        means = [found.get("rewards", {}).get(reward) for reward in rewards]
        judged = found.get("unscored", 0) < found["rows"]
        accuracy = [f"{found['accuracy']:.1%}", f"{low:.1%} to {high:.1%}"] if judged else ["no verdicts", ""]
        cells = [name, *accuracy, str(found["rows"])]
        lines.append(_row([*cells, *("" if mean is None else f"{mean:.3g}" for mean in means)]))
    return section("Held-out rows", [*lines, *_change(figures, "rows")])


def _change(figures: dict[str, Any], of: str) -> list[str]:
    if not (change := figures.get("change")) or not change["rows"]:
        return []
    low, high = change["ci95"]
    points = f"{100 * change['difference']:+.1f} points (95% interval {100 * low:+.1f} to {100 * high:+.1f}"
    return ["", f"Change by training: {points}, p = {change['p']:.2g}, {change['rows']} {of})."]


# ---- a run's own ------------------------------------------------------------------------------------------------


def _data(config: RunConfig, rows: int | None, held_out_rows: int, left_out: dict[str, int], of: str) -> list[str]:
    data, lines = config.data, []
    for what, name, split, count in (
        ("training", data.train, data.split, rows),
        ("held out", data.eval, data.eval_split or data.split, held_out_rows),
    ):
        if name:
            split = "" if Path(name).suffix else f", split {split}"
            without = f", {left_out[name]} more left out for their media" if left_out.get(name) else ""
            size = "a stream" if count is None else f"{count} {of}"
            lines.append(f"- {what}: {name_of(name)}{split} ({size}{without})")
    during = {reason: count for reason, count in left_out.items() if reason not in (data.train, data.eval) and count}
    for reason, count in during.items():
        lines.append(f"- left out when their turn came: {count} times ({reason})")
    given = config.media.model_dump(exclude_defaults=True, exclude={"scan", "on_bad"})
    return [*lines, *(f"- media: {name} {value}" for name, value in given.items())]


def _rewards_table(config: RunConfig) -> list[str]:
    if not config.rewards:
        return []
    weights = (f"{spec.weight:g}" if spec.weight else "0 (only watched)" for spec in config.rewards)
    names = (_cell(_reward_of(spec)) for spec in config.rewards)
    lines = [_row([name, weight]) for name, weight in zip(names, weights, strict=True)]
    return [_row(["reward", "weight"]), _row(["---", "---"]), *lines]


def _reward(name: str) -> str:
    """``rewards.py:mine`` of a file on this machine, wherever it lies."""
    path, colon, function = name.rpartition(":")
    return f"{Path(path).name}:{function}" if colon and path.endswith(".py") else name


def _reward_of(spec: RewardSpec) -> str:
    """The reward, and the model that it asks."""
    model = spec.kwargs.get("model")
    return _reward(spec.name) + (f" ({name_of(model)})" if isinstance(model, str) else "")


def _watched(config: RunConfig) -> list[str]:
    return [spec.name.rpartition(":")[2] for spec in config.rewards if not spec.weight]


def _training(folder: Path, config: RunConfig, command: str, adapter: bool, result: dict[str, Any]) -> list[str]:
    lines = [algorithm(config, command, adapter, config.load_in_4bit and adapter)]
    if "steps" in result:
        stopped = f" (stopped: {result['stopped']})" if result.get("stopped") else ""
        lines.append(f"- steps: {result['steps']}, in {duration(result['seconds'])}{stopped}")
    rewards = [value for value in _logged(folder, "reward") if math.isfinite(value)]
    if rewards:
        few = min(_FEW, max(1, len(rewards) // 2))
        first, last = (math.fsum(part) / len(part) for part in (rewards[:few], rewards[-few:]))
        lines.append(f"- mean reward: {first:.3g} in the first {few} logs, {last:.3g} in the last {few}")
    unused = _OF_GROUPS if method(config, command) == "ppo" else ()
    told = [name for name in _OPTIONS if name not in unused]
    options = {name: value for name in told if (value := config.train.get(name)) is not None}
    table = [_row([f"`{name}`", _cell(str(value))]) for name, value in options.items()]
    return [*lines, "", _row(["option", "value"]), _row(["---", "---"]), *table]


def _logged(folder: Path, name: str) -> list[float]:
    path = folder / METRICS
    return [record[name] for record in read_jsonl(path) if record.get(name) is not None] if path.exists() else []


def _loading(name: str, base: str, adapter: bool) -> list[str]:
    lines = [
        "```python",
        "from vlm_grpo import load_model",
        "",
        f'model, processor = load_model("{name}")  # this folder',
        "```",
        "",
        f"or talk to it: `vlm-grpo chat {name}`.",
    ]
    if adapter:
        lines[-1] += f" It is an adapter over {name_of(base)}, which is needed too: `vlm-grpo export` merges the two."
    return lines


# ---- a reward model's -------------------------------------------------------------------------------------------


def _about(folder: Path) -> dict[str, Any]:
    return read_json(folder / REWARD_MODEL)


def _judges(folder: Path) -> list[str]:
    """What it is given, and what it gives."""
    reads = "the conversation with its images, videos and sounds, the response, and the judge prompt below"
    captions = ", with captions of the media, which a policy never sees" if _about(folder).get("captions") else ""
    return [
        f"A response to a prompt. It reads {reads}{captions}, and gives one number: the higher, the better. The number "
        "has no unit and no zero; only differences between responses to one prompt mean something."
    ]


def _held_out_pairs(folder: Path, figures: dict[str, Any]) -> list[str]:
    """How it judges held-out pairs, and what that says; nothing where there were none."""
    states = {title: figures[key] for key, title in _STATES.items() if key in figures}
    if not states:
        return []
    head = ["reward model", "pair accuracy", "95% interval", "pairs", "margin", "mean score", "score and length"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, found in states.items():
        low, high = found["ci95"]
        cells = [name, f"{found['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", str(found["rows"])]
        more = (found.get(key) for key in ("margin", "mean_reward", "length_correlation"))
        lines.append(_row([*cells, *("" if value is None else f"{value:.3g}" for value in more)]))
    explained = [
        "The margin is the score of the chosen response less that of the rejected one, on average; the last column is "
        "the rank correlation of a response's score and its length."
    ]
    said = [f"- {verdict.text}" for verdict in verdicts(figures, _about(folder).get("captions") is True)]
    return section("Held-out pairs", [*lines, "", *explained, *_change(figures, "pairs"), "", *said])


def _judge_prompt(folder: Path) -> list[str]:
    """The template in a block that nothing in it can close, and the judge's own first words."""
    path = folder / "judge_prompt.jinja"
    if not path.is_file():
        return []
    template, stem = path.read_text(encoding="utf-8").strip("\n"), _about(folder).get("stem")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", template)), default=0))
    begun = ["", f"The judge's turn begins with: `{stem}`"] if isinstance(stem, str) and "`" not in stem else []
    return [f"{fence}jinja", template, fence, *begun]


def _judging(name: str, base: str, adapter: bool) -> list[str]:
    """How a run or a program asks it."""
    lines = [
        "As a reward of a run:",
        "",
        "```yaml",
        f"rewards: [{{model: {name}}}]  # this folder",
        "```",
        "",
        "or in Python, where prompts are conversations that hold their media:",
        "",
        "```python",
        "from vlm_grpo.rewards.judge import JudgeReward",
        "",
        f'judge = JudgeReward("{name}")  # this folder',
        "scores = judge(prompts=prompts, completions=completions)",
        "```",
    ]
    needed = f"It is an adapter and a head over {name_of(base)}, which is needed too."
    return [*lines, "", needed] if adapter else lines


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _versions(config: RunConfig) -> list[str]:
    used = [*_PACKAGES, *(["bitsandbytes"] if config.load_in_4bit else []), *(["unsloth"] * ("unsloth" in sys.modules))]
    return [*(f"- {name} {found}" for name in used if (found := _version(name))), f"- Python {python_version()}"]
