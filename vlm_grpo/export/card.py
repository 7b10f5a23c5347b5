"""The model card of an export, and its figures as JSON."""

from dataclasses import asdict
from pathlib import Path

from ..card import CARD, algorithm, front_matter, held_out, name_of, rewards_line, section, title
from ..config import method
from ..folder import EVALUATION, RESULT, read_json, write_json
from .report import ExportReport
from .source import Source

REPORT = "export.json"
_LIBRARY = {"lora": "peft", "gguf": "gguf"}


def write_card(folder: Path, source: Source, report: ExportReport) -> None:
    """``README.md`` and ``export.json``. No licence is claimed: whether the base's allows one is not known here."""
    write_json(folder / REPORT, asdict(report))
    library, tags = _LIBRARY.get(report.to, "transformers"), ["lora"] if report.to == "lora" else []
    # The run's own figures are of its end, so a checkpoint's card has none.
    figures = read_json(source.folder / EVALUATION) if source.run == source.folder else {}
    learns = method(source.config, source.command) if source.config is not None else source.command
    parts = [
        front_matter(source.base, library, learns, tags),
        f"# {title((source.run or source.folder).name, source.base)}",
        *section("Training", _training(source)),
        *held_out(figures),
        *section("The export, reloaded and compared with the run", _check(report)),
    ]
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _training(source: Source) -> list[str]:
    if source.config is None or source.run is None:
        return []
    config, result = source.config, read_json(source.run / RESULT)
    lines = [algorithm(config, source.command, source.is_adapter, source.in_4bit)]
    if source.command == "train":
        lines.append(rewards_line(config))
    steps = source.folder.name.rpartition("-")[2] if source.folder != source.run else result.get("steps")
    if steps is not None:
        lines.append(f"- steps: {steps}")
    if config.data.train:
        lines.append(f"- training rows: {name_of(config.data.train)}")
    return lines


def _check(report: ExportReport) -> list[str]:
    return [f"- {name}: {value}" for name, value in report.lines() if name != "output"]
