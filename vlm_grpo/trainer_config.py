"""VLMGRPOConfig: TRL's GRPOConfig with our options and defaults, and trainer options checked by name and type."""

import dataclasses
import enum
import os
import types
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from .config import RunConfig
from .errors import ConfigError, UnsupportedError, nearest
from .patches.trl import own_grpo_config
from .ranges import check_ranges

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig
else:
    GRPOConfig = own_grpo_config()

Precision = Literal["bf16", "fp16", "fp32"]
Args = TypeVar("Args")


@dataclass
class RateOptions:
    """What GRPO and the warm start have in common: the learning rate of each part."""

    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower. Default: learning_rate."}
    )
    audio_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the tower that encodes sounds. Default: learning_rate."}
    )
    projector_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of what maps features into the language model. Default: learning_rate."},
    )


@dataclass
class VLMGRPOConfig(RateOptions, GRPOConfig):
    """Every option of TRL's ``GRPOConfig`` and ours.

    Precision left unset (``bf16=None`` and ``fp16=False``) means bf16 where the GPU computes it natively, else fp16
    on CUDA, else fp32; without an accelerator also ``use_cpu=True``.

    Raises:
        ConfigError: values that cannot work together.
        UnsupportedError: an option of TRL's that this trainer has no test for.
    """

    fewest_generations: ClassVar[int] = 2

    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Turn dropout off, in adapters too. TRL leaves it on; then two passes over one completion "
            "differ, and the importance ratio is not 1 before the first update."
        },
    )
    gradient_check: bool = field(
        default=True,
        metadata={"help": "Stop after the first backward pass when a trained tower received no gradient."},
    )
    gradient_report: bool = field(
        default=False,
        metadata={"help": "Log at every step, per tower, how many trained parameters received a gradient."},
    )

    gradient_checkpointing: bool | Literal["unsloth"] = field(  # type: ignore[assignment]
        default=True,
        metadata={
            "help": 'Recompute activations in the backward pass; "unsloth" also moves them off the GPU, where Unsloth '
            "loads the model."
        },
    )
    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Completions a process takes in one forward and backward pass. Default: num_generations, one whole "
            "group. Whole groups, or an equal part of one, share the work of their prompt."
        },
    )
    flow_check: bool = field(
        default=True,
        metadata={
            "help": "Before step 1, show for each kind of medium present that it reaches the log-probabilities, and "
            "that generation and training see the same."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Leave out rows of more tokens than this, media included. Prompts are never cut."},
    )
    on_overlong: Literal["drop", "error"] = field(
        default="drop",
        metadata={"help": "Rows longer than max_prompt_length are left out and counted, or refused before step 1."},
    )
    resample_dead_groups: int = field(
        default=0,
        metadata={
            "help": "How often groups whose rewards are all equal are drawn anew, from other prompts, before they are "
            "kept: each time costs their generation again. 0 keeps them at once. One process, no streaming."
        },
    )
    max_reward_failures: float = field(
        default=0.5,
        metadata={
            "help": "Save and stop when for more than this share of the completions of the last ten rollouts a reward "
            "failed, such as an API that does not answer; 1 never stops."
        },
    )
    group_sharing: Literal["auto"] | bool = field(
        default="auto",
        metadata={
            "help": "Encode, prefill and score the prompt once for all completions of a group, with the same "
            'gradients. "auto" falls back to one prompt per completion, with the reason, where that is not exact; '
            "true raises there."
        },
    )
    group_attention: Literal["reference", "flex"] = field(
        default="reference",
        metadata={
            "help": 'How a group\'s attention is computed where sharing is on. "flex" is one fused kernel on a GPU '
            "(FlexAttention; needs triton): opt-in, not yet measured on a GPU. On a CPU it is slow."
        },
    )

    def __post_init__(self) -> None:
        if self.per_device_train_batch_size is None:
            self.per_device_train_batch_size = self.num_generations or 8  # TRL's own
        _refuse_unsupported(self)
        _check_choices(self)
        check_ranges(self)
        _check_groups(self)
        resolve_precision(self)
        try:
            self._derive()
        except _REFUSALS as error:
            raise ConfigError(one_line(error)) from error

    def _derive(self) -> None:
        """TRL's own ``__post_init__``."""
        super().__post_init__()

    @classmethod
    def of(cls, args: Any = None) -> "VLMGRPOConfig":
        """``args`` as a ``VLMGRPOConfig``: itself, or a plain GRPOConfig's values with the defaults of our options.

        No value of a plain config is changed or derived again. It is recognised by its fields, since another library
        may have replaced ``trl.GRPOConfig`` by a class of its own.

        Raises:
            ConfigError: ``args`` is no GRPO config, or asks for something refused.
        """
        if args is None:
            return cls()
        if isinstance(args, cls):
            if args.fewest_generations != cls.fewest_generations:
                raise ConfigError(
                    f"args is a {type(args).__name__}, whose options GRPO does not read. Give a {cls.__name__}, or "
                    "train by VLMPPOTrainer."
                )
            return args
        missing = [name for name in ("num_generations", "beta", "output_dir") if not hasattr(args, name)]
        if missing:
            raise ConfigError(
                f"args is a {type(args).__name__}, which has no {missing[0]}. Give a VLMGRPOConfig or a GRPOConfig."
            )
        config = object.__new__(cls)
        config.__dict__.update(args.__dict__)
        hints = _hints(cls)
        for option in dataclasses.fields(cls):
            default = _default(option)
            # A generated config may say None where TRL has a number and means "the default".
            if option.name not in config.__dict__ or (
                config.__dict__[option.name] is None and default is not None and not _allows(hints[option.name], None)
            ):
                config.__dict__[option.name] = default
        _refuse_unsupported(config)
        _check_choices(config)
        check_ranges(config)
        return config


_REFUSALS = (ValueError, NotImplementedError, ImportError, FileNotFoundError)


def one_line(error: Exception) -> str:
    """A library's message as one line that ends like a sentence."""
    return " ".join(str(error).split()).rstrip(".") + "."


def native_precision(use_cpu: bool = False) -> Precision:
    """The mixed precision this machine computes natively: bf16, else fp16 on CUDA, else fp32."""
    if use_cpu or not torch.accelerator.is_available():
        return "fp32"
    if torch.cuda.is_available():
        # Emulated bf16 (Turing and older) runs many times slower than fp16.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    from transformers.utils.import_utils import is_torch_bf16_gpu_available

    return "bf16" if is_torch_bf16_gpu_available() else "fp32"


def resolve_precision(args: Any) -> None:
    """Set ``bf16``, ``fp16`` and ``use_cpu`` of unfinished training arguments where the user left them unset.

    ``bf16=None`` with ``fp16=False`` counts as unset. Call it before transformers' ``__post_init__``.

    Raises:
        ConfigError: fp16 without an accelerator, which nothing can compute in mixed precision.
    """
    if not torch.accelerator.is_available():
        args.use_cpu = True
    if args.fp16 and args.use_cpu:
        raise ConfigError("fp16=True needs a GPU and this run is on the CPU. Leave fp16 out: the CPU computes in fp32.")
    if args.bf16 is None and not args.fp16:
        precision = native_precision(args.use_cpu)
        args.bf16, args.fp16 = precision == "bf16", precision == "fp16"
        args.fp16_by_machine = args.fp16  # what the user did not ask for may be left for a model's sake
    args.bf16 = bool(args.bf16)


_UNSUPPORTED = {
    "use_vllm": "generation runs in the trained model itself in this version",
    "use_transformers_continuous_batching": "it does not carry images",
    "use_transformers_paged": "it does not carry images",
    "auto_find_batch_size": "a halved batch would split groups; lower per_device_train_batch_size by hand",
}


def _refuse_unsupported(config: Any) -> None:
    for name, why in _UNSUPPORTED.items():
        if getattr(config, name, False):
            raise UnsupportedError(f"{name}=True is not available here: {why}. Leave it out.")
    if (getattr(config, "liger_kernel_config", None) or {}).get("fused_linear_cross_entropy"):
        raise UnsupportedError(
            "liger_kernel_config's fused_linear_cross_entropy=True is not available here: it keeps the logits that "
            "log-probabilities are taken from. Leave it out."
        )
    if config.num_generations is not None and config.num_generations < config.fewest_generations:
        if config.fewest_generations == 1:
            raise ConfigError(f"num_generations={config.num_generations}: needs 1 or more. Correct the value.")
        raise ConfigError(
            f"num_generations={config.num_generations}: GRPO compares the completions of one prompt with each other, "
            "so a single one has no advantage. Give 2 or more."
        )


# TRL looks at these while it computes the first loss, minutes after the model was loaded.
_CHOICES = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "on_overlong": ("drop", "error"),
    "group_sharing": ("auto", True, False),
    "group_attention": ("reference", "flex"),
    "gradient_checkpointing": (True, False, "unsloth"),
}


