"""The model card of an export, and its figures as JSON."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..folder import EVALUATION, RESULT, read_json, write_json
from ..models.hf import looks_like_path
from .report import ExportReport
from .source import Source

REPORT = "export.json"
_LIBRARY = {"lora": "peft", "gguf": "gguf"}
_ALGORITHMS = {"train": "GRPO", "sft": "supervised fine-tuning"}


def write_card(folder: Path, source: Source, report: ExportReport) -> None:
    """``README.md`` and ``export.json``. No licence is claimed: whether the base's allows one is not known here."""
    write_json(folder / REPORT, asdict(report))
    parts = [_front_matter(source, report), f"# {_title(source)}", *_training(source), *_held_out(source)]
    (folder / "README.md").write_text("\n\n".join([*parts, _check(report)]) + "\n", encoding="utf-8")


def _front_matter(source: Source, report: ExportReport) -> str:
    lines = ["---", f"library_name: {_LIBRARY.get(report.to, 'transformers')}"]
    if source.base and not _is_local(source.base):
        lines.append(f"base_model: {source.base}")
    algorithm = {"train": "grpo", "sft": "sft"}.get(source.command or "")
    tags = ["vlm-grpo", *([algorithm] if algorithm else []), *(["lora"] if report.to == "lora" else [])]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _title(source: Source) -> str:
    named = source.run or source.folder
    return f"{named.name}, from {_name(source.base)}" if source.base else named.name


def _name(path_or_name: str) -> str:
    """A name as others know it: of a folder on this machine, its last part."""
    return Path(path_or_name).name if _is_local(path_or_name) else path_or_name


def _is_local(name: str) -> bool:
    return looks_like_path(name) or Path(name).exists()


def _training(source: Source) -> list[str]:
    if source.config is None or source.run is None:
        return []
    config, result = source.config, read_json(source.run / RESULT)
    weights = "4-bit base, " if source.in_4bit else ""
    rank = f", rank {config.lora.r}" if config.lora else ""
    trained = f"{config.parts}{rank}" if source.is_adapter else "all weights"
    lines = [f"- algorithm: {_ALGORITHMS.get(source.command or '', source.command)} ({weights}{trained})"]
    if source.command == "train":
        lines.append(f"- rewards: {_rewards(config)}")
    steps = source.folder.name.rpartition("-")[2] if source.folder != source.run else result.get("steps")
    if steps is not None:
        lines.append(f"- steps: {steps}")
    if config.data.train:
        lines.append(f"- training rows: {_name(config.data.train)}")
    return ["## Training", "\n".join(lines)]


def _rewards(config: RunConfig) -> str:
    return ", ".join(f"{_name(spec.name)} x {spec.weight:g}" for spec in config.rewards)


def _held_out(source: Source) -> list[str]:
    """The run's own figures; they are of its end, so a checkpoint's card has none."""
    figures = read_json(source.folder / EVALUATION) if source.run == source.folder else {}
    if not figures:
        return []
    lines = ["| model | accuracy | 95% interval | rows |", "|---|---|---|---|"]
    titles = {"before": "before training", "after": "after training", "control": "after training, media blanked"}
    for key, title in titles.items():
        if key in figures:
            lines.append(_row(title, figures[key]))
    return ["## Held-out rows", "\n".join(lines)]


def _row(title: str, found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    return f"| {title} | {found['accuracy']:.1%} | {low:.1%} to {high:.1%} | {found['rows']} |"


def _check(report: ExportReport) -> str:
    lines = [f"- {name}: {value}" for name, value in report.lines() if name != "output"]
    return "## The export, reloaded and compared with the run\n\n" + "\n".join(lines)
