"""Numbers of a run that cannot work, refused before a model is loaded."""

import math
import sys
from typing import Any

from .errors import ConfigError

_TINY = sys.float_info.min
# The least and the most that works. Torch and transformers look at these in the first step, or never.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, math.inf)),
    **dict.fromkeys(("gradient_accumulation_steps", "num_iterations", "max_completion_length"), (1, math.inf)),
    **dict.fromkeys(("steps_per_generation", "generation_batch_size", "max_prompt_length"), (1, math.inf)),
    **dict.fromkeys(("vision_learning_rate", "audio_learning_rate", "projector_learning_rate"), (0, math.inf)),
    **dict.fromkeys(("learning_rate", "max_grad_norm", "beta", "epsilon", "top_k"), (0, math.inf)),
    **dict.fromkeys(("top_entropy_quantile", "min_p", "max_reward_failures"), (0, 1)),
    **dict.fromkeys(("kl_coef", "vf_coef", "missing_eos_penalty", "value_learning_rate"), (0, math.inf)),
    **dict.fromkeys(("kl_target", "kl_horizon", "cliprange_value", "score_clip"), (_TINY, math.inf)),
    **dict.fromkeys(("gamma", "lam"), (0, 1)),
    "temperature": (_TINY, math.inf),
    "top_p": (_TINY, 1),
    "seed": (0, 2**32 - 1),
    "dataloader_num_workers": (0, math.inf),
    "resample_dead_groups": (0, math.inf),
}


def check_ranges(config: Any) -> None:
    """Refuse a number that cannot work, before a model is loaded."""
    for name, (low, high) in _RANGES.items():
        value = getattr(config, name, None)
        if value is not None and not low <= value <= high:
            least = "more than 0" if low == _TINY else f"{low} or more"
            most = "" if high == math.inf else f", at most {high}"
            raise ConfigError(f"{name}={value}: needs {least}{most}. Correct the value.")
