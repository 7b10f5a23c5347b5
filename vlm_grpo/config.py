"""What a YAML file or the command line may say about a run. No torch here.

Help text lives once, on the field; the command line reads it from there. Relative paths in a config file are
relative to the current directory, as on the command line.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator, model_validator

from .errors import ConfigError
from .options import DataOptions as DataOptions
from .options import JudgeOptions as JudgeOptions
from .options import LoraOptions as LoraOptions
from .options import MediaOptions as MediaOptions
from .options import Options
from .options import RewardSpec as RewardSpec
from .parts import PARTS, Part, Parts, parts_of
from .predecessors import PREDECESSORS, translate
from .presets import PRESETS, preset_layer
from .sentences import Location, as_sentence
from .yaml_text import dump_yaml, parse_value, read_yaml

Backend = Literal["auto", "unsloth", "hf"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class RunConfig(Options):
    """Everything one run is made of."""

    preset: str | None = Field(
        default=None,
        description=f"Published options of another project to start from; your own win: {', '.join(PRESETS)}.",
    )
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
        description="Train LoRA adapters with these options (true: the defaults); unset, and with no part below to "
        "train, the whole model is trained.",
    )
    language: Part | None = Field(
        default=None,
        description="Train the language model by adapters (lora), all of its weights (full), or not (off); unset "
        "follows lora.",
    )
    vision: Part | None = Field(
        default=None, description="Train the vision tower: lora, full or off; unset follows lora."
    )
    audio: Part | None = Field(
        default=None, description="Train the tower that encodes sounds: lora, full or off; unset: off beside lora."
    )
    projector: Part | None = Field(
        default=None,
        description="Train what maps features of media into the language model: lora, full or off; unset: off beside "
        "lora.",
    )
    algorithm: Literal["grpo", "ppo"] | None = Field(
        default=None, description="What train learns by: grpo (unset), or ppo with values and a KL penalty."
    )
    data: DataOptions = Field(default_factory=DataOptions, description="Training and held-out rows.")
    media: MediaOptions = Field(default_factory=MediaOptions, description="How media are opened and checked.")
    rewards: list[RewardSpec] = Field(
        default_factory=list, description='Reward functions: name, "name=weight", or "file.py:function".'
    )
    judge: JudgeOptions | None = Field(
        default=None, description="What a reward model reads behind a response (reward train only)."
    )
    output: str = Field(
        default="runs/run", min_length=1, description="Run folder. Starting the same run again continues it."
    )
    max_minutes: float | None = Field(
        default=None, gt=0, description="Stop and save after so many minutes of training."
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="Any option of VLMGRPOConfig, VLMPPOConfig or TRL's GRPOConfig, by name."
    )

    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """One line for each option of another project that was translated or left out."""
        return self._notes

    @property
    def parts(self) -> Parts:
        """How each part of the model is trained."""
        return parts_of(self.lora, self.load_in_4bit, {part: getattr(self, part) for part in PARTS})

    @model_validator(mode="after")
    def _parts_agree(self) -> "RunConfig":
        parts = self.parts
        if self.lora is not None and not parts.by_name:
            # As one of the two says it, so that the config which is written down contradicts nothing.
            switches = {part: getattr(parts, part) == "lora" for part in parts.given & {"language", "vision"}}
            object.__setattr__(self, "lora", self.lora.model_copy(update=switches))
        return self

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
    """``accuracy``, ``accuracy=0.7``, ``{name: accuracy, weight: 0.7}`` and ``{model: RUN}``: all name a reward."""
    if value is None:
        return []
    if isinstance(value, str | dict | RewardSpec):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError("give a reward's name, or a list of them")
    return [
        parse_reward(item) if isinstance(item, str) else _of_model(item) if isinstance(item, dict) else item
        for item in value
    ]


def _of_model(item: dict[str, Any]) -> dict[str, Any]:
    """``{model: RUN, captions: FILE}`` means ``{name: model, kwargs: {model: RUN, captions: FILE}}``."""
    if "model" not in item or item.get("name", "model") != "model":
        return item
    own = {key: value for key, value in item.items() if key in RewardSpec.model_fields}
    options = {key: value for key, value in item.items() if key not in own}
    return {"name": "model", **own, "kwargs": {**(own.get("kwargs") or {}), **options}}


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
    layers = [
        (source, _expand(translate(layer, source, notes), source))
        for source, layer in _layers(path, overrides or [], direct or {})
    ]
    preset = next((layer["preset"] for _, layer in reversed(layers) if "preset" in layer), None)
    if preset is not None:
        layers.insert(0, (f"preset {preset}", _expand(preset_layer(preset), f"preset {preset}")))
    for source, layer in layers:
        _merge(merged, layer, source, origin)
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        raise as_sentence(error, _known_keys, origin) from error
    if config.lora and config.lora.dropout and config.train.get("disable_dropout") is not False:
        notes.append(
            f"lora.dropout={config.lora.dropout} acts in sft only: other commands turn dropout off. "
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


def _known_keys(location: Location) -> list[str]:
    """The keys that are allowed beside the one at ``location``."""
    sections: dict[str, type[BaseModel]] = {
        "lora": LoraOptions,
        "data": DataOptions,
        "judge": JudgeOptions,
        "media": MediaOptions,
        "rewards": RewardSpec,
    }
    model = sections.get(str(location[0]), RunConfig) if len(location) > 1 else RunConfig
    return list(model.model_fields)


def require(config: RunConfig, command: str) -> None:
    """Refuse a run that cannot start: no rows, for ``train`` no reward, or what only another command has a use for."""
    said = said_as(command)
    if not config.data.train:
        raise ConfigError(f"{said}: no training rows. Give --data FILE.jsonl, or data: in the config file.")
    if command == "train" and not config.rewards:
        raise ConfigError('train: no reward. Give --reward accuracy, or rewards: ["file.py:function"] in the config.')
    if command != "train" and config.algorithm is not None:
        raise ConfigError(
            f"{said}: algorithm={config.algorithm} has no use, since only train has several. Leave it out."
        )
    if command != "reward-train":
        if config.judge is not None:
            raise ConfigError(f"{said}: judge has no use, since no reward model is trained. Leave it out.")
        return
    if config.rewards:
        raise ConfigError("reward train: rewards have no use, since the pairs say what is better. Leave them out.")
    whole = [part for part in PARTS if getattr(config, part) == "full"]
    if "language" in whole or (not config.parts.apart and config.parts.given):
        raise ConfigError(
            'reward train: language="full" is not available: a reward model is an adapter, so that it shares its base '
            "with the policy. Leave it out, or set lora: true."
        )


def said_as(command: str) -> str:
    """A command as it is typed: ``reward train``."""
    return command.replace("-", " ")


def method(config: RunConfig, command: str | None) -> str:
    """What a command learns by: ``ppo`` where ``train`` is to, else the command itself."""
    return "ppo" if command == "train" and config.algorithm == "ppo" else command or ""


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
        a, b = before.get(key), after.get(key)  # a key that a folder's version did not have yet is unset there
        if _plain(a) != _plain(b):
            lines.append(f"{key}: {'unset' if a is None else a} → {'unset' if b is None else b}")
    return lines


def _flat(value: dict[str, Any], at: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flat(inner, f"{at}{key}.") if isinstance(inner, dict) and inner else {f"{at}{key}": inner}
    return out


def _plain(value: Any) -> Any:
    """Text that reads as a number counts as that number: quotes around ``2e-5`` are no change."""
    return parse_value(value) if isinstance(value, str) else value
