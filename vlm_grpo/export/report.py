"""The figures of an export, and what they must be for it to be kept."""

import math
from dataclasses import dataclass, field

from ..errors import ExportError
from .probe import Probe, equal_answers, forks, largest, share

# An export that holds less of the adapter's change than this answers like the base model.
_LEAST_SHARE = 0.5


@dataclass
class ExportReport:
    """What was exported, and how it compares with the run. Differences are of logits, the largest of all.

    Attributes:
        run, to, output: what, as what, and where.
        base: the model that the run was trained from.
        saved_by: what wrote the weights.
        dtype: of the stored weights that are not 4-bit.
        rows: how many rows were compared, and ``rows_from`` where they are from.
        answers_equal: rows with the same greedy answer as the run's, token by token.
        difference: export and run.
        tolerance: the most that ``difference`` may be, and ``tolerance_is`` why.
        effect: run and base: what the adapter does.
        base_answers_equal: rows that the base answers as the run does.
        share: how much of the adapter's change of the logits is in the export; 1 is all of it.
        trained_answers_equal, trained_difference: the same against the run over the 4-bit weights that it was trained
            with, where the export was compared with the run over 16-bit ones.
        gguf_answers_equal: rows that llama.cpp answers as the run does; None where it was not asked.
        notes: what else there is to know.
    """

    run: str
    to: str
    output: str
    base: str | None
    saved_by: str = ""
    dtype: str = ""
    rows: int = 0
    rows_from: str = ""
    answers_equal: int = 0
    difference: float = math.nan
    tolerance: float = math.nan
    tolerance_is: str = ""
    effect: float | None = None
    base_answers_equal: int | None = None
    share: float | None = None
    trained_answers_equal: int | None = None
    trained_difference: float | None = None
    gguf_answers_equal: int | None = None
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[tuple[str, str]]:
        """The report as a table: names and values."""
        found = [
            ("output", self.output),
            ("saved by", f"{self.saved_by}, {self.dtype}"),
            ("compared on", f"{self.rows} rows, {self.rows_from}"),
            ("answers equal", f"{self.answers_equal} of {self.rows}"),
            ("logits, export to run", f"{self.difference:.3g} at most, tolerance {self.tolerance:.3g}"),
            ("the tolerance", self.tolerance_is),
        ]
        if self.effect is not None:
            found.append(("logits, run to base", f"{self.effect:.3g} at most: what the training changed"))
            found.append(("base's answers equal", f"{self.base_answers_equal} of {self.rows}"))
        if self.share is not None:
            found.append(("of that change in it", f"{self.share:.1%}"))
        if self.trained_difference is not None:
            found.append(("to the run in 4-bit", f"{self.trained_difference:.3g} at most"))
            found.append(("answers equal to its", f"{self.trained_answers_equal} of {self.rows}"))
        if self.gguf_answers_equal is not None:
            found.append(("llama.cpp's answers", f"{self.gguf_answers_equal} of {self.rows} equal"))
        return [*found, *(("note", note) for note in self.notes)]


def check_effect(run: Probe, base: Probe, report: ExportReport) -> None:
    """Put down what the training changed; ``ExportError`` if that is nothing at all."""
    report.effect, report.base_answers_equal = largest(run, base), equal_answers(run, base)
    if report.effect == 0:
        raise ExportError(
            f"{report.run}: the run answers exactly like its base model {report.base} on {report.rows} rows (the "
            "logits are equal): the adapter has no effect. Nothing was exported; train it, or give another folder."
        )


def check_export(export: Probe, run: Probe, report: ExportReport, bases: tuple[Probe, Probe] | None) -> None:
    """Put down how the export compares with the run.

    Args:
        export: the export, fed with the run's answers.
        run: the run, over weights of the same kind as far as that can be.
        report: its tolerance is known.
        bases: the base of the run, and the base in the form of the export, where there is one.

    Raises:
        ExportError: it is not the run, and how.
    """
    report.difference, report.answers_equal = largest(export, run), equal_answers(export, run)
    if bases is not None:
        base, export_base = bases
        report.share = share(export, export_base, run, base)
        if not report.share >= _LEAST_SHARE:
            raise ExportError(_like_base(export, base, report))
    if not report.difference <= report.tolerance:
        raise ExportError(
            f"The export differs from the run: logits by up to {report.difference:.3g}, where rounding explains "
            f"{report.tolerance:.3g} ({report.answers_equal} of {report.rows} answers are equal). It was not kept; "
            f"{_OTHERWISE}"
        )
    gaps = dict(forks(run, export))
    for row, gap in gaps.items():
        if not gap <= 2 * report.tolerance:
            raise ExportError(
                f"The export answers row {row} otherwise, though its logits are the run's: its generation settings or "
                f"end tokens differ. It was not kept; {_OTHERWISE}"
            )
    if gaps:
        report.notes.append(
            f"where answers differ, the run finds both tokens about as likely (logits {max(gaps.values()):.3g} apart "
            "at most)"
        )


_OTHERWISE = 'try --backend hf, or use the adapter itself ("--to lora").'


def _like_base(export: Probe, base: Probe, report: ExportReport) -> str:
    assert report.effect is not None and report.share is not None, "check_effect comes first"
    if report.effect <= report.tolerance:
        return (
            f"{report.run}: the adapter changes logits by {report.effect:.3g} at most, less than rounding the "
            f"weights may ({report.tolerance:.3g}): the export answers like the base model. It was not kept; train on, "
            'or use the adapter itself ("--to lora").'
        )
    return (
        f"The export answers like the base model {report.base}: {max(report.share, 0):.0%} of what the adapter changes "
        f"is in it (logits differ from the run's by up to {report.difference:.3g}, from the base's by up to "
        f"{largest(export, base):.3g}): the adapter was not merged. It was not kept; {_OTHERWISE}"
    )
