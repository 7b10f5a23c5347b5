"""What a request comes to: models, rows, rewards and places, all looked at before a model is loaded."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import MediaOptions, RewardSpec, RunConfig, load_config
from ..data import MEDIA_COLUMNS, load_data, to_sample, undecoded
from ..data.scan import scan_media
from ..errors import ConfigError, MediaError, nearest
from ..evaluate import CONTROLS, Control, Yardstick, learned_yardstick, yardstick_of
from ..evaluate.figures import Labels
from ..evaluate.saving import check_savable
from ..folder import EVALUATION
from ..models import is_adapter, load_processor, looks_like_path, refuse_reward_model
from ..trained import as_trained, command_of, config_of, run_home

_LOG = logging.getLogger("vlm_grpo")
_LONGEST_ANSWER = {"train": 256, "sft": 64}  # tokens, as a run of the command evaluates itself
_BATCH = 8
BASE = "base"


@dataclass(frozen=True)
class Request:
    """What is evaluated, and how.

    Attributes:
        run: a run folder, one of its checkpoints, or any model that ``load_model`` takes.
        data: held-out rows, a file or a dataset name; by default the run's own.
        baseline: what it is compared with: another run or model, or ``base``: the run's model with its adapter off, or
            the model that the run started from where it trained that itself.
        samples: so many answers of each row are drawn besides, for pass@k.
        controls: what else is measured, the media ``blank``, ``shuffle`` or left out (``text``).
        rewards: names as in a config, ``accuracy`` or ``file.py:function=0.5``; by default the run's own.
        correct: the reward that says what is right; by default the first that looks at the answer.
        by: columns to break the accuracy down by.
        labels: whether the right answers are classes; ``auto`` looks.
        limit, split: of the rows.
        batch_size, max_new_tokens, temperature: by default as the run has them.
        seed: of drawn answers, shuffled media and resampling.
        output: folder of the figures; by default ``eval-DATA`` in the run folder, or ``runs/eval-MODEL-DATA``.
        save_rows: a .jsonl or .parquet file that gets the rows with their ``pass_rate``.
        media_root: the folder that relative media paths start from.
        on_bad_media: ``error`` refuses rows whose media the scan finds bad, ``drop`` leaves them out.
        loading: arguments of ``load_model`` that are not to be as the run has them.
    """

    run: str
    data: str | None = None
    baseline: str | None = None
    samples: int = 0
    controls: tuple[Control, ...] = ("blank",)
    rewards: tuple[str, ...] = ()
    correct: str | None = None
    by: tuple[str, ...] = ()
    labels: Labels = "auto"
    limit: int | None = None
    split: str | None = None
    batch_size: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    output: str | None = None
    save_rows: str | None = None
    media_root: str | None = None
    on_bad_media: str | None = None
    loading: dict[str, Any] = field(default_factory=dict)


class Plan:
    """A request with everything it leaves open; what cannot work is refused here.

    Attributes:
        config: the run's; None for any other model.
        yardstick: what answers are measured by.
        data, split, root: the rows by name, and where their media are.
        rows: the rows.
        media: how their media are opened.
        controls: what is measured besides.
        folder: of the figures.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.config = config_of(request.run)
        _check_numbers(request)
        self._check_models()
        self.yardstick = self.fresh_yardstick()
        self.data, self.split, self.root = self._source()
        reading = {**(self.config.data.reading() if self.config else {}), "media_root": self.root}
        self.rows = load_data(self.data, self.split, request.limit, check_files=False, **reading)
        self._check_columns()
        self.media = self._media()
        self.controls = self._controls()
        self.folder = self._output()
        if request.save_rows is not None:
            check_savable(Path(request.save_rows).expanduser(), self.rows, self.data)

    @property
    def temperature(self) -> float:
        given = self.request.temperature
        return float(self._option("temperature", 1.0) if given is None else given)

    @property
    def length(self) -> int:
        command = command_of(self.request.run) or "train"
        return self.request.max_new_tokens or self._option("max_completion_length", _LONGEST_ANSWER[command])

    @property
    def batch_size(self) -> int:
        """Answers at a time."""
        return self.request.batch_size or self._option("per_device_eval_batch_size", _BATCH)

    def _option(self, name: str, default: Any) -> Any:
        value = self.config.train.get(name) if self.config else None
        return default if value is None else value

    def loading(self, name: str, config: RunConfig | None) -> dict[str, Any]:
        return {**as_trained(name, config), **self.request.loading}

    def settings(self) -> dict[str, Any]:
        request = self.request
        return {
            "run": request.run,
            "baseline": request.baseline,
            "data": self.data,
            "split": self.split,
            "limit": request.limit,
            "correct": self.yardstick.judge,
            "samples": request.samples,
            "temperature": self.temperature if request.samples else None,
            "max_new_tokens": self.length,
            "seed": request.seed,
        }

    def titles(self) -> dict[str, str]:
        """What the states are called."""
        run, baseline = self.request.run, self.request.baseline
        if baseline is None:
            return {"after": _short(run)}
        if baseline == BASE:
            own = self.config.model if self.config else BASE
            before = "the adapter off" if is_adapter(str(Path(run).expanduser())) else _short(own)
        else:
            before = _short(baseline)
        return {"before": f"before: {before}", "after": f"after: {_short(run)}"}

    def _check_models(self) -> None:
        """Refuse what no model is at before one is asked for hours."""
        baseline = self.request.baseline
        _check_model(self.request.run, "eval")
        if baseline == BASE:
            if not is_adapter(str(Path(self.request.run).expanduser())) and self.config is None:
                raise ConfigError(
                    f"baseline: {self.request.run} has no adapter that could be switched off, and no config.yaml that "
                    "names the model it was trained from. Name the other model: --baseline MODEL."
                )
        elif baseline is not None:
            _check_model(baseline, "baseline")
            if not Path(baseline).expanduser().is_dir():
                load_processor(baseline)  # of a name on the Hub: its weights are asked for after the run's answers

    def fresh_yardstick(self) -> Yardstick:
        """What answers are measured by, its rewards new: some take on the model that they are shown first."""
        request, config = self.request, self.config
        learned = self._option("completion_column", "completion") if command_of(request.run) == "sft" else None
        specs = _specs(request.rewards) if request.rewards else config.rewards if config else []
        if specs:
            found = yardstick_of(specs, correct=request.correct)
            return found if learned is None else replace(found, shown_too=(learned,))
        if learned is None:
            raise ConfigError(
                f"eval: no reward. {request.run} is no run whose config names some. Give --reward accuracy, or "
                "--reward file.py:function."
            )
        return replace(learned_yardstick(learned), correct=request.correct or "accuracy")

    def _source(self) -> tuple[str, str, str | None]:
        """Name and split of the rows, and where their media are."""
        request, own = self.request, self.config.data if self.config else None
        if request.data is not None:
            return request.data, request.split or "train", request.media_root
        if own is None or own.eval is None:
            raise ConfigError(f"eval: no rows. {request.run} names no held-out ones itself: give --data FILE.")
        return own.eval, request.split or own.eval_split or own.split, request.media_root or own.media_root

    def _check_columns(self) -> None:
        known = self.rows.column_names
        for column in self.request.by:
            if column in MEDIA_COLUMNS:
                raise ConfigError(
                    f'by: "{column}" holds media, which no two rows share. Name a column of kinds of rows.'
                )
            if column not in known:
                raise ConfigError(
                    f'by: {self.data} has no column "{column}".{nearest(column, known)} It has: {", ".join(known)}.'
                )

    def _media(self) -> MediaOptions:
        """How media are opened; the scan says what cannot be, and what it misses is left out and counted."""
        options = self.config.media if self.config else MediaOptions()
        report = scan_media(self.rows, self.data, options, self.root)
        if report.bad and (self.request.on_bad_media or options.on_bad) == "error":
            raise MediaError(f"{report.text(self.data)} Mend or remove them, or leave them out: --on-bad-media drop.")
        return options.model_copy(update={"on_bad": "drop"})

    def _controls(self) -> tuple[Control, ...]:
        for control in self.request.controls:
            if control not in CONTROLS:
                raise ConfigError(
                    f'control: "{control}" is not known.{nearest(control, list(CONTROLS))} Use {", ".join(CONTROLS)}, '
                    "or none."
                )
        if self.request.controls and not self._any_media():
            _LOG.info("No row of %s has media: there is no control to measure.", self.data)
            return ()
        return tuple(dict.fromkeys(self.request.controls))

    def _any_media(self) -> bool:
        def has(row: Any) -> bool:
            try:
                return bool(to_sample(row).media)
            except MediaError:
                return True

        return any(has(row) for row in undecoded(self.rows)[0])

    def _output(self) -> Path:
        given = self.request.output
        if given is not None:
            folder = Path(given).expanduser().resolve()
            if folder.is_file() or (folder / EVALUATION).is_file():
                raise ConfigError(f"output: {given} holds an evaluation, or is a file. Choose another folder.")
            return folder
        run, home = Path(self.request.run).expanduser(), run_home(self.request.run)
        name = f"eval-{_slug(self.data)}{'' if self.split == 'train' else f'-{self.split}'}"
        if home is not None:
            folder = home.resolve() / (name if home == run else f"{name}-{run.name}")
        else:
            folder = Path("runs").resolve() / name.replace("eval-", f"eval-{_slug(self.request.run)}-", 1)
        return _unused(folder)


