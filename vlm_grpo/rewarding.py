"""What only a reward model's run has: an adapter always, pairs for rows, a judge's prompt and captions."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .config import RunConfig, said_as
from .data import Sample, to_sample, undecoded
from .data.pairs import as_pairs
from .errors import ConfigError, MediaError
from .gathering import RunRows
from .judging.captions import Captions
from .judging.prompt import JudgePrompt, names_file
from .models import is_adapter
from .options import JudgeOptions, LoraOptions
from .pairwise import longer_wins

_LOG = logging.getLogger("vlm_grpo")
COMMAND = "reward-train"
_MOST_LONGER = 0.9


@dataclass(frozen=True)
class Judging:
    """What the judge reads behind a response.

    Attributes:
        judge: the request and the beginning of the answer.
        captions: of media; None without any.
        files: what both were read from.
    """

    judge: JudgePrompt
    captions: Captions | None
    files: tuple[Path, ...]


def with_adapter(config: RunConfig) -> RunConfig:
    """The config with default adapters where it asks for none; an adapter run that is continued has its own."""
    if config.lora is not None or config.parts.given or is_adapter(config.model):
        return config
    lora = LoraOptions()
    _LOG.info(
        "A reward model is an adapter: training one with the defaults (rank %d, alpha %g, on the language model). "
        "Give lora: for others.",
        lora.r,
        lora.alpha,
    )
    return config.model_copy(update={"lora": lora})


def check_names(command: str, given: dict[str, Any], classes: dict[str, Any]) -> None:
    """Say of an option that only other commands have, or that stands under ``judge``, where it belongs.

    Args:
        command: the one that was called.
        given: its options under ``train``.
        classes: the dataclass of options of each command.

    Raises:
        ConfigError: see above; an option that no command has passes.
    """
    names = {name: {option.name for option in fields(cls)} for name, cls in classes.items()}
    for name in given.keys() - names[command]:
        judge = name.removeprefix("judge_")
        if command == COMMAND and judge in JudgeOptions.model_fields:
            raise ConfigError(f"train.{name}: no option of {said_as(command)}. Did you mean judge.{judge}?")
        has = [other for other in names if name in names[other]]
        if command == "train" and has == ["ppo"]:
            raise ConfigError(f"train.{name} is an option of PPO. Give algorithm: ppo with it, or leave it out.")
        others = " and ".join(said_as(other) for other in has if other != "ppo" or "train" not in has)
        if others:
            raise ConfigError(
                f"train.{name} is an option of {others}, and {said_as(command)} has no use for it. Leave it out."
            )


def read_judging(config: RunConfig) -> Judging:
    """The judge's prompt and captions of a config.

    Raises:
        ConfigError: a file that cannot be read, an empty stem, or captions that the prompt has no place for.
    """
    options = config.judge or JudgeOptions()
    judge = JudgePrompt.of(options.prompt, options.stem)
    if not judge.stem.strip():
        raise ConfigError(
            "judge.stem is empty: the score is read behind its last token. Give its words, or leave it out for the "
            "built-in one."
        )
    if options.captions and not judge.takes_captions:
        raise ConfigError(
            f"judge.captions={options.captions}: the judge's prompt has no place for captions. Write \"{{% for caption "
            'in captions %}" into it, or leave the captions out.'
        )
    captions = Captions.read(options.captions) if options.captions else None
    prompt = options.prompt if options.prompt and names_file(options.prompt) else None
    return Judging(judge, captions, tuple(Path(name).expanduser() for name in (prompt, options.captions) if name))


def make_pairs(rows: RunRows, config: RunConfig, judging: Judging) -> None:
    """The run's rows as pairs, in their place; says what a judge could learn from them instead of what is right.

    Raises:
        DataFormatError: a row that is no pair, or captions of none of the rows.
    """
    data = config.data
    rows.train = as_pairs(rows.train, data.train or "")
    rows.held_out = None if rows.held_out is None else as_pairs(rows.held_out, data.eval or "")
    for name, some, is_training in ((data.train, rows.train, True), (data.eval, rows.held_out, False)):
        if hasattr(some, "__len__"):
            _check_lengths(f"{name}", some, is_training)
            if judging.captions is not None:
                _check_captions(f"{name}", some, data.media_root, judging.captions)


def _check_lengths(name: str, pairs: Any, is_training: bool) -> None:
    share = longer_wins(zip(pairs["chosen"], pairs["rejected"], strict=True))
    if share is None or 1 - _MOST_LONGER <= share <= _MOST_LONGER:
        return
    which = "longer" if share > 0.5 else "shorter"
    what = "a judge would learn length" if is_training else "a judge that counts characters would pass"
    _LOG.warning(
        "%s: in %.0f%% of the pairs the chosen response is the %s one: %s. Balance the pairs.",
        name,
        100 * max(share, 1 - share),
        which,
        what,
    )


def _check_captions(name: str, pairs: Any, root: str | None, captions: Captions) -> None:
    """Some rows without captions are said; a file of other names is refused."""
    covered = captions.check(_samples(name, pairs, None if root is None else Path(root).expanduser()))
    if covered.missing:
        _LOG.warning("%s: %s.", name, covered)


def _samples(name: str, pairs: Any, root: Path | None) -> Iterator[Sample]:
    for number, row in enumerate(undecoded(pairs)[0], 1):
        with suppress(MediaError):  # the row is left out where it is read
            yield to_sample(row, root, f"{name} row {number}")
