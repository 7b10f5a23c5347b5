"""Control runs: the same rows with their media blanked, exchanged or taken away. What is left is what the text says."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

from ..data import Sample, blanked, to_sample
from ..data.sample import swap_media
from ..errors import ConfigError, MediaError, nearest
from ..intake import Intake
from ..media import KINDS, Kind, Medium
from ..media.hearing import extractor_of

Control = Literal["blank", "shuffle", "text"]
CONTROLS: tuple[Control, ...] = get_args(Control)
# (number of a row from 1, its sample) to the sample that is asked instead.
Exchange = Callable[[int, Sample], Sample]
_Slot = tuple[int, int]  # a row's index, and which of its media of one kind


def exchange(control: Control, rows: Any, intake: Intake, seed: int = 0) -> Exchange:
    """What a control does to each row.

    Args:
        control: ``blank`` (black pictures and frames, silence, of the same sizes), ``shuffle`` (each row gets media of
            the same kind from another row) or ``text`` (the prompt without its media).
        rows: all rows, undecoded; ``shuffle`` takes them by index.
        intake: how they are read.
        seed: of ``shuffle``.

    Raises:
        ConfigError: no such control; or too few rows with media to exchange them, or rows that come as a stream.
    """
    if control not in CONTROLS:
        raise ConfigError(
            f'control: "{control}" is not known.{nearest(control, list(CONTROLS))} Use {", ".join(CONTROLS)}.'
        )
    if control == "blank":
        extractor = extractor_of(intake.processor)
        rate = extractor.sampling_rate if extractor else None
        return lambda _, sample: blanked(sample, intake.media, rate) if sample.media else sample
    if control == "text":
        return lambda _, sample: without_media(sample)
    return _shuffled(rows, intake, seed)


def without_media(sample: Sample) -> Sample:
    """The sample with nothing but the texts of its messages.

    Raises:
        ConfigError: its prompt is one text, to which the chat template has been applied with its media.
    """
    if not sample.media:
        return sample
    if isinstance(sample.prompt, str):
        raise ConfigError(
            f"control: the media of {sample.where or 'a row'} stand in a prompt that is one text and cannot be taken "
            "out of it. Use the control blank, or give the prompt as messages."
        )
    prompt = [
        {**message, "content": [part for part in message["content"] if part["type"] not in KINDS]}
        for message in sample.prompt
    ]
    return replace(sample, prompt=prompt, media=[])


def shuffle_plan(counts: list[int], seed: int = 0) -> list[list[_Slot]]:
    """For each row, which media of other rows it gets, as (row, which of its media); each is given once.

    Args:
        counts: how many media each row has.
        seed: of the order.

    Raises:
        ConfigError: one row has more media than all the others together, which none of them could replace.
    """
    order = list(range(len(counts)))
    random.Random(seed).shuffle(order)
    slots = [(row, which) for row in order for which in range(counts[row])]
    most = max(counts, default=0)
    if len(slots) < 2 * most:
        raise ConfigError(
            f"control: shuffle gives each row the media of others, and one row has {most} of the {len(slots)} of its "
            "kind. Use the control blank, or more rows."
        )
    # A row's slots stand side by side and are at most `most`: so many places on is another row's.
    plan: list[list[_Slot]] = [[] for _ in counts]
    for place, (row, _) in enumerate(slots):
        plan[row].append(slots[(place + most) % len(slots)])
    return plan


def _shuffled(rows: Any, intake: Intake, seed: int) -> Exchange:
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise ConfigError("control: shuffle needs all rows at hand, and these come as a stream. Use the control blank.")

    def media(index: int, kind: Kind) -> list[Medium]:
        found = to_sample(rows[index], intake.root, f"row {index + 1} of the evaluation").media
        return [medium for medium in found if medium.kind == kind]

    counts: dict[Kind, list[int]] = {kind: [0] * len(rows) for kind in KINDS}
    for index in range(len(rows)):
        try:
            found = to_sample(rows[index], intake.root).media
        except MediaError:  # the row is left out where it is read
            continue
        for medium in found:
            counts[medium.kind][index] += 1
    plans = {kind: shuffle_plan(counts[kind], seed) for kind in KINDS}

    def give(number: int, sample: Sample) -> Sample:
        given = {kind: [media(row, kind)[which] for row, which in plans[kind][number - 1]] for kind in KINDS}
        return swap_media(sample, {id(medium): given[medium.kind].pop(0) for medium in sample.media})

    return give
