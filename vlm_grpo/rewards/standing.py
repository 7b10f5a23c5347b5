"""Where a reward model stands while it scores: on the policy's base as one more adapter, or on a model of its own."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..config import Dtype
from ..encode import EncodedPrompt
from ..group import GroupSharing
from ..judging.scores import Scores
from ..models import load_model
from ..models.adapters import load_role
from ..models.heads import heads_of, load_head
from ..models.modes import without_checkpointing
from ..randomness import same_random_states
from .reward_run import RewardRun, naming

logger = logging.getLogger(__name__)

ROLE = "reward"
# By policy, the adapters that were put on it for rewards: a second trainer of the same model finds them there.
_ON: WeakKeyDictionary[nn.Module, dict[tuple[str, str], str]] = WeakKeyDictionary()


class Standing:
    """A reward model that can score.

    Attributes:
        model: frozen.
        shared: whether it is the policy's.
    """

    shared = False

    def __init__(self, model: Any, scores: Scores) -> None:
        self.model, self.scores = model, scores

    def __call__(self, encodings: list[EncodedPrompt], suffixes: list[list[int]]) -> list[float]:
        """The scores of prompts and tokens behind them. The model is left as it was found, random states included."""
        with self.awake(), same_random_states(), without_checkpointing(self.model), torch.no_grad():
            self.model.eval()
            return self.scores(encodings, suffixes).tolist()

    def awake(self) -> AbstractContextManager[None]:
        """Within it, the model is where it computes."""
        return nullcontext()


class OnPolicy(Standing):
    """One more adapter, with its head, on the policy's base.

    Args:
        run: the reward model.
        policy: PEFT's model on the same base.
        sharing: the trainer's own; None makes one.
        autocast: the precision to compute in.
        batch_size: sequences a forward.

    Raises:
        RewardError: its files do not fit the policy.
    """

    shared = True

    def __init__(
        self,
        run: RewardRun,
        policy: Any,
        sharing: GroupSharing | None,
        autocast: Callable[[], AbstractContextManager],
        batch_size: int,
    ) -> None:
        # A reward model that was trained anew in the same folder is another one.
        key = (str(run.folder), run.mark)
        roles = _ON.setdefault(policy, {})
        self.role = roles.get(key, "")
        if self.role not in heads_of(policy):
            self.role = _free(policy)
            with same_random_states(), naming(run.folder):
                load_role(policy, run.folder, self.role, trainable=False)
                load_head(policy, self.role, run.folder).requires_grad_(False)
            roles[key] = self.role
        head = heads_of(policy)[self.role]
        super().__init__(
            policy, Scores(policy, head, role=self.role, sharing=sharing, autocast=autocast, batch_size=batch_size)
        )


class OnItsOwn(Standing):
    """A model of its own, loaded by transformers as it was trained.

    Args:
        run: the reward model.
        dtype: of its weights; ``auto``: as it was trained.
        offload: whether it waits in the machine's memory, and is on the GPU only while it scores.
        batch_size: sequences a forward.

    Raises:
        RewardError: it cannot be loaded.
    """

    def __init__(self, run: RewardRun, dtype: Dtype, offload: bool, batch_size: int) -> None:
        own = run.dtype if dtype == "auto" else dtype
        with same_random_states(), naming(run.folder):
            model, _ = load_model(run.folder, backend="hf", load_in_4bit=run.in_4bit and run.adapter, dtype=own)
            head = load_head(model, "default", run.folder)
        model.requires_grad_(False).eval()
        head.requires_grad_(False)
        self._run, self._home = run, next(model.parameters()).device
        self._waits = offload and self._home.type == "cuda"
        super().__init__(model, Scores(model, head, batch_size=batch_size))
        self._sleep()

    @contextmanager
    def awake(self) -> Iterator[None]:
        try:
            if self._waits:
                self.model.to(self._home)  # where there is no room for all of it, a part has moved
            yield
        finally:
            self._sleep()

    def _sleep(self) -> None:
        if not self._waits:
            return
        try:
            self.scores.sharing.forget()  # what media were encoded to lies on the GPU too
            self.model.to("cpu")
        except (RuntimeError, ValueError, NotImplementedError) as error:  # some 4-bit weights do not move
            self._waits = False
            self.model.to(self._home)
            logger.warning(
                'The reward model "%s" stays on the GPU: its weights cannot be moved (%s).', self._run.folder, error
            )
        torch.cuda.empty_cache()


def _free(policy: Any) -> str:
    """``reward``, ``reward2``, ...: the first that no adapter has."""
    name, number = ROLE, 1
    while name in policy.peft_config:
        number += 1
        name = f"{ROLE}{number}"
    return name