def _check_choices(config: Any) -> None:
    for name, choices in _CHOICES.items():
        if (value := getattr(config, name, choices[0])) not in choices:
            raise ConfigError(no_choice(name, value, [c for c in choices if isinstance(c, str)]))


def no_choice(name: str, value: Any, choices: list[str]) -> str:
    """What is said of an option that is none of its choices."""
    hint = nearest(str(value), choices) or f" Known: {', '.join(choices)}."
    return f'{name}="{value}" is none of its {len(choices)} values.{hint}'


def _check_groups(config: Any) -> None:
    """A generation batch must hold whole groups; TRL says so in terms the user may never have set."""
    if config.generation_batch_size is not None:
        return  # set by hand: TRL's own sentence names it
    steps = config.steps_per_generation or config.gradient_accumulation_steps
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows, group = config.per_device_train_batch_size, config.num_generations
    if group and rows * world * steps % group:
        raise ConfigError(
            f"num_generations={group} does not divide the {rows * world * steps} completions of one generation "
            f"(per_device_train_batch_size {rows} x {steps} steps x {world} processes). "
            f"Set per_device_train_batch_size to a multiple of {group}."
        )


# Options that a run sets from its own keys: given under `train:` they would compete with them.
_OURS = {
    "output_dir": 'give "output" instead',
    "reward_weights": 'give weights under "rewards" instead',
    "model_init_kwargs": 'the model is loaded from "model", "dtype", "load_in_4bit" and "backend"',
    "save_only_model": "such a checkpoint could not continue the run; the run folder itself is the model",
    "resume_from_checkpoint": "the same command again resumes; for one checkpoint give --resume-from-checkpoint PATH",
}
# TRL takes these too, whatever the annotation says.
_WIDER: dict[str, Any] = {"scale_rewards": str | bool}


