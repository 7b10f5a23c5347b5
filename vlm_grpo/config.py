"""What a YAML file or the command line may say about a run. No torch here.

Help text lives once, on the field; the command line reads it from there. Relative paths in a config file are
relative to the current directory, as on the command line.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from .errors import ConfigError, nearest
from .predecessors import PREDECESSORS, translate
from .yaml_text import dump_yaml, parse_value, read_yaml

Backend = Literal["auto", "unsloth", "hf"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class _Options(BaseModel):
    # coerce_numbers_to_str: `output: 2026` in YAML is a number, and a fine folder name.
    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, coerce_numbers_to_str=True, ser_json_inf_nan="constants"
    )


class LoraOptions(_Options):
    """Which low-rank adapters are trained."""

    r: int = Field(default=16, ge=1, description="Rank of the adapters.")
    alpha: float = Field(default=16, gt=0, description="Scale of the adapters; an update is multiplied by alpha / r.")
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Dropout on the adapters' input; GRPO turns it off unless train.disable_dropout is false.",
    )
    vision: bool = Field(default=False, description="Train adapters in the vision tower.")
    language: bool = Field(default=True, description="Train adapters in the language model.")
    attention: bool = Field(default=True, description="Train adapters on attention projections.")
    mlp: bool = Field(default=True, description="Train adapters on MLP projections.")
    targets: str | list[str] | None = Field(
        default=None,
        description="Module names, or one regular expression over full names, instead of the four switches.",
    )

    @model_validator(mode="after")
    def _something_is_trained(self) -> "LoraOptions":
        if not self.targets and not ((self.vision or self.language) and (self.attention or self.mlp)):
            raise ValueError(
                f"nothing would be trained with vision={self.vision}, language={self.language}, "
                f"attention={self.attention}, mlp={self.mlp}; switch on a tower and a kind of module, or give targets"
            )
        return self


class DataOptions(_Options):
    """Where the rows come from."""

    train: str | None = Field(
        default=None, description="Training rows: a .jsonl, .json, .parquet or .csv file, or a dataset name."
    )
    eval: str | None = Field(default=None, description="Held-out rows, in the same formats; never trained on.")
    split: str = Field(default="train", description="Split of the training dataset, where it has several.")
    eval_split: str | None = Field(
        default=None, description="Split of the held-out dataset; unset takes its usual one."
    )
    limit: int | None = Field(default=None, ge=1, description="Use only the first so many training rows.")
    media_root: str | None = Field(
        default=None, description="Folder that relative media paths start from; unset: the data file's."
    )


class MediaOptions(_Options):
    """How images, videos and sounds are opened, and what happens to those that cannot be."""

    min_pixels: int | None = Field(
        default=None, ge=1, description="Enlarge images and frames of fewer pixels; unset: the processor's own limit."
    )
    max_pixels: int | None = Field(
        default=None, ge=1, description="Reduce images and frames of more pixels; unset: the processor's own limit."
    )
    min_frames: int = Field(default=4, ge=1, description="Fewest frames taken of a video (where it has as many).")
    max_frames: int = Field(default=16, ge=1, description="Most frames taken of a video.")
    base_interval: float | None = Field(
        default=None, gt=0, description="Seconds between the frames taken of a video, within the two limits; unset: 1."
    )
    fps: float | None = Field(
        default=None, gt=0, description="Frames taken a second: another way to say 1 / base_interval."
    )
    dynamic_sample: bool = Field(
        default=False, description="Draw the number of frames between the two limits anew each epoch (seeded)."
    )
    audio_in_video: bool = Field(
        default=False, description="Videos are heard too: their audio track goes to the model, where it can take it."
    )
    max_audio_seconds: float | None = Field(
        default=None, gt=0, description="Keep so many seconds of each sound; unset: one too long for the model is bad."
    )
    scan: Literal["headers", "full", "off"] = Field(
        default="headers",
        description="Before training: open every medium and read its size (headers), decode it whole (full), or not.",
    )
    on_bad: Literal["error", "drop"] = Field(
        default="error",
        description="Bad media stop the run with a list, or their rows are dropped and counted.",
    )

    @classmethod
    def of(cls, value: "MediaOptions | dict[str, Any] | None") -> "MediaOptions":
        """The options themselves, from their values by name, or the defaults.

        Raises:
            ConfigError: an unknown name, or a value that cannot be.
        """
        if isinstance(value, cls):
            return value
        try:
            return cls.model_validate(value or {})
        except ValidationError as error:
            raise _as_sentence(error, {}, ("media",)) from error

    @model_validator(mode="after")
    def _limits_agree(self) -> "MediaOptions":
        for low, high in (("min_pixels", "max_pixels"), ("min_frames", "max_frames")):
            least, most = getattr(self, low), getattr(self, high)
            given = self.model_fields_set & {low, high}
            if least is not None and most is not None and least > most and len(given) == 1:
                # The other is a default, which gives way; past the validation that would come back here.
                object.__setattr__(self, low if high in given else high, getattr(self, given.pop()))
                continue
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low}={least} is more than {high}={most}; swap them")
        if self.fps is not None and self.base_interval is not None:
            raise ValueError(f"fps={self.fps:g} and base_interval={self.base_interval:g} say the same; keep one")
        return self


class RewardSpec(_Options):
    """One reward function and its weight."""

    name: str = Field(min_length=1, description='A built-in reward, or "file.py:function", or "module:function".')
    weight: float = Field(default=1.0, allow_inf_nan=False, description="Factor of this reward in the total.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments bound to the reward function.")


class RunConfig(_Options):
    """Everything one run is made of."""

    model: str = Field(min_length=1, description="Model folder, run folder or hub name to start from.")
    backend: Backend = Field(
        default="auto",
        description="What loads the model: Unsloth, transformers + PEFT (hf), or auto: Unsloth where it works.",
    )
    load_in_4bit: bool = Field(default=False, description="Load the base model in 4 bits (bitsandbytes NF4).")
    dtype: Dtype = Field(default="auto", description="Number type of the base model; auto follows the machine.")
    max_seq_length: int | None = Field(
        default=None,
        ge=1,
        description="Context length in tokens that Unsloth prepares the model for. Prompts are never cut.",
    )
    lora: LoraOptions | None = Field(
        default=None,
        description="Train LoRA adapters with these options (true: the defaults); unset trains the whole model.",
    )
    data: DataOptions = Field(default_factory=DataOptions, description="Training and held-out rows.")
    media: MediaOptions = Field(default_factory=MediaOptions, description="How media are opened and checked.")
    rewards: list[RewardSpec] = Field(
        default_factory=list, description='Reward functions: name, "name=weight", or "file.py:function".'
    )
    output: str = Field(
        default="runs/run", min_length=1, description="Run folder. Starting the same run again continues it."
    )
    max_minutes: float | None = Field(
        default=None, gt=0, description="Stop and save after so many minutes of training."
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="Any option of VLMGRPOConfig or of TRL's GRPOConfig, by name."
    )

    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """One line for each option of another project that was translated or left out."""
        return self._notes

    @field_validator("data", mode="before")
    @classmethod
    def _data_shorthand(cls, value: Any) -> Any:
        return _data_section(value)

    @field_validator("lora", mode="before")
    @classmethod
    def _lora_shorthand(cls, value: Any) -> Any:
        return _lora_section(value)

    @field_validator("rewards", mode="before")
    @classmethod
    def _rewards_shorthand(cls, value: Any) -> Any:
        return _reward_list(value)


def _data_section(value: Any) -> Any:
    """``train.jsonl`` means ``{train: train.jsonl}``."""
    if value is None:
        return {}
    return {"train": value} if isinstance(value, str) else value


def _media_section(value: Any) -> Any:
    """Left empty, the defaults."""
    return {} if value is None else value


def _lora_section(value: Any) -> Any:
    """``true`` means the defaults, ``false`` none."""
    if isinstance(value, bool):
        return {} if value else None
    return value


def _reward_list(value: Any) -> Any:
    """``accuracy``, ``accuracy=0.7`` and ``{name: accuracy, weight: 0.7}`` mean the same kind of thing."""
    if value is None:
        return []
    if isinstance(value, str | dict | RewardSpec):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError("give a reward's name, or a list of them")
    return [parse_reward(item) if isinstance(item, str) else item for item in value]


def parse_reward(text: str) -> dict[str, Any]:
    """``accuracy=0.7`` as ``{"name": "accuracy", "weight": 0.7}``; without ``=`` the weight is 1."""
    name, sign, weight = text.rpartition("=")
    if not sign:
        return {"name": text.strip()}
    try:
        return {"name": name.strip(), "weight": float(weight)}
    except ValueError:
        raise ValueError(f'the weight in "{text}" is not a number; write it as name=0.7') from None


_SHORTHANDS: dict[str, Callable[[Any], Any]] = {
    "data": _data_section,
    "lora": _lora_section,
    "media": _media_section,
    "rewards": _reward_list,
}


def load_config(
    path: str | Path | None = None, overrides: list[str] | None = None, direct: dict[str, Any] | None = None
) -> RunConfig:
    """The run a YAML file describes, changed by the command line.

    ``overrides`` are ``"train.beta=0.1"`` texts; ``direct`` holds options by name, ours (``model``, ``data.eval``,
    ``rewards``) or any other, which is then a trainer option. Later wins: file, ``direct``, ``overrides``. Names of
    predecessor projects are translated; ``config.notes`` says how.

    Raises:
        ConfigError: an unknown key (with the nearest known one), or a value its field does not take.
    """
    notes: list[str] = []
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, layer in _layers(path, overrides or [], direct or {}):
        _merge(merged, _expand(translate(layer, source, notes), source), source, origin)
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        raise _as_sentence(error, origin) from error
    if config.lora and config.lora.dropout and config.train.get("disable_dropout") is not False:
        notes.append(
            f"lora.dropout={config.lora.dropout} acts in sft only: GRPO turns dropout off. "
            "Give train.disable_dropout=false to keep it."
        )
    config._notes.extend(notes)
    return config


def _layers(
    path: str | Path | None, overrides: list[str], direct: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where options were written, and what was written there; a later layer wins."""
    if path is not None:
        yield str(path), read_yaml(path)
    options: dict[str, Any] = {}
    for key, value in direct.items():
        known = key.split(".")[0] in RunConfig.model_fields or key in PREDECESSORS
        section = "media" if key in MediaOptions.model_fields else "train"
        _put(options, key if known else f"{section}.{key}", value, "command line")
    yield "command line", options
    settings: dict[str, Any] = {}
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f'--set "{text}": there is no key=value. Write it as --set train.learning_rate=2e-5.')
        _put(settings, key.strip(), parse_value(value), "--set")
    yield "--set", settings


