"""Trainer options: TRL's own class, our defaults, precision by machine, and every refusal in one sentence."""

import copy
import dataclasses
import inspect
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.trainer.grpo_config
import trl.trainer.grpo_trainer
from transformers import TrainingArguments

from vlm_grpo.config import load_config, require
from vlm_grpo.errors import ConfigError, UnsupportedError, VLMGRPOError
from vlm_grpo.patches.own import private_copy
from vlm_grpo.patches.trl import own_grpo_config
from vlm_grpo.ppo_config import VLMPPOConfig
from vlm_grpo.reward_model import VLMRewardConfig
from vlm_grpo.trainer_config import (
    _CHOICES,
    VLMGRPOConfig,
    _coerced,
    _default,
    _hints,
    build_args,
    native_precision,
    resolve_precision,
    train_options,
)

CONFIGS = sorted((Path(__file__).parents[1] / "examples" / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def machine(monkeypatch: pytest.MonkeyPatch, *, accelerator: bool, cuda: bool, native: bool, emulated: bool) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: emulated if including_emulation else native
    )


CPU = {"accelerator": False, "cuda": False, "native": False, "emulated": False}
TURING = {"accelerator": True, "cuda": True, "native": False, "emulated": True}
AMPERE = {"accelerator": True, "cuda": True, "native": True, "emulated": True}


@pytest.mark.parametrize(
    ("where", "given", "expected"),
    [
        (CPU, {}, (False, False, True)),
        (TURING, {}, (False, True, False)),
        (AMPERE, {}, (True, False, False)),
        (AMPERE, {"use_cpu": True}, (False, False, True)),
        (AMPERE, {"fp16": True}, (False, True, False)),
        (AMPERE, {"bf16": False}, (False, False, False)),
        (TURING, {"bf16": True}, (True, False, False)),
        (CPU, {"bf16": True}, (True, False, True)),
    ],
)
def test_precision_left_unset_follows_the_machine(
    where: dict[str, bool], given: dict[str, bool], expected: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
):
    machine(monkeypatch, **where)
    args = SimpleNamespace(**{"bf16": None, "fp16": False, "use_cpu": False, **given})
    resolve_precision(args)
    assert (args.bf16, args.fp16, args.use_cpu) == expected
    if not given:
        assert native_precision() == ("bf16" if expected[0] else "fp16" if expected[1] else "fp32")


def test_fp16_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    machine(monkeypatch, **CPU)
    with pytest.raises(ConfigError, match="fp16=True needs a GPU"):
        VLMGRPOConfig(fp16=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 8), ({"num_generations": 3}, 3), ({"num_generations": 4, "per_device_train_batch_size": 8}, 8)],
)
def test_a_micro_batch_is_a_whole_group_unless_said_otherwise(options: dict[str, Any], expected: int):
    assert VLMGRPOConfig("out", **options).per_device_train_batch_size == expected


def test_defaults_are_trls_but_for_ours():
    theirs = {option.name: _default(option) for option in dataclasses.fields(own_grpo_config())}
    ours = {option.name: _default(option) for option in dataclasses.fields(VLMGRPOConfig)}
    assert {name: ours[name] for name in ours if name not in theirs or ours[name] != theirs[name]} == {
        "disable_dropout": True,
        "per_device_train_batch_size": None,
        "gradient_check": True,
        "gradient_report": False,
        "flow_check": True,
        "max_prompt_length": None,
        "on_overlong": "drop",
        "resample_dead_groups": 0,
        "max_reward_failures": 0.5,
        "group_sharing": "auto",
        "group_attention": "reference",
        **dict.fromkeys(("vision_learning_rate", "audio_learning_rate", "projector_learning_rate")),
    }
    for name in ("disable_dropout", "gradient_check", "gradient_report", "flow_check", "max_prompt_length"):
        assert "%" not in VLMGRPOConfig.__dataclass_fields__[name].metadata["help"], (
            "argparse would take it as a format"
        )


