"""Values: an adapter and a head beside the policy's on one base, and what they make of a rollout's tokens."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback
from trl.trainer.utils import disable_dropout_in_model

from .encode import EncodedPrompt
from .errors import GradientError
from .models.adapters import POLICY, adapter_parameters, copy_adapter, load_role, remember_roles, role
from .models.families import family_of
from .models.heads import HEAD_FILE, add_head, heads_of, load_head
from .models.modes import pinned_forward
from .models.wrappers import is_peft_model, plain_model, unwrapped
from .scoring import forwards
from .scoring import values as plain_values

VALUE = "value"
_REWARD = "reward"


def add_values(policy: Any, disable_dropout: bool, folder: Path | None = None) -> None:
    """Give a policy its values: with PEFT an adapter of their own, and a head.

    They are those of an earlier run where its folder is given; else the adapter is a copy of a reward model's on the
    same base, or of the policy's as it starts, and the head begins at zero.

    Args:
        policy: PEFT's model or a plain one, without wrappers; before there is an optimizer.
        disable_dropout: whether the adapter has none.
        folder: see ``saved_values``.

    Raises:
        ConfigError: the folder's adapter is of another base, or cannot be read.
        CheckpointError: its head cannot.
    """
    if folder is not None:
        if is_peft_model(policy):
            load_role(policy, folder, VALUE, trainable=True)
        load_head(policy, VALUE, folder)
    elif is_peft_model(policy):
        judged = _REWARD in policy.peft_config and _REWARD in heads_of(policy)
        copy_adapter(policy, _REWARD if judged else POLICY, VALUE, trainable=True)
    if folder is None:
        add_head(policy, VALUE, zero=True)
    if is_peft_model(policy):
        remember_roles(policy)  # a step's two adapters share one backward pass
        if disable_dropout:
            disable_dropout_in_model(policy)


def saved_values(model: str, adapted: bool) -> Path | None:
    """The folder of the values that a finished PPO run has beside its policy; None for any other model.

    Args:
        model: a name or a path.
        adapted: whether the policy's adapter is gone on with, so that an adapter of values fits.
    """
    folder = Path(model).expanduser() / VALUE
    fits = (folder / "adapter_config.json").is_file() == adapted
    return folder if (folder / HEAD_FILE).is_file() and fits else None


def value_parameters(policy: Any) -> list[nn.Parameter]:
    """The weights of the values: head and adapter."""
    own = adapter_parameters(policy, VALUE) if is_peft_model(policy) else []
    return [*own, *heads_of(policy)[VALUE].parameters()]


class ValueCheck(TrainerCallback):
    """Stops a run whose values' adapter receives no gradient. A head of zeros hands none on: it waits for the first
    step on which the head is none and learns.

    Args:
        names: the adapter's weights that every row reaches, whatever its media are.
    """

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.names or args.fp16:  # in which the first gradients may be too small for any number but 0
            return
        policy = unwrapped(model)
        head = heads_of(policy)[VALUE]
        if not any(bool(weight.any()) for weight in head.parameters()) or not _receives(head.parameters()):
            return
        own = [weight for name, weight in policy.named_parameters() if name in self.names]
        if not _receives(own):
            raise GradientError(
                f"None of the {len(own)} weights of the adapter {VALUE} received a gradient on step "
                f"{state.global_step + 1}, though its head did. The graph is cut before it: with gradient "
                'checkpointing use gradient_checkpointing_kwargs={"use_reentrant": False}, or set vf_coef=0 to train '
                "without values."
            )
        self.names = set()


def _receives(weights: Iterable[nn.Parameter]) -> bool:
    return any(weight.grad is not None and bool(weight.grad.any()) for weight in weights)


def values_of(
    trainer: Any, ids: Tensor, mask: Tensor, width: int, rows: list[EncodedPrompt], batch_size: int | None, model: Any
) -> Tensor:
    """The values (B, width) in front of each completion token, 0 at padding, prompts shared where that is exact.

    Args:
        trainer: whose sharing and precision count.
        ids: (B, L + width), prompts left-padded, completions right-padded; ``mask`` alike, 1 at real tokens.
        width: tokens of the completions.
        rows: the rows' encodings.
        batch_size: rows of a forward at most; None takes all.
        model: what is called, with the values, unwrapped from DDP.
    """
    policy = unwrapped(model)
    in_role: AbstractContextManager[Any] = role(policy, VALUE) if is_peft_model(policy) else nullcontext()
    with in_role, pinned_forward(model):
        return _values(trainer, heads_of(policy)[VALUE], ids, mask, width, rows, batch_size or len(rows), model)


def _values(
    trainer: Any,
    head: Callable[[Tensor], Tensor],
    ids: Tensor,
    mask: Tensor,
    width: int,
    rows: list[EncodedPrompt],
    most: int,
    model: Any,
) -> Tensor:
    autocast = trainer.accelerator.autocast

    def plain(own: Any, few: list[int]) -> Tensor:
        """The same rows, one prompt per completion."""
        batches = iter([[row] for row in few])
        return plain_values(plain_model(own), head, ids, mask, width, rows, batches, autocast)[few]

    if trainer.sharing.on(model, rows):
        shared = trainer.sharing.values(model, head, ids[:, -width:], mask[:, -width:], rows, plain, most)
        if shared is not None:
            return shared
    batches = forwards(family_of(trainer.model.config), rows, most)
    return plain_values(plain_model(model), head, ids, mask, width, rows, batches, autocast)
