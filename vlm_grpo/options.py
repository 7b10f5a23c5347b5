"""The sections of a run's config. No torch here."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator

from .sentences import as_sentence


class Options(BaseModel):
    """What every section has in common."""

    # coerce_numbers_to_str: `output: 2026` in YAML is a number, and a fine folder name.
    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, coerce_numbers_to_str=True, ser_json_inf_nan="constants"
    )


class LoraOptions(Options):
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
    def _a_kind_of_layer_is_trained(self) -> "LoraOptions":
        if not self.targets and not (self.attention or self.mlp):
            raise ValueError("nothing would be trained with attention=False, mlp=False; switch one on, or give targets")
        return self


class DataOptions(Options):
    """Where the rows come from."""

    train: str | None = Field(
        default=None, description="Training rows: a .jsonl, .json, .parquet or .csv file, a folder, or a dataset name."
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
    format: str | None = Field(
        default=None,
        description="Format of the rows (trl, conversations, messages, ...); unset: told by their columns.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="The file's columns under our names for them, such as {problem: text}."
    )
    tags: dict[str, str] = Field(
        default_factory=dict,
        description="Names inside a turn, as in LLaMA-Factory's dataset_info.json: role_tag, content_tag, user_tag, "
        "assistant_tag, system_tag, observation_tag, function_tag.",
    )
    streaming: bool = Field(default=False, description="Read and check the rows as they come, not all beforehand.")
    min_pass_rate: float | None = Field(
        default=None, ge=0, le=1, description="Leave out rows whose column pass_rate is lower: too hard to learn from."
    )
    max_pass_rate: float | None = Field(
        default=None, ge=0, le=1, description="Leave out rows whose column pass_rate is higher: too easy."
    )

    def reading(self) -> dict[str, Any]:
        """How rows are read, training and held-out ones alike, by the names of ``load_data``."""
        return {name: getattr(self, name) for name in ("media_root", "format", "columns", "tags")}

    @model_validator(mode="after")
    def _pass_rates_agree(self) -> "DataOptions":
        low, high = self.min_pass_rate, self.max_pass_rate
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_pass_rate={low:g} is more than max_pass_rate={high:g}; swap them")
        return self


class MediaOptions(Options):
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
            raise as_sentence(error, lambda _: list(cls.model_fields), {}, ("media",)) from error

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


class JudgeOptions(Options):
    """What a reward model reads behind a response; the policy never reads any of it."""

    prompt: str | None = Field(
        default=None, description="The request to judge a response: a .jinja file, or its text; unset: the built-in."
    )
    stem: str | None = Field(
        default=None, description="The judge's own first words, whose last token is scored; unset: the built-in."
    )
    captions: str | None = Field(
        default=None,
        description="A .json file of media names, each with a list of true captions that the judge is shown.",
    )


class RewardSpec(Options):
    """One reward function and its weight."""

    name: str = Field(min_length=1, description='A built-in reward, or "file.py:function", or "module:function".')
    weight: float = Field(default=1.0, allow_inf_nan=False, description="Factor of this reward in the total.")
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the reward function, or of the class it is made of."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Dataset columns under the names that the function has for them."
    )
    scale: float = Field(default=1.0, allow_inf_nan=False, description="Factor of what the function returns.")
    shift: float = Field(default=0.0, allow_inf_nan=False, description="Added to what the function returns, scaled.")
    clip: tuple[float, float] | None = Field(
        default=None, description="Lowest and highest value, after scale and shift."
    )
    timeout: float | None = Field(
        default=None, gt=0, description="Seconds a call may take; a later answer counts as failed."
    )

    @model_validator(mode="after")
    def _clip_has_an_order(self) -> "RewardSpec":
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip={list(self.clip)} has no room; give the lower bound first")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_rare(self, handler: Any) -> dict[str, Any]:
        """A config that is written down says of most rewards what they are and what they count."""
        rare = {"columns": {}, "scale": 1.0, "shift": 0.0, "clip": None, "timeout": None}
        return {name: value for name, value in handler(self).items() if name not in rare or value != rare[name]}