def _put(target: dict[str, Any], path: str, value: Any, source: str) -> None:
    *parents, last = path.split(".")
    for key in parents:
        section = _SHORTHANDS[key](target.get(key)) if key in _SHORTHANDS else target.get(key)
        if key == "rewards":
            raise ConfigError(f"{source}: {path}: rewards is a list. Give it whole, as in --reward accuracy=0.7.")
        target[key] = section if isinstance(section, dict) else {}
        target = target[key]
    target[last] = value


def _expand(layer: dict[str, Any], source: str) -> dict[str, Any]:
    """The layer with its shorthands written out, so that layers merge key by key."""
    out = dict(layer)
    for key, expand in _SHORTHANDS.items():
        if key in out:
            try:
                out[key] = expand(out[key])
            except ValueError as error:
                raise ConfigError(f"{source}: {key}: {error}.") from error
    if "train" in out and out["train"] is None:
        out["train"] = {}
    return out


def _merge(target: dict[str, Any], layer: dict[str, Any], source: str, origin: dict[str, str], at: str = "") -> None:
    for key, value in layer.items():
        path = f"{at}{key}"
        origin[path] = source
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value, source, origin, f"{path}.")
        elif isinstance(value, dict):
            target[key] = {}
            _merge(target[key], value, source, origin, f"{path}.")
        else:
            target[key] = value


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys that are allowed beside the one at ``location``."""
    sections: dict[str, type[BaseModel]] = {
        "lora": LoraOptions,
        "data": DataOptions,
        "media": MediaOptions,
        "rewards": RewardSpec,
    }
    model = sections.get(str(location[0]), RunConfig) if len(location) > 1 else RunConfig
    return list(model.model_fields)


def _as_sentence(error: ValidationError, origin: dict[str, str], at: tuple[str, ...] = ()) -> ConfigError:
    """The first problem pydantic found, said with its key, its value and where it was written."""
    problems = error.errors()
    # A misspelt key often is why another one is missing.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = at + problem["loc"]
    path = ".".join(str(part) for part in location)
    source = next((origin[p] for p in _prefixes(path) if p in origin), "config")
    last = str(location[-1]) if location else ""
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location)
        hint = nearest(last, known)
        if not hint and len(location) == 1:
            hint = f' Trainer options go under "train:" (train.{last}).'
        return ConfigError(f'{source}: unknown key "{path}".{hint or " Known here: " + ", ".join(known) + "."}')
    if problem["type"] == "missing":
        if path != "model":
            return ConfigError(f'{source}: "{path}" is needed. Give it.')
        typo = nearest("model", list(problem["input"].get("train", {}))).replace("Did you mean", "Was it meant by")
        return ConfigError(f"{source}: a model is needed. Give --model, or model: in the config file.{typo}")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = 'needs "key: value" lines, one option each'
    message = message[:1].lower() + message[1:]
    given = "" if problem["type"] == "value_error" else f" (given {problem['input']!r})"
    return ConfigError(f"{source}: {path}: {message}{given}.")


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def require(config: RunConfig, command: str) -> None:
    """Refuse a run that cannot start: no rows, or (for ``train``) no reward."""
    if not config.data.train:
        raise ConfigError(f"{command}: no training rows. Give --data FILE.jsonl, or data: in the config file.")
    if command == "train" and not config.rewards:
        raise ConfigError('train: no reward. Give --reward accuracy, or rewards: ["file.py:function"] in the config.')


def resolved(config: RunConfig) -> dict[str, Any]:
    """The whole config as plain data in a stable order: what the run folder's ``config.yaml`` holds."""
    out = config.model_dump(mode="json")
    out["train"] = {key: out["train"][key] for key in sorted(out["train"])}
    return out


def to_yaml(config: RunConfig) -> str:
    """``resolved(config)`` as YAML; ``load_config`` reads it back to an equal config."""
    return dump_yaml(resolved(config))


def diff(old: RunConfig | dict[str, Any], new: RunConfig | dict[str, Any]) -> list[str]:
    """The keys two configs differ in, a line each: ``"train.learning_rate: 1e-05 → 2e-05"``."""
    before, after = (_flat(resolved(c) if isinstance(c, RunConfig) else c) for c in (old, new))
    lines = []
    for key in [*before, *(k for k in after if k not in before)]:
        a, b = before.get(key, "unset"), after.get(key, "unset")
        if _plain(a) != _plain(b):
            lines.append(f"{key}: {a} → {b}")
    return lines


def _flat(value: dict[str, Any], at: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flat(inner, f"{at}{key}.") if isinstance(inner, dict) and inner else {f"{at}{key}": inner}
    return out


def _plain(value: Any) -> Any:
    """Text that reads as a number counts as that number: quotes around ``2e-5`` are no change."""
    return parse_value(value) if isinstance(value, str) else value
