"""``vlm-grpo eval``: a run or model on held-out rows, beside a baseline and controls, written down and shown."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress

from ..conversation import without_adapter
from ..errors import MediaError
from ..evaluate import Control, Evaluation, change, evaluate, figures
from ..evaluate.figures import write_rows
from ..evaluate.saving import save_rows
from ..folder import EVALUATION, EVALUATION_ROWS, write_json
from ..intake import Intake
from ..models import load_model
from ..models.families import placeholder_ids_by_kind
from ..rewards import introduce, show_model
from ..trained import config_of, template_of
from .plan import BASE, Plan, Request


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        folder: holds ``evaluation.json`` and, a line a row and state, ``evaluation.jsonl``.
        evaluation: what ``evaluation.json`` holds: ``after`` (the run), ``before`` (the baseline), ``control`` and
            further ``control:KIND``, ``change`` (from the baseline to the run) and ``settings``.
        titles: of the states.
    """

    folder: Path
    evaluation: dict[str, Any]
    titles: dict[str, str]


def evaluate_run(run: str, data: str | None = None, **options: Any) -> Report:
    """Measure a run or model on held-out rows; what is asked for is refused before a model is loaded, if at all.

    Two models are never in memory at once, and what is measured is written as soon as it is.

    Args:
        run, data: see ``Request``, as for all ``options``.

    Raises:
        ConfigError: options that cannot work, such as a baseline that does not exist.
        RewardError: a reward that cannot be resolved or called.
        DataFormatError, MediaError: rows that cannot be used.

    >>> evaluate_run("runs/first", "held-out.jsonl", baseline="base")  # doctest: +SKIP
    """
    return _Job(Plan(Request(run, data, **options))).go()


class _Job:
    """One evaluation on its way."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.yardstick = plan, plan.yardstick
        self.evaluation: dict[str, Any] = {}
        self.verdicts: dict[str, dict[int, bool]] = {}

    def go(self) -> Report:
        plan, request = self.plan, self.plan.request
        after, before = self._of_run()
        if request.baseline is not None:
            before = before or self._of_baseline(request.baseline)
            self._pair(before, after)
        if request.save_rows is not None:
            pass_rates = {row.row: row.pass_rate for row in after.rows}
            save_rows(Path(request.save_rows).expanduser(), plan.rows, pass_rates)
        return Report(plan.folder, self.evaluation, plan.titles())

    def _of_run(self) -> tuple[Evaluation, Evaluation | None]:
        """The run, its controls, and the baseline where that is the same model with its adapter off.

        The model is known to nobody afterwards: the next one takes its memory.
        """
        plan, run = self.plan, self.plan.request.run
        model, processor = load_model(run, **plan.loading(run, plan.config))
        after = self._state("after", model, processor, run)
        if not after.rows:
            raise MediaError(f"{plan.data}: no row can be used; the warnings above say why. Mend the data.")
        for number, control in enumerate(plan.controls):
            self._state("control" if number == 0 else f"control:{control}", model, processor, run, control)
        if plan.request.baseline != BASE or not isinstance(model, PeftModel):
            return after, None
        with without_adapter(model):
            return after, self._state("before", model, processor, run)

    def _of_baseline(self, name: str) -> Evaluation:
        """A baseline of its own weights."""
        plan = self.plan
        of, config = name, config_of(name)
        if name == BASE:  # before a run that trained the model itself, which was loaded as the run loaded it
            assert plan.config is not None, "the plan refused any other"
            name, of, config = plan.config.model, plan.request.run, plan.config
        self.yardstick = plan.yardstick = plan.fresh_yardstick()  # a reward model keeps the base that it stood on
        gc.collect()
        torch.cuda.empty_cache()
        model, processor = load_model(name, **plan.loading(of, config))
        return self._state("before", model, processor, name)

    def _pair(self, before: Evaluation, after: Evaluation) -> None:
        """Leave the rows that one of the two could not use out of both, and compare them."""
        both = {row.row for row in before.rows} & {row.row for row in after.rows}
        for state, found in (("before", before), ("after", after)):
            if len(found.rows) > len(both):
                self._keep(state, found.only(both))
        self.evaluation["change"] = change(self.verdicts["before"], self.verdicts["after"], self.plan.request.seed)
        self._write()

    def _state(self, state: str, model: Any, processor: Any, name: str, control: Control | None = None) -> Evaluation:
        """Measure one state of the model called ``name`` and write it down."""
        plan, request = self.plan, self.plan.request
        rewards = self.yardstick.rewards.values()
        introduce(rewards, processor=processor, media=plan.media, max_completion_length=plan.length)
        intake = self._intake(model, processor, name)
        show_model(rewards, model, template=intake.template, root=intake.root)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"{state}: {name}{f', {control}' if control else ''}", total=len(plan.rows))
            found = evaluate(
                model,
                processor,
                plan.rows,
                yardstick=self.yardstick,
                control=control,
                samples=0 if control else request.samples,
                temperature=plan.temperature,
                seed=request.seed,
                batch_size=plan.batch_size,
                max_new_tokens=plan.length,
                intake=intake,
                progress=lambda done: progress.update(task, completed=done),
                keep=request.by,
            )
        compared = change(self.verdicts["after"], found.verdicts, request.seed) if control else None
        self._keep(state, found, {"kind": control, "change": compared} if control else {})
        return found

    def _intake(self, model: Any, processor: Any, name: str) -> Intake:
        """How rows are read: as the run reads them, with the chat template as the model was trained."""
        plan = self.plan
        return Intake(
            processor,
            placeholder_ids_by_kind(model.config, processor),
            plan.media,
            None if plan.root is None else Path(plan.root).expanduser(),
            template=template_of(config_of(name) or plan.config),
            max_length=plan.config.train.get("max_prompt_length") if plan.config else None,
        )

    def _keep(self, state: str, found: Evaluation, more: dict[str, Any] | None = None) -> None:
        plan = self.plan
        plan.folder.mkdir(parents=True, exist_ok=True)
        write_rows(plan.folder / EVALUATION_ROWS, state, found)
        self.verdicts[state] = found.verdicts
        self.evaluation[state] = figures(found, plan.request.by, plan.request.labels) | (more or {})
        self._write()

    def _write(self) -> None:
        order = ["before", "after", *(key for key in self.evaluation if key.startswith("control")), "change"]
        states = {key: self.evaluation[key] for key in order if key in self.evaluation}
        self.evaluation = {**states, "settings": self.plan.settings()}
        write_json(self.plan.folder / EVALUATION, self.evaluation)
