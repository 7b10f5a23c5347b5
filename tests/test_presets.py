"""Presets: every value resolves, has a source, and gives way to what the user says."""

import pytest

from vlm_grpo import load_rewards
from vlm_grpo.config import load_config, resolved, to_yaml
from vlm_grpo.errors import ConfigError
from vlm_grpo.ppo_config import VLMPPOConfig
from vlm_grpo.presets import PRESETS
from vlm_grpo.trainer_config import VLMGRPOConfig, build_args

# Written down from the projects' pages, apart from the table in the code.
PUBLISHED = {
    "unsloth-vlm": {
        "load_in_4bit": True,
        "lora.r": 16,
        "lora.alpha": 16,
        "train.learning_rate": 5e-6,
        "train.optim": "adamw_8bit",
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 4,
        "train.num_generations": 2,
        "train.lr_scheduler_type": "cosine",
        "train.max_grad_norm": 0.1,
    },
    "qwen-video": {
        "train.beta": 0.1,
        "train.num_generations": 4,
        "train.temperature": 0.7,
        "train.top_p": 0.9,
        "train.learning_rate": 2e-5,
    },
    "r1-omni": {
        "train.loss_type": "grpo",
        "train.scale_rewards": "group",
        "media.min_pixels": 3136,
        "media.max_pixels": 12845056,
    },
    "llava-rlhf": {
        "algorithm": "ppo",
        "load_in_4bit": True,
        "lora.r": 64,
        "lora.alpha": 16,
        "train.kl_coef": 0.1,
        "train.kl_estimator": "k1_clamped",
        "train.lam": 1.0,
        "train.num_iterations": 2,
        "train.missing_eos_penalty": 8.0,
        "train.learning_rate": 3e-5,
        "train.lr_scheduler_type": "cosine",
    },
    "qwen2-audio-ppo": {
        "algorithm": "ppo",
        "train.kl_coef": 0.2,
        "train.kl_target": 6.0,
        "train.kl_horizon": 10000,
        "train.lam": 0.95,
        "train.num_iterations": 4,
    },
}
REWARDS = {
    "unsloth-vlm": [],
    "qwen-video": [("format", 0.3, {}), ("actions", 0.7, {})],
    "r1-omni": [("accuracy", 1.0, {"method": "math"}), ("format", 1.0, {"strict": True})],
    "llava-rlhf": [("caption_type", 1.0, {}), ("length_bonus", 1.0, {})],
    "qwen2-audio-ppo": [("asr", 1.0, {"variant": "ppo"})],
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_resolves(name, tmp_path):
    # covers Q5, Q7, O5, U1
    config = load_config(None, None, {"preset": name, "model": "m", "output": str(tmp_path)})
    plain = resolved(config)
    for key, expected in PUBLISHED[name].items():
        section, _, last = key.rpartition(".")
        assert (plain[section] if section else plain)[last] == expected, key
    assert [(spec.name, spec.weight, spec.kwargs) for spec in config.rewards] == REWARDS[name]
    cls = VLMPPOConfig if config.algorithm == "ppo" else VLMGRPOConfig
    args = build_args(cls, config.train, output_dir=str(tmp_path))
    for key, expected in PUBLISHED[name].items():
        if key.startswith("train."):
            value = getattr(args, key[6:])
            assert getattr(value, "value", value) == expected, "and TRL takes it"
    if config.rewards:
        assert len(load_rewards(config.rewards)[0]) == len(config.rewards)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert resolved(load_config(tmp_path / "config.yaml")) == plain, "a run folder's config reads back"


def test_every_value_has_a_source_and_all_of_them_are_tested():
    assert set(PUBLISHED) == set(PRESETS) == set(REWARDS)
    for preset in PRESETS.values():
        assert preset.about and all(setting.source for setting in preset.settings)


def test_what_the_user_says_wins(tmp_path):
    (tmp_path / "run.yaml").write_text("preset: qwen-video\nmodel: m\nrewards: [accuracy]\ntrain: {beta: 0}\n")
    config = load_config(tmp_path / "run.yaml", ["train.top_p=1"], {"num_generations": 6})
    assert (config.train["beta"], config.train["top_p"], config.train["num_generations"]) == (0, 1, 6)
    assert [spec.name for spec in config.rewards] == ["accuracy"] and config.train["learning_rate"] == 2e-5
    assert load_config(tmp_path / "run.yaml", None, {"preset": "r1-omni"}).train["beta"] == 0
    with pytest.raises(ConfigError, match='preset=qwen-vide: there is no such preset. Did you mean "qwen-video"'):
        load_config(tmp_path / "run.yaml", None, {"preset": "qwen-vide"})
    with pytest.raises(ConfigError, match=r"preset=\['a'\]: there is no such preset"):
        load_config(None, None, {"preset": ["a"], "model": "m"})
