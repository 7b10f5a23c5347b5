"""The sections of a run's config. No torch here."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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


class RewardSpec(Options):
    """One reward function and its weight."""

    name: str = Field(min_length=1, description='A built-in reward, or "file.py:function", or "module:function".')
    weight: float = Field(default=1.0, allow_inf_nan=False, description="Factor of this reward in the total.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments bound to the reward function.")
