"""What one measurement is made of; the defaults are the fixed shape that published figures refer to."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import ConfigError

Modality = Literal["image", "video", "audio"]
Device = Literal["cpu", "cuda"]
ShapeName = Literal["tiny", "qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen2-audio-7b"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
_PROMPT: dict[Modality, int] = {"image": 960, "video": 1100, "audio": 800}
_COMPLETION: dict[Modality, int] = {"image": 100, "video": 100, "audio": 30}


@dataclass(frozen=True)
class BenchOptions:
    """One case. ``None`` is what suits the modality.

    Attributes:
        modality: what the prompts hold beside their text.
        prompt_tokens: target P of tokens a prompt, media included; by default 960 (image), 1100 (video), 800 (audio),
            or what fits ``media_tokens``.
        media_tokens: how many of them are the medium's; by default all but some 60.
        max_completion_length: C tokens of every completion (none ends earlier); by default 100, for audio 30.
        num_generations: G completions of the one prompt of a step.
        beta: weight of the KL term; above 0 there are reference log-probabilities.
        train_vision: LoRA adapters in the vision tower too.
        rounds: measured pairs of steps, after two that warm up.
        threads: of torch on the CPU.
        device: where both trainers run.
        bf16: base weights and arithmetic in bf16 instead of fp32.
        gradient_checkpointing: of both trainers.
        group_sharing: of ours; True makes a fallback an error.
        seed: of weights, media and sampling.
        hidden_size, num_hidden_layers, vocab_size: of the language model; heads are 64 wide.
        vision_hidden_size, vision_depth: of the vision or audio tower.

    Raises:
        ConfigError: values that cannot work.
    """

    modality: Modality = "image"
    prompt_tokens: int | None = None
    media_tokens: int | None = None
    max_completion_length: int | None = None
    num_generations: int = 8
    beta: float = 0.0
    train_vision: bool = False
    rounds: int = 3
    threads: int = 1
    device: Device = "cpu"
    bf16: bool = False
    gradient_checkpointing: bool = True
    group_sharing: Literal["auto"] | bool = True
    seed: int = 0
    hidden_size: int = 384
    num_hidden_layers: int = 6
    vocab_size: int = 8192
    vision_hidden_size: int = 192
    vision_depth: int = 5

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise ConfigError(f'modality="{self.modality}": there is none such. Use {", ".join(MODALITIES)}.')
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value}: needs {least} or more. Correct the value.")
        for name in ("hidden_size", "vision_hidden_size"):
            if getattr(self, name) % 64:
                raise ConfigError(f"{name}={getattr(self, name)}: needs a multiple of 64, the width of a head.")
        if self.train_vision and self.modality == "audio":
            raise ConfigError(
                "train_vision: the audio model has no vision tower. Leave it out, or use --modality image."
            )

    @property
    def text_words(self) -> int:
        """Words of the prompt's text where nothing else decides."""
        return 60 if self.prompt_tokens is None else min(60, self.prompt_tokens // 8)

    @property
    def target(self) -> int | None:
        """P; None where the medium's tokens decide."""
        given = self.prompt_tokens is not None or self.media_tokens is not None
        return self.prompt_tokens if given else _PROMPT[self.modality]

    @property
    def completion(self) -> int:
        """C."""
        return self.max_completion_length or _COMPLETION[self.modality]

    def changes(self) -> dict[str, tuple[Any, Any]]:
        """What differs from the fixed shape: name to (default, value)."""
        usual = {**dataclasses.asdict(BenchOptions()), "prompt_tokens": _PROMPT[self.modality]}
        usual["max_completion_length"] = _COMPLETION[self.modality]
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        chosen = {name: (usual[name], value) for name, value in values.items() if value != usual[name]}
        for measured_only in ("modality", "rounds", "seed"):
            chosen.pop(measured_only, None)
        return chosen


_LEAST: dict[str, int] = {
    **dict.fromkeys(("media_tokens", "max_completion_length", "rounds", "threads"), 1),
    **dict.fromkeys(("num_hidden_layers", "vision_depth"), 1),
    **dict.fromkeys(("hidden_size", "vision_hidden_size"), 64),
    **dict.fromkeys(("beta", "seed"), 0),
    "num_generations": 2,
    "prompt_tokens": 32,
    "vocab_size": 64,
}
