"""After TRL's own set-up: a trainer's heads and reference, what it may sample, and what it refuses."""

import copy
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from trl.models.utils import prepare_deepspeed, prepare_fsdp

from .errors import ConfigError, DataFormatError, UnsupportedError
from .models.families import family_of, placeholder_ids
from .patches.trl import add_fused_head
from .trainer_config import VLMGRPOConfig


def mend_heads(trainer: Any) -> None:
    """TRL's head, added once more where the model is its own backbone, of which TRL does not know."""
    policy: Any = trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model
    precision = trainer.args.cast_lm_head_to_fp32
    if policy.base_model is policy:
        add_fused_head(policy, trainer.temperature, precision, outputs=("log_probs", "entropy"))
        if trainer.ref_model is not None:
            add_fused_head(trainer.ref_model, trainer.temperature, precision)


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
