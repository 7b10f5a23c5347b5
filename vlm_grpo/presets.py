"""Published hyper-parameters of other projects, by name: each value with its source. No torch here.

A preset is the lowest layer of a config: whatever the file or the command line says wins.
"""

from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, nearest


@dataclass(frozen=True)
class Setting:
    """One option of a preset.

    Attributes:
        key: ours, dotted.
        value: as YAML would give it.
        source: where it is published, and what it was called there.
    """

    key: str
    value: Any
    source: str


@dataclass(frozen=True)
class Preset:
    """What one project trains with.

    Attributes:
        about: the project and the job, in a line.
        settings: its options.
    """

    about: str
    settings: tuple[Setting, ...]


_UNSLOTH = "its usual run"
_QWEN_VIDEO = "the project's README"
_OMNI = "src/r1-v/run_grpo_humanomni.sh"
_OMNI_TRAINER = "humanOmni_grpo_trainer.py"
_TRL = "the default of the TRL it was written for"
_FACTUAL = "RLHF/scripts/7b-v1.5-224/train_rl_model.sh"
_FACTUAL_DEFAULT = "the default in RLHF/finetune_lora_ppo.py"
_FACTUAL_TRAINER = "RLHF/models/ppo_trainer.py"
_FACTUAL_START = "RLHF/scripts/7b-v1.5-224/initialize_policy_model.sh"
_AUDIO = "the default of the TRL PPOConfig it was written for"