def _check_numbers(request: Request) -> None:
    least: list[tuple[str, Any, Callable[[Any], bool], str]] = [
        ("samples", request.samples, lambda value: value >= 0, "0 or more"),
        ("batch_size", request.batch_size, lambda value: value >= 1, "1 or more"),
        ("max_new_tokens", request.max_new_tokens, lambda value: value >= 1, "1 or more"),
        ("limit", request.limit, lambda value: value >= 1, "1 or more"),
        ("temperature", request.temperature, lambda value: value > 0, "more than 0"),
    ]
    for name, value, holds, needed in least:
        if value is not None and not holds(value):
            raise ConfigError(f"eval: {name}={value} needs {needed}. Correct the value.")
    if request.temperature is not None and not request.samples:
        raise ConfigError("eval: a temperature is of drawn answers, and none are. Give --samples, or leave it out.")


def _check_model(name: str, what: str) -> None:
    path = Path(name).expanduser()
    refuse_reward_model(path, what)
    if not path.is_dir():
        if looks_like_path(name) or not name.strip() or path.exists():
            raise ConfigError(f'{what}: the folder "{name}" does not exist. Correct the path, or give a hub name.')
    elif not is_adapter(str(path)) and not (path / "config.json").is_file():
        raise ConfigError(
            f'{what}: the folder "{name}" holds neither config.json nor adapter_config.json. Give a model folder, a '
            "finished run, or one of its checkpoints."
        )


def _specs(rewards: tuple[str, ...]) -> list[RewardSpec]:
    return load_config(direct={"model": "unused", "rewards": list(rewards)}).rewards


def _slug(name: str) -> str:
    path = Path(name)
    stem = path.stem if path.suffix in (".jsonl", ".json", ".parquet", ".csv") else path.name
    return stem.replace("/", "-") or "rows"


def _short(name: str) -> str:
    return Path(name).name or name


def _unused(folder: Path) -> Path:
    """The folder, or the first numbered one beside it: an evaluation that was made is never written over."""
    found, number = folder, 1
    while found.exists():
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found
