"""Unsloth: its two modes of a model, and the switches that it reads from the environment in every forward.

Its ``generate`` and ``for_inference`` leave the model in inference mode, without checkpointing; and with
``UNSLOTH_RETURN_HIDDEN_STATES=1``, which its own GRPO trainer sets and any user may, ``logits`` are hidden states.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from vlm_grpo.errors import UnsupportedError

from .ledger import Patch
from .transformers import answered_by

# What its modes write on a module, beside the flags that every model of transformers has.
MODULE_FLAGS = ("_flag_for_generation",)

# Logits are logits, and they are there. UNSLOTH_FORCE_FLOAT32 and its like are left alone: they say how a model was
# loaded, are stamped on it, and no forward reads them.
_PINNED = {"UNSLOTH_RETURN_HIDDEN_STATES": "0", "UNSLOTH_RETURN_LOGITS": "1"}


def is_loaded() -> bool:
    """Whether this process has imported Unsloth, whoever did it."""
    return "unsloth_zoo" in sys.modules


def infer(model: Any) -> bool:
    """Put a model that Unsloth has loaded into its inference mode; whether it is such a model."""
    switch = getattr(model, "for_inference", None)
    if switch is None or not is_loaded():
        return False
    switch()
    return True


def tokenizers_of(model: Any) -> list[Any]:
    """The tokenizers that Unsloth keeps on a model, whose padding side its modes change."""
    kept = [vars(module).get("_saved_temp_tokenizer") for module in model.modules()]
    return [tokenizer for tokenizer in kept if hasattr(tokenizer, "padding_side")]


@contextmanager
def same_environment() -> Iterator[None]:
    """After it, Unsloth's variables are what they were before, those that are new are gone."""
    before = {name: value for name, value in os.environ.items() if name.startswith("UNSLOTH_")}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("UNSLOTH_") and name not in before]:
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def pinned(model: Any) -> Iterator[None]:
    """Forwards of ours: within it, Unsloth's switches are those that we need, and logits are one per token known.

    Nothing happens in a process without Unsloth.

    Args:
        model: the plain model, adapters included.

    Raises:
        UnsupportedError: from a forward whose logits are no logits.
    """
    if not is_loaded():
        yield
        return

    def check(module: Any, inputs: Any, outputs: Any) -> None:
        logits: Any = getattr(outputs, "logits", None)
        if getattr(logits, "ndim", 0) == 3 and logits.shape[-1] not in sizes:
            raise UnsupportedError(
                f"The logits of {type(module).__name__} have {logits.shape[-1]} values a token, and its vocabulary has "
                f"{min(sizes)}: they are hidden states, or a part. Leave Unsloth's environment variables unset."
            )

    sizes = _vocabulary(model)
    handle = model.register_forward_hook(check) if sizes else None
    try:
        with same_environment():
            os.environ.update(_PINNED)
            yield
    finally:
        if handle is not None:
            handle.remove()


def _vocabulary(model: Any) -> set[int]:
    """What the last dimension of logits may be: the rows of the head, or the configured number of tokens."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    rows = getattr(head, "out_features", None) or getattr(getattr(head, "weight", None), "shape", [None])[0]
    config: Any = getattr(model, "config", None)
    known = getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
    return {size for size in (rows, known) if size}


@contextmanager
def own_generate(model: Any, autocast: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Within it, ``model.generate`` is transformers' own, where Unsloth has put one that makes caches of its own.

    Args:
        model: the plain model, adapters included. What listens in the method's place, and has what it calls as its own
            attribute ``generate``, goes on listening: to transformers' own.
        autocast: the precision to compute in, which Unsloth's would have chosen.
    """
    original = getattr(model, "_old_generate", None)
    if original is None:
        yield
        return
    stands = vars(model).get("generate")
    with answered_by(stands if hasattr(stands, "generate") else model, "generate", original), autocast():
        yield


def at_step_boundary() -> None:
    """What Unsloth's own training step does first: settle which compiled functions have fallen back to eager."""
    functions = sys.modules.get("unsloth_zoo.temporary_patches.utils")
    settle = getattr(functions, "apply_pending_eager_fallbacks", None)
    if settle is not None:
        settle()


PATCHES: list[Patch] = []  # each lasts for one call
