"""TRL: its own classes in any import order, and log-probabilities on devices its Triton kernel does not know."""

import functools
import importlib
import threading
import types
from typing import Any

import torch

from ..losses import chunked_logps
from .ledger import Patch
from .own import forget_copy, is_copied, is_replaced, own_class

_LOCK = threading.RLock()


_TRAINER = ("trl.trainer.grpo_trainer", "GRPOTrainer")
_CONFIG = ("trl.trainer.grpo_config", "GRPOConfig")


def own_grpo_trainer() -> type:
    """TRL's own ``GRPOTrainer``, also after another library has replaced ``trl.GRPOTrainer`` by its own."""
    return own_class(*_TRAINER)


def own_grpo_config() -> type:
    """TRL's own ``GRPOConfig``, also after another library has replaced ``trl.GRPOConfig`` by its own."""
    return own_class(*_CONFIG)


def add_fused_head(model: Any, *args: Any, **kwargs: Any) -> None:
    """TRL's ``add_fused_lm_head``, also for a model that is its own backbone, and also where TRL has added it already.

    TRL asks ``model.base_model`` for the last hidden states. Where that is the model itself (Qwen2.5-Omni's thinker),
    it gets logits instead. Then the hidden states are taken at the head's door, and the head is given no row.
    """
    from trl.trainer.utils import add_fused_lm_head

    model.__dict__.pop("forward", None)  # TRL's own, which would otherwise be the forward that is wrapped
    if model.base_model is not model:
        add_fused_lm_head(model, *args, **kwargs)
        return
    forward, scoring = model.forward, threading.local()

    @functools.wraps(type(model).forward)
    def backbone(self: Any, *inputs: Any, **named: Any) -> Any:
        seen = []

        def at_the_door(module: Any, hidden: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
            seen.append(hidden[0])
            return (hidden[0][:, :0],) if getattr(scoring, "now", False) else None

        handle = self.get_output_embeddings().register_forward_pre_hook(at_the_door)
        try:
            outputs = forward(*inputs, **named)
        finally:
            handle.remove()
        outputs.last_hidden_state = seen[0]
        return outputs

    model.forward = types.MethodType(backbone, model)
    add_fused_lm_head(model, *args, **kwargs)
    fused = model.forward

    @functools.wraps(type(model).forward)
    def outer(self: Any, *inputs: Any, **named: Any) -> Any:
        if not named.get("fused_lm_head"):  # also the call that the fused forward makes for the backbone
            return fused(*inputs, **named)
        scoring.now = True
        try:
            return fused(*inputs, **named)
        finally:
            scoring.now = False

    model.forward = types.MethodType(outer, model)


class _LogProbs:
    """TRL's kernel where Triton runs it, plain torch elsewhere; the same call either way."""

    kernel: Any = None  # what TRL had before

    @classmethod
    def apply(cls, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        if cls.kernel is not None and hidden.is_cuda:
            return cls.kernel.apply(hidden, *args, **kwargs)
        return chunked_logps(hidden, *args, **kwargs)


def _utils() -> Any:
    utils = importlib.import_module("trl.trainer.utils")
    if not hasattr(utils, "_ChunkedLogProbFunction"):
        raise RuntimeError(
            "trl.trainer.utils has no _ChunkedLogProbFunction any more: this TRL is outside the tested window. "
            "Install trl 1.15."
        )
    return utils


def _cpu_log_probs_fail() -> bool:
    """Asks TRL's kernel for one log-probability on the CPU."""
    kernel = _utils()._ChunkedLogProbFunction
    if kernel is None:
        return True
    try:
        kernel.apply(torch.ones(1, 2), torch.ones(3, 2), None, torch.zeros(1, dtype=torch.long), 1.0, 1, None, 1.0, ())
    except (RuntimeError, AttributeError, ImportError, OSError, ValueError):  # Triton without a driver, by version
        return True  # not a TypeError: a kernel with other arguments must be heard of
    return False


def _dispatch_log_probs() -> None:
    utils = _utils()
    with _LOCK:
        if utils._ChunkedLogProbFunction is not _LogProbs:
            _LogProbs.kernel = utils._ChunkedLogProbFunction
            utils._ChunkedLogProbFunction = _LogProbs


def _restore_log_probs() -> None:
    utils = _utils()
    with _LOCK:
        if utils._ChunkedLogProbFunction is _LogProbs:
            utils._ChunkedLogProbFunction = _LogProbs.kernel


LOG_PROBS = Patch(
    name="trl-log-probs-without-triton",
    why="TRL computes log-probabilities by a Triton kernel only, so on a CPU it cannot compute a loss.",
    reference="trl.trainer.utils._ChunkedLogProbFunction (TRL 1.15)",
    remove_when="TRL's fused head has a plain torch path.",
    probe=_cpu_log_probs_fail,
    in_place=lambda: _utils()._ChunkedLogProbFunction is _LogProbs,
    apply=_dispatch_log_probs,
    undo=_restore_log_probs,
)


def _classes_replaced() -> bool | None:
    """Looks in which file the code of ``trl.GRPOTrainer`` and ``trl.GRPOConfig`` was written."""
    found = [is_replaced(*place) for place in (_TRAINER, _CONFIG)]
    return None if None in found else any(found)


def _take_own_classes() -> None:
    own_grpo_trainer()
    own_grpo_config()


def _forget_own_classes() -> None:
    for module, _ in (_TRAINER, _CONFIG):
        forget_copy(module)


OWN_CLASSES = Patch(
    name="trl-own-classes",
    why="Unsloth puts generated classes in the place of trl.GRPOTrainer and trl.GRPOConfig; its trainer never calls "
    "the methods that media travel by, so a subclass would train on text alone, silently.",
    reference="unsloth.models.rl.PatchFastRL, trl.trainer.grpo_trainer, trl.trainer.grpo_config",
    remove_when="Unsloth leaves TRL's classes where they are, or derives its own from them.",
    probe=_classes_replaced,
    in_place=lambda: any(is_copied(module) for module, _ in (_TRAINER, _CONFIG)),
    apply=_take_own_classes,
    undo=_forget_own_classes,
)
PATCHES = [LOG_PROBS, OWN_CLASSES]
