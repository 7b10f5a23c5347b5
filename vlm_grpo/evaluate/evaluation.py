"""``evaluate``: a model's answers to held-out rows, each measured by every reward."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..data import Sample, decoded, to_sample, undecoded
from ..encode import EncodedPrompt
from ..errors import ConfigError, EncodingError, MediaError, OverlongError
from ..intake import Intake
from ..models.families import placeholder_ids_by_kind
from ..models.modes import inference_mode
from ..randomness import same_random_states
from ..rewards.accuracy import accuracy
from .answering import completion_tokens, decoded_texts, drawn_tokens
from .controls import Control, Exchange, exchange
from .scoring import Reward, Value, Waiter, Yardstick, judged, waiting
from .statistics import wilson


@dataclass(frozen=True)
class Answered:
    """One row and what the model made of it.

    Attributes:
        row: its number, from 1.
        prompt: as text, with the labels of the media in their places.
        media: those labels.
        completion: the greedy answer.
        rewards: its value by each reward: a number, None (not applicable), or ``Failed``.
        total: the weighted sum; None where a reward failed, or none applies.
        correct: whether the answer is right; None without a verdict.
        truth: what the row gives as the right answer, or None.
        drawn: answers drawn at a temperature.
        drawn_correct: whether each of them is right.
        columns: those that were to be kept.
    """

    row: int
    prompt: str
    media: list[str]
    completion: str
    rewards: dict[str, Value]
    total: float | None
    correct: bool | None
    truth: Any = None
    drawn: tuple[str, ...] = ()
    drawn_correct: tuple[bool | None, ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def pass_rate(self) -> float | None:
        """The share of drawn answers that are right, of the greedy one where none was drawn; None without verdict."""
        verdicts = [right for right in self.drawn_correct or (self.correct,) if right is not None]
        return sum(verdicts) / len(verdicts) if verdicts else None


@dataclass(frozen=True)
class Evaluation:
    """What a model answered on held-out rows.

    Attributes:
        rows: each row that could be used.
        left_out: rows that could not; they count for nothing.
    """

    rows: list[Answered]
    left_out: int = 0

    @property
    def answers(self) -> list[str]:
        """The greedy completions, in row order."""
        return [row.completion for row in self.rows]

    @property
    def correct(self) -> list[bool]:
        """Per row; a row without a verdict is not right."""
        return [bool(row.correct) for row in self.rows]

    @property
    def verdicts(self) -> dict[int, bool]:
        """By number of the row, whether its answer is right, where there is a verdict."""
        return {row.row: row.correct for row in self.rows if row.correct is not None}

    @property
    def accuracy(self) -> float:
        """The share of right answers among rows with a verdict."""
        return sum(self.correct) / max(1, len(self.verdicts))

    @property
    def ci95(self) -> tuple[float, float]:
        """The Wilson 95% interval of the accuracy."""
        return wilson(sum(self.correct), len(self.verdicts))

    def only(self, rows: set[int]) -> "Evaluation":
        """The evaluation of some of the rows; the others count as left out."""
        kept = [row for row in self.rows if row.row in rows]
        return replace(self, rows=kept, left_out=self.left_out + len(self.rows) - len(kept))


def evaluate(
    model: Any,
    processor: Any,
    rows: Any,
    *,
    score: Reward = accuracy,
    yardstick: Yardstick | None = None,
    blank: bool = False,
    control: Control | None = None,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    template: dict[str, Any] | None = None,
    intake: Intake | None = None,
    progress: Callable[[int], None] | None = None,
    shown_too: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> Evaluation:
    """Answer every row greedily and measure the answers.

    Args:
        model: in any mode; its mode is restored.
        processor: the model's.
        rows: dataset rows; never trained on, or the figures mean nothing.
        score: a reward function, called as the trainer calls it; a row counts as right when it returns 1 or more.
        yardstick: several rewards, and what is right by them, in place of ``score``.
        blank: the same as ``control="blank"``.
        control: what happens to the media: black pictures and frames and silence in their place (``blank``), those of
            another row (``shuffle``), or none at all (``text``). What is left is what the text gives away.
        samples: so many further answers of each row, drawn from the model's whole distribution; only whether they are
            right is measured.
        temperature: of the drawn answers.
        seed: of the drawn answers and of ``shuffle``. The caller's random states stay as they were, whatever rewards
            draw.
        batch_size: rows per ``generate`` call, and drawn answers.
        max_new_tokens: length limit of an answer.
        template: keyword arguments of the chat template, as in training (``chat_template_kwargs``).
        intake: how rows are read, and what happens to those that cannot be; by default one that stops at them.
        progress: called with the number of rows done after each batch.
        shown_too: columns that ``score`` reads though TRL keeps them from rewards, such as ``completion``.
        keep: columns that ``Answered.columns`` is to hold.

    Raises:
        MediaError, EncodingError, OverlongError: a row cannot be used and the intake leaves none out.
        ConfigError: a control that these rows do not allow.
    """
    if samples < 0 or not temperature > 0:
        raise ConfigError(
            f"evaluate: samples={samples}, temperature={temperature}: answers are drawn at a temperature above 0, and "
            "not fewer than none. Correct them."
        )
    name = getattr(score, "__name__", type(score).__name__)
    asked = _Asking(
        model,
        processor,
        intake or Intake(processor, placeholder_ids_by_kind(model.config, processor), template=template),
        yardstick or Yardstick({name: score}, shown_too=tuple(shown_too)),
        max_new_tokens,
        samples,
        {"temperature": temperature, "seed": seed, "batch_size": batch_size},
        tuple(keep),
    )
    rows, pictures = undecoded(rows)
    control = control or ("blank" if blank else None)
    change = exchange(control, rows, asked.intake, seed) if control else None
    found: list[Answered] = []
    done = 0
    with same_random_states(), inference_mode(model), waiting() as wait:
        for batch in batches(rows, batch_size):
            read = _read(asked.intake, batch, done, change)
            done += len(batch)
            if read:
                found += asked.answered(read, pictures, wait, shows_sample=control == "shuffle")
            if progress is not None:
                progress(done)
    return Evaluation(found, done - len(found))


@dataclass(frozen=True)
class _Read:
    """A row that can be used: its number, as it is, as it was read, and as the model is asked."""

    number: int
    row: dict[str, Any]
    sample: Sample
    asked: Sample
    encoding: EncodedPrompt

    @property
    def seen(self) -> EncodedPrompt | None:
        """The encoding of the row as it is; None where the model is asked another one."""
        return self.encoding if self.asked is self.sample else None


@dataclass(frozen=True)
class _Asking:
    """A model, and how it is asked and measured."""

    model: Any
    processor: Any
    intake: Intake
    yardstick: Yardstick
    max_new_tokens: int
    samples: int
    drawing: dict[str, Any]
    keep: tuple[str, ...]

    def answered(self, read: list[_Read], pictures: dict[str, Any], wait: Waiter, shows_sample: bool) -> list[Answered]:
        """One batch."""
        from ..callbacks import transcript

        encodings = [item.encoding for item in read]
        ids = completion_tokens(self.model, self.processor, encodings, self.max_new_tokens)
        texts = decoded_texts(self.processor, ids)
        shown = [decoded(item.row, pictures) for item in read]
        yard = self.yardstick
        # The samples as they were read: what a reward is given, and sees, does not hang on the control.
        given = [item.sample for item in read]
        values = judged(yard.rewards, yard.shown_too, shown, given, texts, ids, wait, [item.seen for item in read])
        drawn = self._drawn(read, encodings, shown, wait)
        said = [item.asked if shows_sample else item.sample for item in read]
        return [
            Answered(
                item.number,
                transcript(sample.prompt)[0],
                [medium.label for medium in sample.media],
                text,
                value,
                yard.total(value),
                yard.is_right(value[yard.judge]),
                item.row.get(yard.truth),
                *more,
                columns={name: item.row.get(name) for name in self.keep},
            )
            for item, sample, text, value, more in zip(read, said, texts, values, drawn, strict=True)
        ]

    def _drawn(
        self, read: list[_Read], encodings: list[EncodedPrompt], shown: list[dict[str, Any]], wait: Waiter
    ) -> list[tuple[tuple[str, ...], tuple[bool | None, ...]]]:
        """Of each row, its drawn answers and whether they are right."""
        k, yard = self.samples, self.yardstick
        if k == 0:
            return [((), ())] * len(read)
        drawing = {**self.drawing, "seed": self.drawing["seed"] + read[0].number}
        groups = drawn_tokens(self.model, self.processor, encodings, self.max_new_tokens, k, **drawing)
        ids = [tokens for group in groups for tokens in group]
        texts = decoded_texts(self.processor, ids)
        rows = [row for row in shown for _ in range(k)]
        given = [item.sample for item in read for _ in range(k)]
        judge = {yard.judge: yard.rewards[yard.judge]}
        seen = [item.seen for item in read for _ in range(k)]
        values = judged(judge, yard.shown_too, rows, given, texts, ids, wait, seen)
        right = [yard.is_right(value[yard.judge]) for value in values]
        starts = range(0, len(texts), k)
        return [(tuple(texts[start : start + k]), tuple(right[start : start + k])) for start in starts]


def _read(intake: Intake, batch: list[dict[str, Any]], done: int, change: Exchange | None) -> list[_Read]:
    """The rows that can be used, as samples and encodings."""
    out = []
    for number, row in enumerate(batch, done + 1):
        try:
            sample = to_sample(row, intake.root, f"row {number} of the evaluation")
            asked = change(number, sample) if change else sample
            encoding = intake.encode(asked)
        except (MediaError, EncodingError, OverlongError) as error:
            intake.leave_out(error)
            continue
        out.append(_Read(number, row, sample, asked, encoding))
    return out


def batches(rows: Any, size: int) -> Iterator[list[dict[str, Any]]]:
    """The rows in lists of ``size``, the last one perhaps shorter."""
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