def test_a_plain_config_keeps_every_value():  # covers U5
    plain = own_grpo_config()(
        use_cpu=True, bf16=False, num_generations=4, steps_per_generation=3, beta=0.1, scale_rewards=False
    )
    before = dict(plain.__dict__)
    config = VLMGRPOConfig.of(plain)
    assert {name: config.__dict__[name] for name in before} == before, "steps_per_generation is not derived again"
    assert (config.gradient_check, config.gradient_report) == (True, False)
    assert config.disable_dropout is False, "the plain config says so"
    assert plain.__dict__ == before and type(plain) is own_grpo_config(), "and stays what it was"
    assert config.generation_batch_size == 24 and config.scale_rewards == "none"
    assert VLMGRPOConfig.of(config) is config
    assert pickle.loads(pickle.dumps(config)).beta == copy.deepcopy(config).beta == 0.1
    assert config.to_dict()["gradient_check"] is True


def test_another_librarys_generated_config_is_accepted():  # covers U5
    other = private_copy(trl.trainer.grpo_config).GRPOConfig
    assert not issubclass(other, own_grpo_config())

    @dataclasses.dataclass
    class Generated(other):  # as Unsloth's: more fields, and None where it means the default
        unsloth_num_chunks: int = -1

    plain = Generated(use_cpu=True, bf16=False, learning_rate=5e-5, num_generations=2)
    plain.beta = None  # type: ignore[assignment]
    config = VLMGRPOConfig.of(plain)
    assert isinstance(config, own_grpo_config())
    assert (config.learning_rate, config.num_generations, config.beta) == (5e-5, 2, 0.0)
    assert plain.beta is None


def test_none_means_the_defaults_and_anything_else_is_refused():
    config = VLMGRPOConfig.of(None)
    assert config.gradient_check and config.disable_dropout
    with pytest.raises(ConfigError, match="args is a TrainingArguments, which has no num_generations"):
        VLMGRPOConfig.of(TrainingArguments(use_cpu=True))


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"num_generations": 1}, ConfigError, "num_generations=1: GRPO compares"),
        (
            {"num_generations": 3, "per_device_train_batch_size": 8},
            ConfigError,
            "num_generations=3 does not divide the 8 completions",
        ),
        (
            {"generation_batch_size": 12, "per_device_train_batch_size": 8},
            ConfigError,
            "must be divisible by the global batch",
        ),
        ({"use_vllm": True}, UnsupportedError, "use_vllm=True is not available here"),
        ({"use_transformers_continuous_batching": True}, UnsupportedError, "it does not carry images"),
        ({"use_transformers_paged": True}, UnsupportedError, "it does not carry images"),
        ({"auto_find_batch_size": True}, UnsupportedError, "a halved batch would split groups"),
        ({"liger_kernel_config": {"fused_linear_cross_entropy": True}}, UnsupportedError, "keeps the logits"),
        ({"loss_type": "gpro"}, ConfigError, 'loss_type="gpro" is none of its 8 values. Did you mean "grpo"?'),
        ({"importance_sampling_level": "word"}, ConfigError, "Known: token, sequence."),
        ({"optim": "adamw_8bits"}, ConfigError, 'train.optim="adamw_8bits" is none of'),
        ({"eval_strategy": "steps", "num_generations": 4, "per_device_eval_batch_size": 3}, ConfigError, "eval batch"),
        ({"logging_steps": 0}, ConfigError, "logging strategy"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    options: dict[str, Any], kind: type[VLMGRPOError], expected: str
):
    with pytest.raises(kind) as caught:
        build_args(VLMGRPOConfig, options, output_dir="x")
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_plain_config_is_refused_for_the_same_reasons():
    plain = own_grpo_config()(use_cpu=True, bf16=False, use_transformers_continuous_batching=True)
    with pytest.raises(UnsupportedError, match="continuous_batching=True is not available"):
        VLMGRPOConfig.of(plain)


OUR_CHOICES = ("on_overlong", "group_sharing", "group_attention", "gradient_checkpointing")


