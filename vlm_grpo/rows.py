"""The rows of a batch for a trainer: read and encoded once a prompt, and what takes the place of one that is unfit."""

import random
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from .carry import Prompt, Row, Text
from .data import as_canonical, undecoded
from .intake import Intake
from .models.families import placeholder_ids_by_kind

# Rows tried in the place of one that cannot be used; more bad rows than good ones is a dataset to look at.
_MOST_TRIED = 100


def readable(dataset: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """A dataset object in the canonical form, its media undecoded; and the features that ``decoded`` restores."""
    dataset, pictures = undecoded(dataset)
    return as_canonical(dataset, name), pictures


def candidates(trainer: Any, row: dict[str, Any], others: list[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """The row, and what takes its place where it cannot be used: the same on every rank and after a resume.

    Args:
        trainer: whose dataset the others are drawn from; never a training row in an evaluation.
        row: the row itself.
        others: those of its batch, where the dataset is streamed.
        where: seeds the drawing, beside the run's seed and step.
    """
    yield row
    rows = trainer.train_dataset if trainer.model is None or trainer.model.training else trainer.eval_dataset
    pool: Any = rows if isinstance(rows, Dataset) else others
    draw = random.Random(f"{trainer.args.seed}/{trainer.state.global_step}/{where}")
    for _ in range(_MOST_TRIED):
        yield pool[draw.randrange(len(pool))]


def make_intake(trainer: Any) -> Intake:
    """How a GRPO trainer reads its rows: its processor and template, its media options, its limits."""
    template = {"chat_template": trainer.chat_template} if trainer.chat_template is not None else {}
    return Intake(
        trainer.processing_class,
        placeholder_ids_by_kind(trainer.model.config, trainer.processing_class),
        trainer.media,
        trainer.media_root,
        tools=trainer.tools,
        template={**template, **trainer.chat_template_kwargs},
        max_length=trainer.args.max_prompt_length,
        on_overlong=trainer.args.on_overlong,
        seed=trainer.args.seed,
    )


def encoded_rows(trainer: Any, inputs: list[dict[str, Any]]) -> list[Row]:
    """TRL's view of each row. The G rows of a group are adjacent and share one sample and one encoding."""
    train = trainer.model.training
    group = trainer.num_generations if train else trainer.num_generations_eval
    first = trainer.accelerator.process_index * len(inputs)  # TRL's global position of this rank's first row
    epoch = int(trainer.state.epoch or 0) if train else None
    left_out = trainer.intake.left_out.total()
    rows: list[Row] = []
    for position, original in enumerate(inputs, first):
        row = Row()
        if rows and position % group:
            row.original, row.sample, row.encoding = rows[-1].original, rows[-1].sample, rows[-1].encoding
        else:
            some = candidates(trainer, original, inputs, f"{trainer._step}/{position // group}")
            where = f"row {position} of the batch"
            row.original, row.sample, row.encoding = trainer.intake.read_one_of(some, where, epoch)
        row["prompt"] = prompt = (Text if isinstance(row.sample.prompt, str) else Prompt)(row.sample.prompt)
        prompt.encoding = row.encoding
        trainer.numbers.said.samples[row.encoding] = row.sample
        rows.append(row)
    if trainer.media.on_bad == "drop" or trainer.args.max_prompt_length is not None:
        replaced = trainer.intake.left_out.total() - left_out
        trainer._metrics["train" if train else "eval"]["rows/left_out"].append(float(replaced))
    return rows
