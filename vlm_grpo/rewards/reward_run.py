"""The folder of a trained reward model: what it must hold to be a reward, looked at before a model is loaded."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import MediaOptions, RunConfig, load_config
from ..errors import RewardError, VLMGRPOError
from ..models import REWARD_MODEL, is_adapter, is_reward_model

if TYPE_CHECKING:
    from ..judging.prompt import JudgePrompt

_CONFIG = "config.yaml"
_BEGUN = "# vlm-grpo reward-train"  # how the config of a run that trains one begins
_ADAPTER, _WHOLE = ("adapter_model.*",), ("model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class RewardRun:
    """A trained reward model: a finished run, or one of its checkpoints.

    Attributes:
        folder: where it is, absolute.
        adapter: whether its weights are an adapter, or a whole model.
        base: what the adapter stands on, an absolute folder or a hub name; the folder itself for a whole model.
        facts: what ``reward_model.json`` holds.
        prompt: how it is asked.
        config: of the run that trained it, where that is there.
        mark: another one as soon as it has been trained anew, or is asked otherwise.
    """

    folder: Path
    adapter: bool
    base: str
    facts: dict[str, Any]
    prompt: "JudgePrompt"
    config: RunConfig | None
    mark: str

    @property
    def in_4bit(self) -> bool:
        """Whether its base had 4-bit weights."""
        return bool(self.facts.get("load_in_4bit"))

    @property
    def with_captions(self) -> bool:
        """Whether it read captions in training."""
        return bool(self.facts.get("captions"))

    @property
    def media(self) -> MediaOptions:
        """How its media were opened in training."""
        told = (self.facts.get("media") or {}).items()
        known = {key: value for key, value in told if key in MediaOptions.model_fields}
        return self.config.media if self.config else MediaOptions(**known)

    @property
    def template(self) -> dict[str, Any]:
        """Keyword arguments of the chat template, as in training."""
        return dict(self.config.train.get("chat_template_kwargs") or {}) if self.config else {}

    @property
    def dtype(self) -> Any:
        """The number type of its weights, as in training; that of a whole model that was trained is float32."""
        dtype = self.config.dtype if self.config else "auto"
        return "float32" if dtype == "auto" and not self.adapter else dtype

    @classmethod
    def read(cls, name: str | Path) -> "RewardRun":
        """The reward model in a folder.

        Raises:
            RewardError: something of it is missing, or its base is gone.
        """
        from ..judging.prompt import JudgePrompt
        from ..models.heads import HEAD_FILE
        from ..models.hf import adapter_base

        folder = Path(name).expanduser().resolve()
        if not folder.is_dir():
            raise RewardError(f'The reward model "{name}" does not exist. Give the folder of a finished reward model.')
        facts = _facts(folder, name)
        adapter = is_adapter(str(folder))
        if not adapter and not (folder / "config.json").is_file():
            raise _lacks(name, "adapter_config.json")
        if not any(file for pattern in (_ADAPTER if adapter else _WHOLE) for file in folder.glob(pattern)):
            raise _lacks(name, f"{'adapter_' if adapter else ''}model.safetensors")
        if not (folder / HEAD_FILE).is_file():
            raise _lacks(name, HEAD_FILE)
        # A checkpoint belongs to the run that it lies in.
        home = folder.parent if folder.name.startswith("checkpoint-") else folder
        with naming(name):
            base = adapter_base(str(folder)) if adapter else str(folder)
            config = load_config(home / _CONFIG) if (home / _CONFIG).is_file() else None
            prompt = JudgePrompt.load(folder)
            # The head is always trained, and small.
            mark = hashlib.sha256((folder / HEAD_FILE).read_bytes() + repr(prompt).encode()).hexdigest()
            return cls(folder, adapter, base, facts, prompt, config, mark)


@contextmanager
def naming(name: Any) -> Iterator[None]:
    """What goes wrong within is said of the reward model.

    Raises:
        RewardError: in the place of any error of ours.
    """
    try:
        yield
    except RewardError:
        raise
    except VLMGRPOError as error:
        raise RewardError(f'The reward model "{name}": {error}') from error


def is_reward_run(name: Any) -> bool:
    """Whether a folder holds a reward model, finished or not.

    Raises:
        RewardError: one that is being trained, or whose training was stopped.
    """
    if not isinstance(name, str | Path):
        return False
    if is_reward_model(name):
        return True
    config = Path(name).expanduser() / _CONFIG
    if config.is_file() and config.read_text(encoding="utf-8").startswith(_BEGUN):
        raise RewardError(
            f'The reward model "{name}" is not finished: it has no {REWARD_MODEL}. Start its training again '
            f"(vlm-grpo reward train {config}), which goes on where it stopped."
        )
    return False


def _facts(folder: Path, name: Any) -> dict[str, Any]:
    if not is_reward_run(name):
        raise RewardError(
            f'"{name}" holds no {REWARD_MODEL}, so that it is no reward model of vlm-grpo reward train. Give such a '
            "folder."
        )
    try:
        facts = json.loads((folder / REWARD_MODEL).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RewardError(f"{folder / REWARD_MODEL} is no JSON ({error}). Restore the file.") from error
    if not isinstance(facts, dict):
        raise RewardError(f"{folder / REWARD_MODEL} holds no facts about a reward model. Restore the file.")
    return facts


def _lacks(name: Any, file: str) -> RewardError:
    return RewardError(f'The reward model "{name}" lacks {file}. Restore the file, or train it again.')
