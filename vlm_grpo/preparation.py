"""After TRL's own set-up: a trainer's heads and reference, its sharing and checks, what it may sample and refuses."""

import copy
import logging
from typing import Any

from datasets import Dataset
from torch import nn
from trl.models.utils import prepare_deepspeed, prepare_fsdp

from .checks import GradientCheck, LengthCheck, StepsCheck
from .diagnosis import install_diagnosis
from .errors import ConfigError, DataFormatError, UnsupportedError
from .failures import RewardFailures
from .flow import FlowCheck
from .group import GroupSharing, SharingReport, advice, unit_of
from .models.families import family_of, placeholder_ids, tower_of
from .models.parts import finish_reference_copies
from .models.wrappers import is_peft_model
from .numbers import NumbersCheck
from .patches.trl import add_fused_head
from .precision import float32_adapters
from .quantized import is_quantized, undo_bf16_adapters
from .rewards import finite_reward, introduce, show_model
from .stopwatch import Stopwatch
from .trainer_config import VLMGRPOConfig

_LOG = logging.getLogger("vlm_grpo")


def refuse_untested(**given: Any) -> None:
    """Refuse arguments of TRL's trainer by which rollouts come from elsewhere."""
    for name, value in given.items():
        if value is not None:
            raise UnsupportedError(f"{name} has no multimodal test yet. Use reward_funcs, or TRL's own GRPOTrainer.")


def mend_heads(trainer: Any) -> None:
    """TRL's head, added once more where the model is its own backbone, of which TRL does not know."""
    policy: Any = trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model
    precision = trainer.args.cast_lm_head_to_fp32
    if policy.base_model is policy:
        add_fused_head(policy, trainer.temperature, precision, outputs=("log_probs", "entropy"))
        if trainer.ref_model is not None:
            add_fused_head(trainer.ref_model, trainer.temperature, precision)


def mend_adapters(trainer: Any, before: Any) -> None:
    """The number types that TRL has given to what is trained, and to its copies for a reference, as they should be.

    Args:
        trainer: the trainer.
        before: ``trainable_data`` of the model as it was given.
    """
    finish_reference_copies(trainer.model)  # TRL's are in the base's number type
    if is_quantized(trainer.model):
        undo_bf16_adapters(trainer.model, before)
    float32_adapters(trainer.args, trainer.model)


def install_reference(trainer: Any) -> None:
    """A frozen copy of the model as given (TRL has changed no weight yet), prepared as TRL prepares one."""
    trainer.beta = trainer.args.beta
    reference: Any = copy.deepcopy(trainer.model).requires_grad_(False).eval()
    # TRL's fused forward, copied with the instance, still falls back on the policy's own forward.
    add_fused_head(reference, trainer.temperature, trainer.args.cast_lm_head_to_fp32)
    if trainer.is_deepspeed_enabled:
        trainer.ref_model = prepare_deepspeed(reference, trainer.accelerator)
    elif trainer.is_fsdp_enabled:
        trainer.ref_model = prepare_fsdp(reference, trainer.accelerator)
    else:
        trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
    if trainer.args.sync_ref_model:
        from trl.trainer.callbacks import SyncRefModelCallback

        trainer.add_callback(SyncRefModelCallback(ref_model=reference, accelerator=trainer.accelerator))


def suppress_placeholders(trainer: Any) -> None:
    """A sampled media placeholder would crash the next forward, or read another row's features."""
    trainer.placeholder_ids = placeholder_ids(trainer.model.config, trainer.processing_class)
    if trainer.placeholder_ids:
        chosen = trainer.generation_kwargs.get("suppress_tokens") or []
        suppressed = sorted({*chosen, *trainer.placeholder_ids})
        trainer.generation_config.suppress_tokens = trainer.generation_kwargs["suppress_tokens"] = suppressed


def end_at_any_eos(trainer: Any) -> None:
    """Ends that the user adds by ``generation_kwargs`` end the counted tokens too, not only the sampling."""
    own = trainer.generation_kwargs.get("eos_token_id")
    own = [own] if isinstance(own, int) else own or []
    trainer.eos_token_ids = list(dict.fromkeys([*trainer.eos_token_ids, *own]))


def watch_rewards(trainer: Any) -> None:
    """A reward that is NaN or infinite stops the run, by the function's name; one that failed is counted.

    Those of models are looked at later.
    """
    trainer.reward_func_names = _distinct(trainer.reward_func_names)
    trainer.failures = RewardFailures(trainer, trainer.args.max_reward_failures)
    trainer.add_callback(trainer.failures)
    length = trainer.args.max_completion_length
    introduce(
        trainer.reward_funcs, processor=trainer.processing_class, media=trainer.media, max_completion_length=length
    )
    trainer.reward_funcs = [
        function if isinstance(function, nn.Module) else finite_reward(function, name, trainer.failures.note)
        for function, name in zip(trainer.reward_funcs, trainer.reward_func_names, strict=True)
    ]


