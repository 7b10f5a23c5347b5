"""``load_model``: one call for a published model, a folder, or a run of ours; the same result from either backend.

Importing this package loads neither torch nor transformers, so that Unsloth can still be imported before them.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from ..options import LoraOptions
    from ..parts import Part, Parts

__all__ = [
    "REWARD_MODEL",
    "check_trainable",
    "import_unsloth_first",
    "is_adapter",
    "is_reward_model",
    "load_model",
    "refuse_reward_model",
]

REWARD_MODEL = "reward_model.json"  # in the folder of a reward model

_LOG = logging.getLogger("vlm_grpo")

Backend = Literal["auto", "unsloth", "hf"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def load_model(
    name_or_path: str | Path,
    *,
    backend: Backend = "auto",
    load_in_4bit: bool = False,
    lora: "LoraOptions | None" = None,
    language: "Part | None" = None,
    vision: "Part | None" = None,
    audio: "Part | None" = None,
    projector: "Part | None" = None,
    dtype: Dtype = "auto",
    max_seq_length: int | None = None,
    gradient_checkpointing: bool | Literal["unsloth"] = False,
    fast_inference: bool = False,
) -> tuple[Any, Any]:
    """Load a model and its processor, ready to be trained or asked.

    Args:
        name_or_path: a model on the Hugging Face Hub, a model folder, or a run folder of ours. A run folder that holds
            an adapter is its base model with that adapter, trainable.
        backend: ``"unsloth"``, ``"hf"`` (transformers + PEFT), or ``"auto"``: Unsloth where there is a GPU it works on
            and an adapter is trained, transformers otherwise. Which one and why is logged.
        load_in_4bit: NF4 weights with double quantization, through bitsandbytes. The transformers backend quantizes
            the language model only: vision towers are a few percent of the memory and lose much of what they see.
        lora: which new adapters to train; None trains the model itself, or continues the adapter of a run folder.
        language, vision, audio, projector: how each part is trained: ``"lora"``, ``"full"`` (all of its weights) or
            ``"off"``. Left out, vision and language follow the switches of ``lora``, audio and projector are off; and
            without ``lora`` the rest is off beside a part in full, in full beside parts that are off. Embeddings and
            output head are of the language model. Unless that is trained in full, the model is PEFT's, whose adapter
            holds all that is trained.
        dtype: of the weights that are not 4-bit. ``"auto"``: bfloat16 where the GPU computes it natively, float16 on
            other GPUs (bfloat16 for families that overflow in it), float32 on a CPU, and for ``language="full"``.
            Adapters, and parts trained in full beside a language model that is not, are float32 always.
        max_seq_length: tokens of prompt and completion that Unsloth prepares for; transformers needs no such limit.
        gradient_checkpointing: recompute activations in the backward pass; ``"unsloth"`` also moves them off the GPU,
            and means True to transformers.
        fast_inference: refused. vLLM's copy of the model takes no LoRA in the vision tower, no video and no sound, and
            generation here shares the prompt among the completions of a group already.

    Returns:
        ``(model, processor)``: on the GPU of this process if there is one. The processor is the one saved with the run,
        for a run folder.

    Raises:
        ConfigError: no such model, an unknown option, parts that cannot be trained together or that the model does not
            have, options that differ from the saved adapter's, or float16 for a family that overflows in it.
        UnsupportedError: the backend or 4-bit weights do not work on this machine.
    """
    _check_choice("backend", backend, ("auto", "unsloth", "hf"))
    _check_choice("dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    _check_choice("gradient_checkpointing", gradient_checkpointing, (True, False, "unsloth"))
    if fast_inference:
        raise UnsupportedError(
            "fast_inference=True is not available here: vLLM's copy of the model takes no LoRA in the vision tower, no "
            "video and no sound. Leave it out; completions of a group share their prompt already."
        )
    from ..parts import parts_of

    given: dict[str, Part | None] = {"language": language, "vision": vision, "audio": audio, "projector": projector}
    parts = parts_of(lora, load_in_4bit, given)
    if parts.given and parts.language == "full" and dtype == "auto":
        dtype = "float32"
    name = _locate(name_or_path)
    chosen, reason = _choose(backend, parts.apart or is_adapter(name))
    _LOG.info("Backend: %s, because %s.", "Unsloth" if chosen == "unsloth" else "transformers + PEFT", reason)
    if load_in_4bit:
        _require_bitsandbytes()
    if chosen == "unsloth":
        from . import unsloth

        return unsloth.load(name, load_in_4bit, lora, parts, dtype, max_seq_length, gradient_checkpointing)
    from . import hf

    return hf.load(name, load_in_4bit, lora, parts, dtype, bool(gradient_checkpointing))


def import_unsloth_first(backend: Backend, trains_adapter: bool) -> None:
    """Import Unsloth now where ``load_model`` will take it: before transformers and TRL it can replace more of them.

    It changes speed only, and why Unsloth cannot be imported is said when the model is loaded.
    """
    if backend == "hf" or not trains_adapter:
        return
    import torch

    if backend == "unsloth" or torch.cuda.is_available():
        from .unsloth import why_not

        why_not()


def is_adapter(path: str) -> bool:
    """Whether a folder holds a PEFT adapter rather than a whole model."""
    return (Path(path) / "adapter_config.json").is_file()


def is_reward_model(path: str | Path) -> bool:
    """Whether a folder holds a reward model: a run of ``reward train``, or one of its checkpoints."""
    return (Path(path).expanduser() / REWARD_MODEL).is_file()


def refuse_reward_model(path: str | Path, what: str) -> None:
    """Refuse a reward model where a policy is asked for.

    Raises:
        ConfigError: see above.
    """
    if is_reward_model(path):
        again = " The same reward train command again continues its run." if what == "reward train" else ""
        raise ConfigError(
            f"{what}: {path} is a reward model, which scores answers and writes none. Give the model it was trained "
            f"from, or use it as a reward: rewards: [{{model: {path}}}].{again}"
        )


def check_trainable(name: str, load_in_4bit: bool, parts: "Parts") -> None:
    """Refuse 4-bit weights that are to be trained themselves: transformers does too, once they are loaded.

    Raises:
        ConfigError: see above.
    """
    if load_in_4bit and not parts.apart and not is_adapter(name):
        raise ConfigError(
            "load_in_4bit without lora: 4-bit weights cannot be trained themselves. Add adapters (--set lora=true), or "
            "leave load_in_4bit out."
        )


def _check_choice(option: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{option}={value!r} is not known. Choose one of {', '.join(map(str, known))}.")


def _locate(name_or_path: str | Path) -> str:
    """An absolute path for a folder (so that an adapter trained on it finds it again), the name for anything else."""
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name.strip() and path.is_dir():
        if not is_adapter(str(path)) and not (path / "config.json").is_file():
            raise ConfigError(
                f"model: the folder {name!r} holds neither config.json nor adapter_config.json. "
                "Give a model folder, a finished run, or one of its checkpoints."
            )
        return str(path.resolve())
    if looks_like_path(name) or not name.strip():
        raise ConfigError(f"model: the folder {name!r} does not exist. Check the path, or give a name on the Hub.")
    return name


def load_processor(name_or_path: str | Path) -> Any:
    """The processor of whatever ``load_model`` takes, without its weights; a tokenizer, for a text-only model.

    Raises:
        ConfigError: there is no such model, or its processor cannot be read.
    """
    from .hf import read_processor

    return read_processor(_locate(name_or_path))


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean a folder: a name on the Hub is ``name`` or ``owner/name``."""
    written = name.startswith(("./", "../", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    return Path(name).is_absolute() or written


def _choose(backend: Backend, trains_adapter: bool) -> tuple[str, str]:
    """``(backend, reason)``: Unsloth is imported here, if at all."""
    import torch

    if backend == "hf":
        return "hf", 'backend="hf" was asked for'
    from . import unsloth

    if backend == "unsloth":
        why_not = unsloth.why_not()
        if why_not:
            raise UnsupportedError(f'backend="unsloth": {why_not}. Use backend="hf" or "auto" on this machine.')
        return "unsloth", 'backend="unsloth" was asked for'
    if not torch.cuda.is_available():
        return "hf", "there is no CUDA device"
    if not trains_adapter:
        return "hf", "no adapter is trained, which is what Unsloth speeds up"
    why_not = unsloth.why_not()
    return ("hf", why_not) if why_not else ("unsloth", "there is a CUDA device and Unsloth works on it")


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedError(
            f"load_in_4bit needs bitsandbytes, which cannot be imported here ({reason}). "
            "Install it (pip install bitsandbytes), or load without 4-bit."
        ) from error