PRESETS: dict[str, Preset] = {
    "unsloth-vlm": Preset(
        "GRPO for Unsloth's vision models: small groups on one consumer GPU, 4 bits, LoRA",
        (
            Setting("load_in_4bit", True, f"{_UNSLOTH}: FastVisionModel in 4 bits"),
            Setting("lora.r", 16, f"{_UNSLOTH}: r"),
            Setting("lora.alpha", 16, f"{_UNSLOTH}: lora_alpha"),
            Setting("train.learning_rate", 5e-6, f"{_UNSLOTH}: learning_rate"),
            Setting("train.optim", "adamw_8bit", f"{_UNSLOTH}: optim"),
            Setting("train.lr_scheduler_type", "cosine", f"{_UNSLOTH}: lr_scheduler_type"),
            Setting("train.max_grad_norm", 0.1, f"{_UNSLOTH}: max_grad_norm"),
            Setting("train.per_device_train_batch_size", 2, f"{_UNSLOTH}: per_device_train_batch_size"),
            Setting("train.gradient_accumulation_steps", 4, f"{_UNSLOTH}: gradient_accumulation_steps"),
            Setting("train.num_generations", 2, f"{_UNSLOTH}: num_generations"),
        ),
    ),
    "qwen-video": Preset(
        "GRPO for video understanding with Qwen-VL: which of the listed actions happen in the clip?",
        (
            Setting(
                "rewards",
                [{"name": "format", "weight": 0.3}, {"name": "actions", "weight": 0.7}],
                f"{_QWEN_VIDEO}: 0.3 format + 0.7 accuracy over sets of actions",
            ),
            Setting("train.beta", 0.1, f"{_QWEN_VIDEO}: grpo_beta"),
            Setting("train.num_generations", 4, f"{_QWEN_VIDEO}: grpo_sample_num"),
            Setting("train.temperature", 0.7, f"{_QWEN_VIDEO}: temperature"),
            Setting("train.top_p", 0.9, f"{_QWEN_VIDEO}: top_p"),
            Setting("train.learning_rate", 2e-5, f"{_QWEN_VIDEO}: learning_rate"),
        ),
    ),
    "r1-omni": Preset(
        "R1-Omni, emotions in videos with sound: think, then name the label; the plain per-sequence loss",
        (
            Setting(
                "rewards",
                [{"name": "accuracy", "kwargs": {"method": "math"}}, {"name": "format", "kwargs": {"strict": True}}],
                "src/open_r1/grpo.py: accuracy (symbolic, then <answer> bodies) and format, weight 1 each",
            ),
            Setting("train.loss_type", "grpo", f"{_OMNI_TRAINER}: mean over the sequence, then the batch"),
            Setting("train.scale_rewards", "group", f"{_OMNI_TRAINER}: (r - mean) / (std + 1e-4)"),
            Setting("train.beta", 0.04, _TRL),
            Setting("train.learning_rate", 1e-6, _TRL),
            Setting("train.num_generations", 8, f"{_OMNI}: num_generations"),
            Setting("train.temperature", 1.0, f"{_OMNI_TRAINER}: temperature"),
            Setting("train.max_completion_length", 512, f"{_OMNI}: max_completion_length"),
            Setting(
                "train.gradient_accumulation_steps", 2, f"{_OMNI}: gradient_accumulation_steps, of one prompt each"
            ),
            Setting("train.num_train_epochs", 2, f"{_OMNI}: num_train_epochs"),
            Setting("media.min_pixels", 3136, f"{_OMNI_TRAINER}: min_pixels"),
            Setting("media.max_pixels", 12845056, f"{_OMNI_TRAINER}: max_pixels; more than 24 GB hold"),
            Setting("media.audio_in_video", True, "videos are heard too"),
        ),
    ),
    "llava-rlhf": Preset(
        "LLaVA-RLHF, PPO for answers that the picture supports: its rules beside the score of a reward model, which is "
        "yours and has to be added: rewards: [{model: RUN, captions: FILE}, caption_type, length_bonus]",
        (
            Setting("algorithm", "ppo", _FACTUAL_TRAINER),
            Setting(
                "rewards",
                [{"name": "caption_type"}, {"name": "length_bonus"}],
                f"{_FACTUAL}: correct_bonus_score 2 and length_bonus_score -10, which these rewards multiply by",
            ),
            Setting("load_in_4bit", True, "RLHF/models/qlora_model.py: one base in 4 bits under all adapters"),
            Setting("lora.r", 64, f"{_FACTUAL_START}: lora_r"),
            Setting("lora.alpha", 16, "RLHF/finetune_lora_sft_ds.py: lora_alpha"),
            Setting("lora.language", True, f"{_FACTUAL_START}: lora_modules, of the language model"),
            Setting("lora.vision", False, "the vision tower stays frozen"),
            Setting("lora.attention", True, f"{_FACTUAL_START}: lora_modules q_proj, k_proj, v_proj, o_proj"),
            Setting("lora.mlp", True, f"{_FACTUAL_START}: lora_modules gate_proj, up_proj, down_proj"),
            Setting("train.kl_coef", 0.1, f"{_FACTUAL}: kl_coef; adaptive_kl is off"),
            Setting("train.kl_estimator", "k1_clamped", f"{_FACTUAL_TRAINER}: kl_approximator k1, at least 0"),
            Setting("train.gamma", 1.0, f"{_FACTUAL_DEFAULT}: gamma"),
            Setting("train.lam", 1.0, f"{_FACTUAL_DEFAULT}: lam"),
            Setting("train.whiten_advantages", True, f"{_FACTUAL_TRAINER}: whiten(advantages)"),
            Setting("train.whiten_rewards", False, f"{_FACTUAL}: whiten_rewards"),
            Setting("train.epsilon", 0.2, f"{_FACTUAL_DEFAULT}: cliprange"),
            Setting("train.cliprange_value", 0.2, f"{_FACTUAL_DEFAULT}: cliprange_value"),
            Setting("train.vf_coef", 0.1, f"{_FACTUAL_DEFAULT}: vf_coef"),
            Setting("train.num_iterations", 2, f"{_FACTUAL}: noptepochs"),
            Setting("train.num_generations", 1, f"{_FACTUAL_TRAINER}: one response a query"),
            Setting("train.temperature", 1.0, f"{_FACTUAL}: temperature"),
            Setting("train.max_completion_length", 896, f"{_FACTUAL}: response_len"),
            Setting("train.missing_eos_penalty", 8.0, f"{_FACTUAL}: penalty_reward_value -8, added to the score"),
            Setting("train.learning_rate", 3e-5, f"{_FACTUAL}: learning_rate"),
            Setting("train.lr_scheduler_type", "cosine", f"{_FACTUAL}: lr_scheduler_type"),
            Setting("train.warmup_steps", 5, f"{_FACTUAL}: warmup_steps"),
            Setting("train.max_grad_norm", 1.0, f"{_FACTUAL}: max_grad_norm"),
            Setting("train.num_train_epochs", 4, f"{_FACTUAL}: total_epochs"),
        ),
    ),
    "qwen2-audio-ppo": Preset(
        "PPO for Qwen2-Audio: transcripts, with an adaptive KL penalty",
        (
            Setting("algorithm", "ppo", "its PPO trainer, with a value head"),
            Setting(
                "rewards",
                [{"name": "asr", "kwargs": {"variant": "ppo"}}],
                "its PPO reward: 3 (char + word + token similarity), -10 empty, -2 far too short or long",
            ),
            Setting("train.kl_coef", 0.2, f"{_AUDIO}: init_kl_coef"),
            Setting("train.kl_target", 6.0, f"{_AUDIO}: target, with adap_kl_ctrl"),
            Setting("train.kl_horizon", 10000, f"{_AUDIO}: horizon"),
            Setting("train.gamma", 1.0, f"{_AUDIO}: gamma"),
            Setting("train.lam", 0.95, f"{_AUDIO}: lam"),
            Setting("train.epsilon", 0.2, f"{_AUDIO}: cliprange"),
            Setting("train.cliprange_value", 0.2, f"{_AUDIO}: cliprange_value"),
            Setting("train.vf_coef", 0.1, f"{_AUDIO}: vf_coef"),
            Setting("train.num_iterations", 4, f"{_AUDIO}: ppo_epochs"),
        ),
    ),
}


def preset_layer(name: Any) -> dict[str, Any]:
    """The options of a preset as a config file would hold them.

    Raises:
        ConfigError: no such preset; the message lists them.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(
            f"preset={name}: there is no such preset.{nearest(str(name), list(PRESETS))} There are: "
            f"{', '.join(PRESETS)}."
        )
    layer: dict[str, Any] = {}
    for setting in PRESETS[name].settings:
        section, _, key = setting.key.rpartition(".")
        (layer.setdefault(section, {}) if section else layer)[key] = setting.value
    return layer
