"""A reward model's held-out pairs, judged before training, after it, and after it with their media blanked."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ..config import MediaOptions
from ..errors import DataFormatError
from ..evaluate.figures import read_verdicts, write_records
from ..folder import EVALUATION, EVALUATION_ROWS, is_main_process, write_json
from ..report import MediaFolder
from .figures import figures, pair_change, record, verdicts
from .judging import PairEvaluation, judge_pairs


class HeldOutPairs:
    """Judges, and writes ``evaluation.json`` and ``evaluation.jsonl`` into the run folder.

    Args:
        rows: the held-out pairs, as ``as_pairs`` gives them.
        args: the run's training arguments.
    """

    def __init__(self, rows: Any, args: Any) -> None:
        self.rows, self.batch_size = rows, args.per_device_eval_batch_size
        self._previews: MediaFolder | None = None

    def before(self, trainer: Any, folder: Path, found: dict[str, Any]) -> None:
        """Judge with the model as it starts; ``found`` gets the figures.

        Raises:
            DataFormatError: no pair can be used.
        """
        before = self._judge(trainer, "held-out pairs, before")
        if not before.rows:
            raise DataFormatError(
                f"None of the {before.left_out} held-out pairs can be used; each says why above. Mend them, or leave "
                "data.eval out."
            )
        self._record(trainer, folder, found, "before", before)

    def after(self, trainer: Any, folder: Path, found: dict[str, Any]) -> None:
        """Judge with the trained model, with the media and, where rows have any, without; and the change since before.

        The change is the first that is put down where there were figures before: what reads the file needs no rows.
        """
        after = self._judge(trainer, "held-out pairs, after")
        before = read_verdicts(folder / EVALUATION_ROWS, "before")
        if before:
            found["change"] = pair_change(before, verdicts(after))
        self._record(trainer, folder, found, "after", after)
        if any(row.media for row in after.rows):
            blind = self._judge(trainer, "held-out pairs, blank media", blank=True)
            more: dict[str, Any] = {"kind": "blank", "change": pair_change(verdicts(after), verdicts(blind))}
            if trainer.captions is not None:
                more["captions"] = True
            self._record(trainer, folder, found, "control", blind, more)

    def _judge(self, trainer: Any, title: str, blank: bool = False) -> PairEvaluation:
        with Progress(console=Console(stderr=True), transient=True, disable=not is_main_process()) as progress:
            task = progress.add_task(title, total=len(self.rows))
            return judge_pairs(
                trainer.scorer(pairs=self.batch_size),
                self.rows,
                processor=trainer.processing_class,
                intake=trainer.intake,
                judge=trainer.judge,
                captions=trainer.captions,
                blank=blank,
                seed=trainer.args.seed,
                batch_size=self.batch_size,
                progress=lambda done: progress.update(task, completed=done),
            )

    def _record(
        self,
        trainer: Any,
        folder: Path,
        found: dict[str, Any],
        state: str,
        evaluation: PairEvaluation,
        more: dict[str, Any] | None = None,
    ) -> None:
        """The rows first: figures of a state say that its rows are there."""
        found[state] = figures(evaluation) | (more or {})
        if not is_main_process():
            return
        files = self._files(folder, trainer.intake.media, evaluation)
        records = [record(state, row, kept) for row, kept in zip(evaluation.rows, files, strict=True)]
        write_records(folder / EVALUATION_ROWS, state, records)
        write_json(folder / EVALUATION, found)

    def _files(self, folder: Path, options: MediaOptions, evaluation: PairEvaluation) -> list[list[dict[str, str]]]:
        """Small copies of the media of the first rows, for the report."""
        if self._previews is None:
            self._previews = MediaFolder(folder, options)
            self._previews.begin(1.0)
        return self._previews.keep([row.media for row in evaluation.rows])
