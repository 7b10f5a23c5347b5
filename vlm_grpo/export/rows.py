"""The rows that an export is checked on: the run's own held-out or training rows, or prompts made up."""

import logging
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from ..config import MediaOptions
from ..data import load_data
from ..encode import EncodedPrompt
from ..errors import ConfigError, DataFormatError, EncodingError, MediaError, OverlongError
from ..intake import Intake
from ..media.hearing import extractor_of
from ..models.families import placeholder_ids_by_kind
from .source import Source

_LOG = logging.getLogger("vlm_grpo")
_UNUSABLE = (ConfigError, DataFormatError, MediaError, EncodingError, OverlongError)
_SPARE = 4  # rows looked at for each that is wanted: some may have bad media
_QUESTIONS = ("What is this?", "Describe what you see.", "What color is it?", "How many are there?")


def sample_rows(
    source: Source, model: Any, processor: Any, count: int, data: str | None
) -> tuple[list[dict[str, Any]], str]:
    """Rows that the processor takes, and where they are from, in words.

    Args:
        source: its config names the rows of the run, and how their media are opened.
        count: how many; fewer where there are not so many.
        data: a file or dataset name to take them from instead.

    Raises:
        DataFormatError, MediaError, EncodingError: the rows of ``data`` cannot be used.
    """
    if data is not None:
        return _usable(source, model, processor, load_data(data, limit=count), count), data
    reasons = []
    for title, name, split in _own_data(source):
        try:
            rows = load_data(name, split, _SPARE * count, _media_root(source), check_files=False, **_reading(source))
            return _usable(source, model, processor, rows, count), f"the run's {title} rows"
        except _UNUSABLE as error:
            reasons.append(f"{title}: {error}")
    if reasons:
        _LOG.warning(
            "The run's own rows cannot be used (%s) The export is checked on made-up prompts; --data names others.",
            " ".join(reasons),
        )
    for title, rows in _made_up(processor, count):
        try:
            return _usable(source, model, processor, rows, count), f"made-up prompts ({title})"
        except _UNUSABLE as error:
            last = error
    raise ConfigError(f"export: the processor takes none of the made-up prompts ({last}) Give rows: --data FILE.")


def encode_rows(source: Source, model: Any, processor: Any, rows: list[dict[str, Any]]) -> list[EncodedPrompt]:
    """The rows as this processor encodes them, under the options of the run."""
    intake = _intake(source, model, processor)
    return [intake.read(row, f"row {number} of the check")[1] for number, row in enumerate(rows, 1)]


def _own_data(source: Source) -> list[tuple[str, str, str]]:
    """What they are called, their name and their split, those to be preferred first."""
    if source.config is None:
        return []
    data = source.config.data
    named = (("held-out", data.eval, data.eval_split or data.split), ("training", data.train, data.split))
    return [(title, name, split) for title, name, split in named if name]


def _usable(source: Source, model: Any, processor: Any, rows: Any, count: int) -> list[dict[str, Any]]:
    intake = _intake(source, model, processor)
    intake.media = intake.media.model_copy(update={"on_bad": "drop"})

    def good() -> Any:
        for number, row in enumerate(rows, 1):
            try:
                intake.read(row, f"row {number}")
            except (MediaError, EncodingError, OverlongError) as error:
                problems.append(error)
                continue
            yield row

    problems: list[Exception] = []
    kept = list(islice(good(), count))
    if not kept:
        raise problems[0]
    return kept


def _intake(source: Source, model: Any, processor: Any) -> Intake:
    return Intake(
        processor,
        placeholder_ids_by_kind(model.config, processor),
        source.config.media if source.config else MediaOptions(),
        _media_root(source),
        template=source.train_option("chat_template_kwargs"),
    )


def _reading(source: Source) -> dict[str, Any]:
    """How the run's rows are told apart, but for where their media lie."""
    reading = source.config.data.reading() if source.config is not None else {}
    return {name: value for name, value in reading.items() if name != "media_root"}


def _media_root(source: Source) -> Path | None:
    root = source.config.data.media_root if source.config else None
    return None if root is None else Path(root).expanduser()


def _made_up(processor: Any, count: int) -> list[tuple[str, list[dict[str, Any]]]]:
    """Prompts that need no file: with a picture, with a sound, or of text only."""
    texts = [_QUESTIONS[number % len(_QUESTIONS)] for number in range(count)]
    made: list[tuple[str, list[dict[str, Any]]]] = []
    if getattr(processor, "image_processor", None) is not None:
        pictures = [_picture(number) for number in range(count)]
        made.append(("pictures", [_row("image", *pair) for pair in zip(pictures, texts, strict=True)]))
    extractor = extractor_of(processor)
    if extractor is not None:
        sounds = [_sound(number, extractor.sampling_rate) for number in range(count)]
        made.append(("sounds", [_row("audio", *pair) for pair in zip(sounds, texts, strict=True)]))
    made.append(("texts", [{"prompt": [{"role": "user", "content": text}]} for text in texts]))
    return [*made, ("texts without a chat template", [{"prompt": text} for text in texts])]


def _row(kind: str, medium: Any, text: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": [{"type": kind, kind: medium}, {"type": "text", "text": text}]}]}


def _picture(number: int) -> Image.Image:
    """Stripes of their own width and colours for every number."""
    import numpy as np

    x, y = np.meshgrid(np.arange(112), np.arange(112))
    phase = (x + (number % 3) * y) / (4 + 3 * number)
    channels = [127 + 120 * np.sin(phase + number * shift) for shift in (0.0, 1.3, 2.9)]
    return Image.fromarray(np.stack(channels, -1).astype("uint8"))


def _sound(number: int, rate: int) -> dict[str, Any]:
    """One second of a tone, a minor third above the last."""
    import numpy as np

    seconds = np.arange(rate) / rate
    wave = 0.3 * np.sin(2 * np.pi * 220 * 2 ** (number / 4) * seconds)
    return {"array": wave.astype("float32"), "sampling_rate": rate}
