"""Teach a multimodal model a checkable skill by reinforcement learning, on one 24 GB card.

Importing this package loads neither torch nor trl, so Unsloth may still be imported first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "VLMGRPOTrainer": "trainer",
    "VLMGRPOConfig": "trainer_config",
    "VLMPPOTrainer": "ppo",
    "VLMPPOConfig": "ppo_config",
    "VLMSFTTrainer": "sft",
    "VLMSFTConfig": "sft",
    "VLMRewardTrainer": "reward_model",
    "VLMRewardConfig": "reward_model",
    "LoraOptions": "config",
    "MediaOptions": "config",
    "RunConfig": "config",
    "load_model": "models",
    "load_data": "data",
    "scan_media": "data.scan",
    "load_rewards": "rewards",
    "JudgeReward": "rewards.judge",
    "export_run": "export",
    "evaluate_run": "evaluating",
    "apply_unsloth_patch": "patches.unsloth",
    "undo_unsloth_patch": "patches.unsloth",
    "unsloth_patch": "patches.unsloth",
    "VLMGRPOError": "errors",
}
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from .config import LoraOptions as LoraOptions
    from .config import MediaOptions as MediaOptions
    from .config import RunConfig as RunConfig
    from .data import load_data as load_data
    from .data.scan import scan_media as scan_media
    from .errors import VLMGRPOError as VLMGRPOError
    from .evaluating import evaluate_run as evaluate_run
    from .export import export_run as export_run
    from .models import load_model as load_model
    from .patches.unsloth import apply_unsloth_patch as apply_unsloth_patch
    from .patches.unsloth import undo_unsloth_patch as undo_unsloth_patch
    from .patches.unsloth import unsloth_patch as unsloth_patch
    from .ppo import VLMPPOTrainer as VLMPPOTrainer
    from .ppo_config import VLMPPOConfig as VLMPPOConfig
    from .reward_model import VLMRewardConfig as VLMRewardConfig
    from .reward_model import VLMRewardTrainer as VLMRewardTrainer
    from .rewards import load_rewards as load_rewards
    from .rewards.judge import JudgeReward as JudgeReward
    from .sft import VLMSFTConfig as VLMSFTConfig
    from .sft import VLMSFTTrainer as VLMSFTTrainer
    from .trainer import VLMGRPOTrainer as VLMGRPOTrainer
    from .trainer_config import VLMGRPOConfig as VLMGRPOConfig


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
