"""What a file and the command line say becomes one config, or one sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm_grpo.config import LoraOptions, RunConfig, diff, load_config, parse_reward, require, resolved, to_yaml
from vlm_grpo.errors import ConfigError
from vlm_grpo.predecessors import PREDECESSORS
from vlm_grpo.yaml_text import dump_yaml, parse_value, read_yaml


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None = None, overrides: list[str] | None = None, **direct: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, direct)
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?")), "one sentence, or two"
    return message


def test_file_command_line_and_set_are_merged_key_by_key(tmp_path: Path):
    path = write(
        tmp_path,
        "model: base\nlora: {r: 8, vision: true}\ndata: {train: a.jsonl, eval: b.jsonl}\nrewards: [accuracy, format]\n"
        "train: {learning_rate: 2e-5, beta: 0.1, lr_scheduler_kwargs: {num_cycles: 1}}\n",
    )
    config = load_config(
        path,
        ["train.beta=0.3", "lora.alpha=32", "train.lr_scheduler_kwargs.last_epoch=-1"],
        {"data.train": "c.jsonl", "rewards": ["accuracy=0.7"], "max_steps": 5, "train.seed": 3},
    )
    assert config.model == "base"
    assert config.lora == LoraOptions(r=8, alpha=32, vision=True)
    assert (config.data.train, config.data.eval) == ("c.jsonl", "b.jsonl")
    assert [(reward.name, reward.weight) for reward in config.rewards] == [("accuracy", 0.7)], "a list is replaced"
    assert config.train == {
        "learning_rate": 2e-5,
        "beta": 0.3,
        "lr_scheduler_kwargs": {"num_cycles": 1, "last_epoch": -1},
        "max_steps": 5,
        "seed": 3,
    }
    assert config.notes == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E6", 1e6),
        (".5", 0.5),
        ("-3", -3),
        ("010", "010"),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("2026-11-20", "2026-11-20"),
        ("1:30", "1:30"),
        ("null", None),
        ("", None),
        (".inf", float("inf")),
        ("[q_proj, 2e-5]", ["q_proj", 2e-5]),
        ("{num_cycles: 1}", {"num_cycles": 1}),
        ("my_rewards.py:length", "my_rewards.py:length"),
        ("[unclosed", "[unclosed"),
        ("0x10", "0x10"),
    ],
)
def test_values_are_read_as_yaml_1_2_and_written_back_the_same(text: str, value: Any, tmp_path: Path):
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)
    written = dump_yaml({"key": value})
    assert read_yaml(write(tmp_path, written)) == {"key": value}
    if isinstance(value, str):
        assert yaml.safe_load(written) == {"key": value}, "PyYAML's own reader takes it as text too"


def test_fields_take_their_type(tmp_path: Path):
    path = write(tmp_path, 'model: 7\nload_in_4bit: "true"\nmax_minutes: "1e1"\nlora: {r: "8"}\noutput: 2026-11-20\n')
    config = load_config(path)
    assert (config.model, config.load_in_4bit, config.max_minutes, config.output) == ("7", True, 10.0, "2026-11-20")
    assert config.lora is not None and config.lora.r == 8


@pytest.mark.parametrize(
    ("written", "expected"),
    [("true", LoraOptions()), ("false", None), ("null", None), ("{}", LoraOptions()), ("{r: 4}", LoraOptions(r=4))],
)
def test_lora_shorthands(written: str, expected: LoraOptions | None, tmp_path: Path):
    assert load_config(write(tmp_path, f"model: m\nlora: {written}")).lora == expected
    assert load_config(None, [f"lora={written}"], {"model": "m"}).lora == expected


def test_a_section_given_short_can_be_refined():
    config = load_config(None, ["data=a.jsonl", "data.split=dev", "lora=true", "lora.r=4"], {"model": "m"})
    assert (config.data.train, config.data.split) == ("a.jsonl", "dev")
    assert config.lora == LoraOptions(r=4)
    assert load_config(None, ["lora.r=4"], {"model": "m", "lora": False}).lora == LoraOptions(r=4)
    assert load_config(None, ["lora=false"], {"model": "m", "lora.r": 4}).lora is None


def test_reward_shorthands(tmp_path: Path):
    path = write(
        tmp_path,
        "model: m\nrewards:\n- accuracy\n- {name: format, weight: 0.3}\n- my_rewards.py:length\n- a.py:f=2e-1\n",
    )
    rewards = load_config(path).rewards
    assert [(reward.name, reward.weight) for reward in rewards] == [
        ("accuracy", 1.0),
        ("format", 0.3),
        ("my_rewards.py:length", 1.0),
        ("a.py:f", 0.2),
    ]
    assert load_config(write(tmp_path, "model: m\nrewards: accuracy")).rewards == rewards[:1]
    assert RunConfig(model="m", rewards=["accuracy"]).rewards == rewards[:1]  # type: ignore[list-item]
    assert parse_reward(" accuracy = 0.7 ") == {"name": "accuracy", "weight": 0.7}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: m", 'unknown key "modle". Did you mean "model"?'),
        ("model: m\nlora: {rank: 8, targts: x}", 'unknown key "lora.rank". Known here: r, alpha'),
        ("model: m\nlora: {targts: x}", 'unknown key "lora.targts". Did you mean "targets"?'),
        ("model: m\ndata: {trian: x}", 'unknown key "data.trian". Did you mean "train"?'),
        ("model: m\nrewards: [{name: a, wieght: 1}]", 'unknown key "rewards.0.wieght". Did you mean "weight"?'),
        ("model: m\nlearning_rate: 1", 'unknown key "learning_rate". Trainer options go under "train:"'),
        ("output: x", "a model is needed"),
        ("model: m\nbackend: vllm", "backend: input should be 'auto', 'unsloth' or 'hf' (given 'vllm')"),
        ("model: m\nmax_minutes: soon", "max_minutes: input should be a valid number"),
        ("model: m\nmax_minutes: 0", "max_minutes: input should be greater than 0 (given 0)"),
        ("model: m\nlora: {r: 0}", "lora.r: input should be greater than or equal to 1 (given 0)"),
        ("model: m\nlora: {language: false}", "lora: nothing would be trained"),
        ("model: m\nlora: {attention: false, mlp: false}", "lora: nothing would be trained"),
        ("model: m\ndata: 3", 'data: needs "key: value" lines'),
        ("model: m\ntrain: 3", 'train: needs "key: value" lines'),
        ("model: m\nrewards: 3", "rewards: give a reward's name"),
        ("model: m\nrewards: [accuracy=high]", 'rewards: the weight in "accuracy=high" is not a number'),
        ("model: m\nrewards: [{weight: 1}]", '"rewards.0.name" is needed'),
        ("model: m\nmodel: n", 'line 2: the key "model" occurs twice'),
        ("model: [a\n", "not YAML"),
        ("model: m\n\tdata: x", "line 2: not YAML"),
        ("- model", 'holds a list, not "key: value" lines'),
        ("model: !!python/object:os.system x", "not YAML"),
    ],
)
def test_a_broken_file_is_refused_in_one_sentence_that_names_it(text: str, expected: str, tmp_path: Path):
    path = write(tmp_path, text)
    message = refusal(path)
    assert expected in message
    assert message.startswith(str(path)) or expected == "a model is needed"


def test_the_sentence_says_where_a_key_was_written(tmp_path: Path):
    path = write(tmp_path, "model: m\nlora: {r: 4}")
    assert refusal(path, ["lora.rr=1"]).startswith('--set: unknown key "lora.rr"')
    assert refusal(path, None, backend="tpu").startswith("command line: backend:")
    assert refusal(path, ["lora.r=none"]).startswith("--set: lora.r:")
    assert refusal(path, ["lora.r"]).startswith('--set "lora.r": there is no key=value')
    assert "rewards is a list" in refusal(path, ["rewards.0.weight=2"])
    assert 'Was it meant by "modle"?' in refusal(None, None, modle="m")
    assert refusal(tmp_path / "absent.yaml").startswith(f"{tmp_path / 'absent.yaml'}: the config file cannot be read")


# What each foreign name with a place here must become: (value given, our key, value there).
TRANSLATED: dict[str, tuple[Any, str, Any]] = {
    "finetune_vision_layers": (True, "lora.vision", True),
    "finetune_language_layers": (False, "lora.language", False),
    "finetune_attention_modules": (False, "lora.attention", False),
    "finetune_mlp_modules": (False, "lora.mlp", False),
    "use_gradient_checkpointing": ("unsloth", "train.gradient_checkpointing", "unsloth"),
    "grpo_sample_size": (4, "train.num_generations", 4),
    "grpo_sample_num": (4, "train.num_generations", 4),
    "grpo_beta": (0.1, "train.beta", 0.1),
    "tune_mm_llm": (False, "language", "off"),
    "tune_mm_vision": (True, "vision", "full"),
    "tune_mm_mlp": (True, "projector", "full"),
    "mm_projector_lr": (1e-5, "train.projector_learning_rate", 1e-5),
    "vision_tower_lr": (1e-6, "train.vision_learning_rate", 1e-6),
    "freeze_multi_modal_projector": (False, "projector", "full"),
    "data_path": ("a.jsonl", "data.train", "a.jsonl"),
    "eval_data_path": ("a.jsonl", "data.eval", "a.jsonl"),
    "model_max_length": (4096, "max_seq_length", 4096),
    "model_name_or_path": ("other", "model", "other"),
    "dataset_name": ("a.jsonl", "data.train", "a.jsonl"),
    "dataset_train_split": ("dev", "data.split", "dev"),
    "dataset_test_split": ("dev", "data.eval_split", "dev"),
    "output_dir": ("runs/x", "output", "runs/x"),
    "reward_funcs": (["accuracy"], "rewards", [{"name": "accuracy", "weight": 1.0, "kwargs": {}}]),
    "torch_dtype": ("torch.bfloat16", "dtype", "bfloat16"),
    "use_peft": (True, "lora.r", 16),
    "lora_r": (4, "lora.r", 4),
    "lora_rank": (4, "lora.r", 4),
    "lora_alpha": (4, "lora.alpha", 4.0),
    "lora_dropout": (0.1, "lora.dropout", 0.1),
    "lora_target_modules": ("q_proj v_proj", "lora.targets", ["q_proj", "v_proj"]),
    "lora_target": ("q_proj,v_proj", "lora.targets", ["q_proj", "v_proj"]),
    "dataset": ("a.jsonl", "data.train", "a.jsonl"),
    "eval_dataset": ("a.jsonl", "data.eval", "a.jsonl"),
    "max_samples": (10, "data.limit", 10),
    "cutoff_len": (4096, "max_seq_length", 4096),
    "quantization_bit": (4, "load_in_4bit", True),
    "freeze_vision_tower": (False, "lora.vision", True),
    "freeze_language_model": (True, "lora.language", False),
    "image_folder": ("pictures", "data.media_root", "pictures"),
    "video_folder": ("clips", "data.media_root", "clips"),
    "media_dir": ("media", "data.media_root", "media"),
    "min_frames": (2, "media.min_frames", 2),
    "max_frames": (8, "media.max_frames", 8),
    "base_interval": (2.0, "media.base_interval", 2.0),
    "dynamic_sample": (True, "media.dynamic_sample", True),
    "min_pixels": (3136, "media.min_pixels", 3136),
    "max_pixels": (12845056, "media.max_pixels", 12845056),
    "image_min_pixels": (3136, "media.min_pixels", 3136),
    "image_max_pixels": (4000, "media.max_pixels", 4000),
    "video_fps": (2.0, "media.fps", 2.0),
    "video_maxlen": (32, "media.max_frames", 32),
}


@pytest.mark.parametrize("name", PREDECESSORS)
def test_every_name_of_a_predecessor_becomes_ours_or_is_explained(name: str, tmp_path: Path):  # covers Q6, Q7, U2
    model: dict[str, Any] = {} if name == "model_name_or_path" else {"model": "m"}
    if name in TRANSLATED:
        given, key, expected = TRANSLATED[name]
        if key == "lora.language":
            model["lora"] = {"vision": True}  # with neither tower, nothing would be trained
        config = load_config(None, None, {**model, name: given})
        value: Any = resolved(config)
        for part in key.split("."):
            value = value[part]
        assert value == expected and type(value) is type(expected)
        said = any(name in note and PREDECESSORS[name].to in note for note in config.notes)  # type: ignore[operator]
        assert said != key.endswith(f".{name}"), "the same name in a section of ours needs no words"
        path = write(tmp_path, dump_yaml({**model, "train": {name: given}}))
        assert resolved(load_config(path)) == resolved(config), "people write these under train: too"
    elif PREDECESSORS[name].harmless is None:
        config = load_config(None, None, {**model, name: 0.5})
        assert resolved(config) == resolved(load_config(None, None, model)), "explained, and left out"
        assert config.notes == [f"{name} is left out: {PREDECESSORS[name].say}."]
    else:
        message = refusal(None, None, **model, **{name: 12})
        assert message == f"command line: {name}=12: {PREDECESSORS[name].say}."
        assert load_config(None, None, {**model, name: None}).notes, "switched off, it changes nothing"


def test_tuning_the_language_model_beside_lora_means_its_adapters():  # covers Q6
    tuned = {"model": "m", "tune_mm_llm": True, "tune_mm_vision": False, "tune_mm_mlp": True}
    assert str(load_config(None, None, tuned).parts) == "language, projector in full"
    for asked in ({"use_peft": True}, {"lora_r": 8}, {"lora": True}):
        assert str(load_config(None, None, {**tuned, **asked}).parts) == "language by LoRA; projector in full"
    assert load_config(None, None, {**tuned, "use_peft": False}).language == "full"


def test_two_names_for_one_thing_must_agree(tmp_path: Path):
    same = load_config(write(tmp_path, "model: m\ngrpo_beta: 0.1\ntrain: {beta: 0.1}"))
    assert same.train == {"beta": 0.1}
    assert "grpo_beta=0.2 and beta=0.1 are both given" in refusal(
        write(tmp_path, "model: m\ngrpo_beta: 0.2\ntrain: {beta: 0.1}")
    ).replace("train.beta", "beta")
    assert "lora is None" in refusal(None, None, model="m", use_peft=False, lora_r=8)
    assert load_config(write(tmp_path, "model: m\ngrpo_beta: 0.2"), None, {"beta": 0.3}).train == {"beta": 0.3}


def test_dropout_that_grpo_turns_off_is_noted():
    assert "lora.dropout=0.1" in load_config(None, None, {"model": "m", "lora.dropout": 0.1}).notes[0]
    assert not load_config(None, None, {"model": "m", "lora.dropout": 0.1, "disable_dropout": False}).notes


def test_the_resolved_config_reads_back_equal(tmp_path: Path):
    config = load_config(
        None,
        ["train.run_name='1e5'", "train.b=.inf"],
        {"model": "1e5", "data": "ü.jsonl", "output": "no", "lora": True, "rewards": ["a.py:f=0.5"], "a": 1e-5},
    )
    path = write(tmp_path, to_yaml(config))
    again = load_config(path)
    assert again == config and to_yaml(again) == to_yaml(config)
    assert list(yaml.safe_load(to_yaml(config))["train"]) == ["a", "b", "run_name"], "any order gives the same file"
    assert diff(config, again) == []


def test_diff_names_each_changed_key_once():
    old = load_config(None, ["train.learning_rate=1e-5"], {"model": "m", "lora": True, "rewards": ["accuracy"]})
    new = load_config(None, ["train.learning_rate=2e-5"], {"model": "m", "rewards": ["accuracy"], "beta": 0.1})
    lines = diff(old, new)
    assert "train.learning_rate: 1e-05 → 2e-05" in lines
    assert "train.beta: unset → 0.1" in lines
    assert "lora.r: 16 → unset" in lines
    assert not any(line.startswith(("model", "rewards")) for line in lines)
    quoted = load_config(None, None, {"model": "m", "lora": True, "rewards": ["accuracy"], "learning_rate": "1e-5"})
    assert diff(old, quoted) == [], "quotes around a number change nothing"
    assert diff(resolved(old), new) == lines


def test_a_run_needs_rows_and_grpo_needs_a_reward():
    config = load_config(None, None, {"model": "m"})
    with pytest.raises(ConfigError, match="no training rows"):
        require(config, "sft")
    config = load_config(None, None, {"model": "m", "data": "a.jsonl"})
    require(config, "sft")
    with pytest.raises(ConfigError, match="no reward"):
        require(config, "train")


def test_every_field_is_described():
    for model in (RunConfig, *(type(part) for part in (LoraOptions(), RunConfig(model="m").data))):
        for name, option in model.model_fields.items():
            assert option.description and option.description.endswith("."), name