def train_options(options: dict[str, Any], cls: type) -> dict[str, Any]:
    """The options under ``train:``, checked against the fields of ``cls`` and turned into their types.

    ``"2e-5"`` becomes 2e-05 where the field is a float. ``cls`` is any dataclass, such as ``VLMGRPOConfig``.

    Raises:
        ConfigError: an unknown name (with the nearest known one), or a value its field does not take.
    """
    known = {option.name for option in dataclasses.fields(cls) if option.init}
    hints = _hints(cls)
    out = {}
    for name, value in options.items():
        if name in _OURS:
            raise ConfigError(f"train.{name}: {_OURS[name]}.")
        if name not in known:
            hint = nearest(name, [*known, *RunConfig.model_fields])
            raise ConfigError(f'train.{name}: {cls.__name__} has no option "{name}".{hint or " Check the spelling."}')
        out[name] = _coerced(name, value, _WIDER.get(name, hints[name]))
    return out


def build_args(cls: type[Args], options: dict[str, Any], **fixed: Any) -> Args:
    """``cls(**train_options(options, cls), **fixed)``; what ``cls`` itself refuses becomes a ConfigError."""
    try:
        return cls(**{**train_options(options, cls), **fixed})
    except (ConfigError, UnsupportedError):
        raise
    except _REFUSALS as error:
        raise ConfigError(f"train: {one_line(error)}") from error


def _coerced(name: str, value: Any, hint: Any) -> Any:
    if isinstance(value, bool) and not _allows(hint, value):
        # Pydantic would read True as 1: `--max_steps` without its value would train one step.
        raise ConfigError(f"train.{name}={str(value).lower()}: needs {_type_name(hint)}. Give it a value.")
    for member in _members(hint):
        if isinstance(member, type) and issubclass(member, enum.Enum) and isinstance(value, str):
            choices = [str(choice.value) for choice in member]
            if value not in choices:
                raise ConfigError(no_choice(f"train.{name}", value, choices))
    try:
        result = TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True)).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"train.{name}={value!r}: needs {_type_name(hint)}. Correct the value.") from error
    # `logging_steps: 1` stays 1: transformers counts with it, and prints it.
    return value if type(value) is int and type(result) is float else result


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(inner for member in typing.get_args(hint) for inner in _members(member))
    return (hint,)


def _allows(hint: Any, value: bool | None) -> bool:
    """Whether the annotation names None, or a bool."""
    if value is None:
        return any(member in (type(None), Any) for member in _members(hint))
    return any(m in (bool, Any) or value in typing.get_args(m) for m in _members(hint))


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    said = []
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            said += [repr(choice) for choice in typing.get_args(member)]
        elif member is not type(None):
            base = typing.get_origin(member) or member
            said.append(names.get(base, "a list" if base is list else getattr(base, "__name__", str(base))))
    return " or ".join(dict.fromkeys(said))


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _default(option: dataclasses.Field) -> Any:
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default
