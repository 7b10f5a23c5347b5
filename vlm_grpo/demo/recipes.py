"""What differs between the demos: rows, model, figures of the training, and how a row is drawn."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import motion, speech
from .digits import LABELS, write_digits
from .models import save_tiny_audio_model, save_tiny_model
from .motion import write_clips
from .speech import write_words

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..media import Medium


@dataclass(frozen=True)
class Recipe:
    """One modality's demo.

    Attributes:
        rows: what its rows are called.
        blanked: how the control is called.
        labels: rows whose answer the warm start learns.
        write_data: writes ``labels.jsonl``, ``train.jsonl`` and ``held-out.jsonl`` into a folder, for a seed; with
            ``reversed.jsonl`` too where a medium played backwards has another answer.
        save_model: writes a model with random weights into a folder, for a seed.
        picture: draws a medium for the contact sheet.
        cell: width and height of a picture there, in pixels; with ``columns`` of them in a row.
        warm: options of the warm start. It is deliberately short: the policy stays mediocre and still explores.
        grpo: options of GRPO, with LoRA adapters of ``lora``.
        full: what differs in ``grpo`` where all weights are trained.
        ppo: what differs in ``grpo`` where PPO is the algorithm; empty where that is not shown. With ``ppo_rewards``.
    """

    rows: str
    blanked: str
    labels: int
    write_data: Callable[[Path, int], None]
    save_model: Callable[[Path, int], None]
    picture: Callable[["Medium"], "Image"]
    warm: dict[str, Any]
    grpo: dict[str, Any]
    full: dict[str, Any]
    ppo: dict[str, Any] = field(default_factory=dict)
    ppo_rewards: tuple[Any, ...] = ("accuracy",)
    lora: dict[str, Any] = field(default_factory=lambda: {"r": 32, "alpha": 32, "targets": "all-linear"})
    cell: tuple[int, int] = (120, 120)
    columns: int = 10


_WARM = {
    "max_steps": 30,
    "per_device_train_batch_size": 48,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "completion_column": "answer",
    "per_device_eval_batch_size": 64,
}
_GRPO = {
    "max_steps": 200,
    "num_generations": 8,
    "per_device_train_batch_size": 256,
    "learning_rate": 4e-3,
    "warmup_steps": 20,
    "max_grad_norm": 1.0,
    "max_completion_length": 2,
    "save_steps": 50,
    "per_device_eval_batch_size": 64,
    "gradient_checkpointing": False,  # there is memory to spare, and not a second
}
# Each rollout twice; answers are two tokens, so the whole of their reward reaches the first.
_PPO = {"num_iterations": 2, "max_steps": 260, "lam": 1.0}


def _film(medium: "Medium") -> "Image":
    from ..report import filmstrip

    return filmstrip(medium.open_video().frames)


def _sound(medium: "Medium") -> "Image":
    from ..report import spectrogram

    return spectrogram(medium.open_audio(speech.RATE), speech.RATE)


RECIPES = {
    "image": Recipe(
        rows="digits",
        blanked="images blanked",
        labels=LABELS,
        write_data=write_digits,
        save_model=save_tiny_model,
        picture=lambda medium: medium.open(),
        warm=dict(_WARM),
        grpo=dict(_GRPO),
        full={"learning_rate": 1e-3},  # a quarter of the adapters' rate
        ppo=dict(_PPO),
    ),
    "video": Recipe(
        rows="clips",
        blanked="frames blanked",
        labels=motion.LABELS,
        write_data=write_clips,
        save_model=partial(save_tiny_model, question=motion.QUESTION, answers=tuple(motion.DIRECTIONS)),
        picture=_film,
        warm={**_WARM, "max_steps": 60},
        grpo={**_GRPO, "max_steps": 100},
        full={"learning_rate": 1e-3},
        cell=(300, 72),
        columns=4,
    ),
    "audio": Recipe(
        rows="words",
        blanked="sounds silenced",
        labels=speech.LABELS,
        write_data=write_words,
        save_model=partial(save_tiny_audio_model, question=speech.QUESTION),
        picture=_sound,
        warm={**_WARM, "max_steps": 60},
        grpo={**_GRPO, "max_steps": 120},
        full={"learning_rate": 1e-3},
        ppo={**_PPO, "max_steps": 160, "normalize_scores": True},
        ppo_rewards=({"name": "asr", "kwargs": {"variant": "ppo"}}, "accuracy=0"),
        cell=(150, 90),
        columns=8,
    ),
}