def test_our_list_of_choices_is_trls():
    source = inspect.getsource(trl.trainer.grpo_trainer)
    for name, choices in _CHOICES.items():
        assert _default(VLMGRPOConfig.__dataclass_fields__[name]) in choices
        for choice in choices if name not in OUR_CHOICES else ():
            assert isinstance(choice, bool) or f'"{choice}"' in source or f"'{choice}'" in source, choice


def test_options_take_the_type_of_their_field():
    given = {
        "learning_rate": "2e-5",
        "max_steps": "10",
        "num_generations": 4.0,
        "logging_steps": 1,
        "log_completions": "true",
        "eval_strategy": "no",
        "scale_rewards": False,
        "run_name": 12,
        "optim": "adamw_torch",
        "generation_kwargs": {"top_k": 5},
        "delta": "0.5",
        "epsilon_high": None,
    }
    options = train_options(given, VLMGRPOConfig)
    assert options == {
        **given,
        "learning_rate": 2e-5,
        "max_steps": 10,
        "num_generations": 4,
        "log_completions": True,
        "run_name": "12",
        "delta": 0.5,
    }
    assert [type(options[name]) for name in ("learning_rate", "max_steps", "num_generations", "logging_steps")] == [
        float,
        int,
        int,
        int,
    ]
    assert VLMGRPOConfig(**options).scale_rewards == "none"


def test_every_default_passes_its_own_check():
    hints = _hints(VLMGRPOConfig)
    for option in dataclasses.fields(VLMGRPOConfig):
        value = _default(option)
        assert _coerced(option.name, value, hints[option.name]) == value, option.name


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learnin_rate", 1, 'VLMGRPOConfig has no option "learnin_rate". Did you mean "learning_rate"?'),
        ("modle", "m", 'Did you mean "model"?'),
        ("zzz", 1, 'has no option "zzz". Check the spelling.'),
        ("learning_rate", "fast", "train.learning_rate='fast': needs a number."),
        ("max_steps", True, "train.max_steps=true: needs a whole number."),
        ("max_steps", 1.5, "train.max_steps=1.5: needs a whole number."),
        ("beta", None, "train.beta=None: needs a number."),
        ("log_completions", "maybe", "needs true or false."),
        ("eval_strategy", False, "train.eval_strategy=false: needs"),
        ("output_dir", "x", 'train.output_dir: give "output" instead.'),
        ("reward_weights", [1.0], 'give weights under "rewards" instead'),
        ("model_init_kwargs", {}, 'the model is loaded from "model"'),
    ],
)
def test_wrong_names_and_values_are_named(name: str, value: Any, expected: str):
    with pytest.raises(ConfigError) as caught:
        train_options({name: value}, VLMGRPOConfig)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_other_dataclasses_of_arguments_are_checked_alike():
    assert train_options({"learning_rate": "2e-5"}, TrainingArguments) == {"learning_rate": 2e-5}
    with pytest.raises(ConfigError, match='TrainingArguments has no option "num_generations"'):
        train_options({"num_generations": 4}, TrainingArguments)
    with pytest.raises(ConfigError, match="train: logging strategy"):
        build_args(TrainingArguments, {"logging_steps": 0}, use_cpu=True)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_config_resolves(path: Path):
    config = load_config(path)
    assert config.notes == [] and config.data.train and config.lora is not None
    if config.judge is not None:
        require(config, "reward-train")
        assert build_args(VLMRewardConfig, config.train, output_dir=config.output).center_rewards_coefficient == 1e-3
        return
    require(config, "train")
    if config.algorithm == "ppo":
        args = build_args(VLMPPOConfig, config.train, output_dir=config.output)
        assert args.num_generations == 1 and args.steps_per_generation == 2 * args.gradient_accumulation_steps
        assert config.load_in_4bit
        return
    args = build_args(VLMGRPOConfig, config.train, output_dir=config.output)
    assert args.per_device_train_batch_size == args.num_generations, "one group a batch"
    if path.stem.startswith("qwen2.5-vl"):
        assert config.load_in_4bit


def test_there_are_example_configs():
    assert {"qwen2.5-vl-3b", "qwen2.5-vl-7b", "reward_model", "qwen2.5-vl-3b-judged"} <= {path.stem for path in CONFIGS}
