"""A run's held-out rows, measured before training, after it, and after it with their media blanked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from .config import RunConfig
from .evaluate import Control, Evaluation, Yardstick, change, evaluate, figures, learned_yardstick, yardstick_of
from .evaluate.figures import read_verdicts, write_rows
from .folder import EVALUATION, EVALUATION_ROWS, is_main_process, write_json
from .rewards import introduce, show_model


class HeldOut:
    """Measures, and writes ``evaluation.json`` and ``evaluation.jsonl`` into the run folder.

    Args:
        rows: the held-out rows.
        yardstick: what answers are measured by.
        args: the run's training arguments.
    """

    def __init__(self, rows: Any, yardstick: Yardstick, args: Any) -> None:
        self.rows, self.yardstick = rows, yardstick
        self.batch_size = args.per_device_eval_batch_size
        self.length = getattr(args, "max_completion_length", None) or 64

    def before(self, trainer: Any, folder: Path, found: dict[str, Any]) -> None:
        """Measure the model as it starts; ``found`` gets the figures."""
        _record(folder, found, "before", self._measure(trainer, "held-out, before"))

    def after(self, trainer: Any, folder: Path, found: dict[str, Any]) -> None:
        """Measure the trained model, with its media and, where rows have any, without; and the change since before."""
        after = self._measure(trainer, "held-out, after")
        _record(folder, found, "after", after)
        if any(row.media for row in after.rows):
            blind = self._measure(trainer, "held-out, blank media", "blank")
            more = {"kind": "blank", "change": change(after.verdicts, blind.verdicts)}
            _record(folder, found, "control", blind, more)
        before = read_verdicts(folder / EVALUATION_ROWS, "before")
        if before:  # a run that an older version began has none
            found["change"] = change(before, after.verdicts)
            _write(folder, found)

    def _measure(self, trainer: Any, title: str, control: Control | None = None) -> Evaluation:
        rewards = self.yardstick.rewards.values()
        introduce(
            rewards,
            processor=trainer.processing_class,
            media=trainer.intake.media,
            max_completion_length=self.length,
        )
        model = trainer.accelerator.unwrap_model(trainer.model)
        show_model(rewards, model, template=trainer.intake.template, root=trainer.intake.root)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not is_main_process()) as progress:
            task = progress.add_task(title, total=len(self.rows))
            return evaluate(
                model,
                trainer.processing_class,
                self.rows,
                yardstick=self.yardstick,
                control=control,
                batch_size=self.batch_size,
                max_new_tokens=self.length,
                intake=trainer.intake,
                progress=lambda done: progress.update(task, completed=done),
            )


def run_yardstick(config: RunConfig, rewards: list[Any], learned: str | None) -> Yardstick:
    """What a run's held-out answers are measured by: its rewards, or without any the text that it learns.

    Args:
        config: the run's.
        rewards: its functions, as ``load_rewards`` gives them.
        learned: the column of the text that a warm start learns; None for ``train``.
    """
    if not rewards:
        assert learned is not None, "require() asked for a reward"
        return learned_yardstick(learned)
    found = yardstick_of(config.rewards, rewards)
    return found if learned is None else replace(found, shown_too=(learned,))


def _record(
    folder: Path, found: dict[str, Any], state: str, evaluation: Evaluation, more: dict[str, Any] | None = None
) -> None:
    """The rows first: figures of a state say that its rows are there."""
    if is_main_process():
        write_rows(folder / EVALUATION_ROWS, state, evaluation)
    found[state] = figures(evaluation) | (more or {})
    _write(folder, found)


def _write(folder: Path, found: dict[str, Any]) -> None:
    if is_main_process():
        write_json(folder / EVALUATION, found)