def share_base(trainer: Any) -> None:
    """Show the policy to reward models, which stand on its base where that is theirs too.

    Raises:
        RewardError: a reward model that cannot stand or be loaded.
        UnsupportedError: one that would stand on weights which are split among processes.
    """
    split = "FSDP" if trainer.is_fsdp_enabled else None
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        split = "DeepSpeed's stage 3"
    show_model(
        trainer.reward_funcs,
        trainer.accelerator.unwrap_model(trainer.model),
        template=trainer.intake.template,
        root=trainer.media_root,
        sharing=trainer.sharing,
        autocast=trainer.accelerator.autocast,
        batch_size=trainer.args.per_device_train_batch_size,
        split=split,
    )


def _distinct(names: list[str]) -> list[str]:
    """TRL logs a reward under its function's name, where one of two lambdas would overwrite the other."""
    return [f"{name} {earlier + 1}" if (earlier := names[:n].count(name)) else name for n, name in enumerate(names)]


def share_groups(trainer: Any) -> None:
    """What a group's completions share, with one line where the batch size breaks groups."""
    args = trainer.args
    trainer._unit = unit_of(args.per_device_train_batch_size, trainer.num_generations)
    trainer.watch = Stopwatch()
    trainer.sharing = GroupSharing(
        family_of(trainer.model.config),
        args.group_sharing,
        trainer.placeholder_ids,
        trainer.accelerator.autocast,
        aux_loss=trainer.aux_loss_enabled,
        fused=args.group_attention == "flex",
    )
    lost = advice(args.per_device_train_batch_size, trainer.num_generations)
    if lost is not None and args.group_sharing is not False:
        _LOG.warning(lost)


def install_checks(trainer: Any) -> None:
    """Numbers, gradients, steps, lengths, the flow of media, sharing, and what keeps it from learning: callbacks."""
    family, metrics = family_of(trainer.model.config), trainer._metrics["train"]
    check = trainer.args.gradient_check and not trainer.is_deepspeed_enabled  # which keeps gradients to itself

    def log(name: str, value: float) -> None:
        metrics[name].append(value)

    def replace(name: str, value: float) -> None:
        metrics[name] = [value]

    trainer._gradient_check = GradientCheck(
        lambda name: tower_of(family, name), check, log if trainer.args.gradient_report else None
    )
    trainer.numbers = NumbersCheck(trainer, trainer._tokenizer, replace, trainer.sharing.forget)
    trainer._flow_check = FlowCheck(trainer)
    report = SharingReport(trainer.sharing, trainer.watch, log)
    for callback in (trainer.numbers, trainer._gradient_check, StepsCheck, trainer._flow_check, report):
        trainer.add_callback(callback)
    install_diagnosis(trainer)
    trainer.add_callback(LengthCheck(trainer.intake, trainer.train_dataset))


def check_size(dataset: Any, args: VLMGRPOConfig) -> None:
    """TRL drops an incomplete generation batch, so a small dataset would train 0 steps without a word."""
    assert args.generation_batch_size and args.num_generations, "GRPOConfig derives both"
    prompts = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) < prompts:
        raise ConfigError(
            f"The training dataset has {len(dataset)} rows, but one generation batch takes {prompts} prompts "
            f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}), no step "
            f"could be taken. Add rows, or lower generation_batch_size to {len(dataset) * args.num_generations}."
        )
    if isinstance(dataset, (list, tuple, dict)):
        raise DataFormatError(
            f"train_dataset is a {type(dataset).__name__}. Wrap it: datasets.Dataset.from_list(rows)."
        )


def check_processes(trainer: Any) -> None:
    """What several processes cannot do: FSDP and DeepSpeed exchange weights or gradients during every forward."""
    args, processes = trainer.args, trainer.args.world_size
    family, checkpoints = family_of(trainer.model.config), args.gradient_checkpointing_kwargs or {}
    if processes == 1:
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        if family.apart:
            raise UnsupportedError(
                f"{family.model_type} needs forwards of its own for rows whose media differ in size, and under FSDP "
                f"and DeepSpeed all {processes} processes must run as many. Train it with DDP, or with one process."
            )
        if not trainer.sharing.off:
            trainer.sharing.refuse(f"under FSDP and DeepSpeed all {processes} processes must run as many forwards")
    elif args.ddp_find_unused_parameters and args.gradient_checkpointing and checkpoints.get("use_reentrant"):
        raise ConfigError(
            f"gradient_checkpointing_kwargs={checkpoints}: with {processes} processes and "
            "ddp_find_unused_parameters=True, DDP cannot see into reentrant checkpoints. Set use_reentrant to False."
        )
