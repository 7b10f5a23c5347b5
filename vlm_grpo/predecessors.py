"""Option names of the projects this one replaces: each becomes one of ours, or is explained in one line."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError


@dataclass(frozen=True)
class Predecessor:
    """What one foreign option name means here."""

    to: str | None = None  # our key, dotted; None: there is none
    say: str = ""  # the note's (or the refusal's) reason
    convert: Callable[[Any], Any] | None = None
    harmless: tuple[Any, ...] | None = None  # without `to`: values that may be left out; None: any value
    beside_lora: Callable[[Any], Any] | None = None  # instead of `convert` where LoRA is asked for in the same place


def _switch(value: Any) -> Any:
    return {} if _is_true(value) else None


def _is_true(value: Any) -> bool:
    return value is True or str(value).lower() in {"true", "1", "yes", "on"}


def _split_names(value: Any) -> Any:
    """``"accuracy format"`` and ``"q_proj,v_proj"`` as lists; one word stays one word."""
    names = value.replace(",", " ").split() if isinstance(value, str) else value
    return names[0] if isinstance(names, list) and len(names) == 1 else names


def _to(key: str, say: str = "", convert: Callable[[Any], Any] | None = None) -> Predecessor:
    return Predecessor(to=key, say=say, convert=convert)


def _left_out(say: str) -> Predecessor:
    return Predecessor(say=say)


def _refused(say: str, *harmless: Any) -> Predecessor:
    return Predecessor(say=say, harmless=(None, False, *harmless))


def _full(value: Any) -> Any:
    return "full" if _is_true(value) else "off"


def _adapters(value: Any) -> Any:
    return "lora" if _is_true(value) else "off"


_WHOLE = "true trains all of its weights, false none"

PREDECESSORS: dict[str, Predecessor] = {
    # GRPO for Unsloth VLMs
    "finetune_vision_layers": _to("lora.vision"),
    "finetune_language_layers": _to("lora.language"),
    "finetune_attention_modules": _to("lora.attention"),
    "finetune_mlp_modules": _to("lora.mlp"),
    "use_gradient_checkpointing": _to(
        "train.gradient_checkpointing", convert=lambda v: v if v == "unsloth" else _is_true(v)
    ),
    # GRPO for Qwen-VL video understanding
    "grpo_alpha": _left_out("the project that had it never used it; weigh rewards under rewards:, the KL term by beta"),
    "grpo_sample_size": _to("train.num_generations"),
    "grpo_sample_num": _to("train.num_generations"),
    "grpo_beta": _to("train.beta"),
    "tune_mm_llm": Predecessor(
        to="language", say=f"{_WHOLE}; beside LoRA, true trains its adapters", convert=_full, beside_lora=_adapters
    ),
    "tune_mm_vision": _to("vision", _WHOLE, _full),
    "tune_mm_mlp": _to("projector", _WHOLE, _full),
    "mm_projector_lr": _to("train.projector_learning_rate"),
    "vision_tower_lr": _to("train.vision_learning_rate"),
    "data_path": _to("data.train"),
    "eval_data_path": _to("data.eval"),
    "image_folder": _to("data.media_root"),
    "video_folder": _to("data.media_root"),
    "media_dir": _to("data.media_root"),
    "min_frames": _to("media.min_frames"),
    "max_frames": _to("media.max_frames"),
    "base_interval": _to("media.base_interval"),
    "dynamic_sample": _to("media.dynamic_sample"),
    "model_max_length": _to("max_seq_length", "it sizes the context and never cuts a prompt"),
    # R1-Omni and Hugging Face scripts
    "model_name_or_path": _to("model"),
    "dataset_name": _to("data.train"),
    "dataset_train_split": _to("data.split"),
    "dataset_test_split": _to("data.eval_split"),
    "output_dir": _to("output"),
    "reward_funcs": _to("rewards", convert=_split_names),
    "min_pixels": _to("media.min_pixels"),
    "max_pixels": _to("media.max_pixels"),
    "torch_dtype": _to("dtype", convert=lambda v: str(v).removeprefix("torch.")),
    "use_peft": _to("lora", convert=_switch),
    "lora_r": _to("lora.r"),
    "lora_alpha": _to("lora.alpha"),
    "lora_dropout": _to("lora.dropout"),
    "lora_target_modules": _to("lora.targets", convert=_split_names),
    "load_in_8bit": _refused("there is no 8-bit loading; use load_in_4bit"),
    "resume_from_checkpoint": _refused(
        "the same command again resumes by itself; for one checkpoint give --resume-from-checkpoint PATH"
    ),
    # Qwen2-Audio PPO & GRPO
    "dataset": _to("data.train"),
    "eval_dataset": _to("data.eval"),
    "max_samples": _to("data.limit"),
    "lora_rank": _to("lora.r"),
    "lora_target": _to("lora.targets", convert=lambda v: None if v == "all" else _split_names(v)),
    "cutoff_len": _to("max_seq_length", "it sizes the context and never cuts a prompt"),
    "image_min_pixels": _to("media.min_pixels"),
    "image_max_pixels": _to("media.max_pixels"),
    "video_fps": _to("media.fps"),
    "video_maxlen": _to("media.max_frames"),
    "quantization_bit": _to("load_in_4bit", "4 is the only bit width", convert=lambda v: str(v) == "4"),
    "freeze_vision_tower": _to("lora.vision", convert=lambda v: not _is_true(v)),
    "freeze_language_model": _to("lora.language", convert=lambda v: not _is_true(v)),
    "freeze_multi_modal_projector": _to(
        "projector", "false trains all of its weights", convert=lambda v: _full(not _is_true(v))
    ),
}


def translate(layer: dict[str, Any], source: str, notes: list[str]) -> dict[str, Any]:
    """``layer`` with foreign names, at the top or under ``train``, replaced by ours; appends a line each to ``notes``.

    Raises:
        ConfigError: an option that would change the result and does not exist here, or one given under two names.
    """
    out = {key: value for key, value in layer.items() if key not in PREDECESSORS}
    foreign = [(key, key, layer[key]) for key in layer if key in PREDECESSORS]
    train = out.get("train")
    if isinstance(train, dict):
        foreign += [(f"train.{key}", key, train[key]) for key in train if key in PREDECESSORS]
        out["train"] = {key: value for key, value in train.items() if key not in PREDECESSORS}
    asked = _asks_for_lora(out, foreign)
    for written, name, value in foreign:
        entry = PREDECESSORS[name]
        convert = entry.beside_lora if asked and entry.beside_lora else entry.convert
        if entry.to is None:
            if entry.harmless is not None and value not in entry.harmless:
                raise ConfigError(f"{source}: {written}={value}: {entry.say}.")
            notes.append(f"{written} is left out: {entry.say}.")
            continue
        _place(out, entry.to, convert(value) if convert else value, f"{source}: {written}")
        if name != entry.to.rpartition(".")[2]:  # only its place is another, which nobody needs to know
            notes.append(f"{written} is {entry.to} here{': ' + entry.say if entry.say else ''}.")
    return out


def _asks_for_lora(out: dict[str, Any], foreign: list[tuple[str, str, Any]]) -> bool:
    """Whether options of LoRA stand in the same place: under our name or another's."""
    for _, name, value in foreign:
        if name == "use_peft" and not _is_true(value):
            return False
    switched = out.get("lora", False) not in (None, False)
    return switched or any((PREDECESSORS[name].to or "").startswith("lora") for _, name, _ in foreign)


def _place(out: dict[str, Any], key: str, value: Any, written: str) -> None:
    """Set ``key`` unless it already holds something else."""
    parent, _, last = key.rpartition(".")
    if parent:
        section = out.get(parent, {})
        if parent == "data" and isinstance(section, str):
            section = {"train": section}
        if (parent == "lora" and section is True) or (parent != "lora" and section is None):
            section = {}
        if not isinstance(section, dict):
            raise ConfigError(f"{written} sets {key}, but {parent} is {section}. Keep one of them.")
        out[parent] = dict(section)
        out = out[parent]
    if last in out and out[last] != value and not (value == {} and (out[last] is True or isinstance(out[last], dict))):
        raise ConfigError(f"{written}={value} and {key}={out[last]} are both given. Keep one of them.")
    if not (last in out and value == {}):
        out[last] = value
