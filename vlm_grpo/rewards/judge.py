"""``JudgeReward``: a reward model that was trained here, which sees the prompts' media, as a reward function."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..config import Dtype, MediaOptions
from ..errors import RewardError, UnsupportedError
from .judge_captions import JudgeCaptions
from .judged_rows import JudgedRows
from .options import check_name
from .processors import difference
from .reward_run import RewardRun, naming
from .text import completion_text

if TYPE_CHECKING:
    from ..group import GroupSharing
    from ..intake import Intake
    from .standing import Standing

logger = logging.getLogger(__name__)

_ROWS = 8  # a forward, where nothing says how many fit


class JudgeReward:
    """Scores responses by a reward model: an adapter with a scalar head that sees images, videos and sounds.

    Where the policy is PEFT's on the same base, the reward model is one more frozen adapter there, and is given the
    very prompts that the policy was given, their media encoded once for both. Any other is a model of its own, with its
    own processor. A response has the same score alone and in any batch, before and after steps of training.

    Args:
        model: the folder of a finished ``vlm-grpo reward train``.
        captions: file of captions by media file, as ``judging.captions.Captions`` reads it; a row's own column
            ``captions`` comes before it. Only the reward model reads them.
        batch_size: responses a forward; None: as many as a micro-batch of the run it judges, else 8.
        share_base: ``auto`` stands on the policy's base where that is the same one; True is an error where it is not;
            False always takes a model of its own.
        offload: whether a model of its own waits in the machine's memory between calls; ``auto``: where there is a GPU.
        dtype: number type of a model of its own; ``auto``: as it was trained.
        name: what metrics call it; None is the folder's name.

    Raises:
        RewardError: an option that cannot work; a folder that is no finished reward model, or whose base is gone.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        captions: str | Path | None = None,
        batch_size: int | None = None,
        share_base: bool | Literal["auto"] = "auto",
        offload: bool | Literal["auto"] = "auto",
        dtype: Dtype = "auto",
        name: str | None = None,
    ) -> None:
        if batch_size is not None and (
            isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
        ):
            raise RewardError(f"batch_size={batch_size!r} must be a whole number from 1 on. Correct it.")
        check_name("dtype", dtype, get_args(Dtype))
        for option, value in (("share_base", share_base), ("offload", offload)):
            if value is not True and value is not False and value != "auto":
                raise RewardError(f"{option}={value!r} is none of auto, true, false. Correct it.")
        self.run = RewardRun.read(model)
        with naming(self.run.folder):
            self.captions = JudgeCaptions(self.run, captions)
        self.batch_size, self.share_base, self.offload = batch_size, share_base, offload
        self.dtype: Dtype = dtype
        self.__name__ = name or self.run.folder.name
        self.seeing = (rows := JudgedRows()).seeing
        self._rows = rows
        self._media: MediaOptions = self.run.media
        self._root: Path | None = None
        self._theirs: Any = None  # the policy's processor
        self._standing: Standing | None = None
        self._foreign: str | None = None  # how the policy's prompts differ from its own

    def __repr__(self) -> str:
        return f"JudgeReward({str(self.run.folder)!r})"

    @property
    def on_policy(self) -> bool:
        """Whether it stands on the policy's base."""
        return self._standing is not None and self._standing.shared

    @property
    def mark(self) -> tuple[str, str]:
        """Its folder, and what becomes another one as soon as it is trained anew."""
        return str(self.run.folder), self.run.mark

    # ---- the run ------------------------------------------------------------------------------------------------

    def use_run(self, *, processor: Any = None, media: MediaOptions | None = None, **_: Any) -> None:
        """Take the run's media options, so that it sees what the policy sees, and know the policy's processor."""
        self._theirs = processor or self._theirs
        self._media = media or self._media

    def use_model(
        self,
        model: Any,
        *,
        template: dict[str, Any] | None = None,
        root: Path | None = None,
        sharing: "GroupSharing | None" = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        batch_size: int | None = None,
        split: str | None = None,
    ) -> None:
        """Stand on the policy's base, where that is the same one; else load a model of its own.

        Args:
            model: the policy, without the wrappers of accelerate.
            template: what the policy's prompts are rendered with, beside its processor.
            root: the folder that relative media paths start from.
            sharing: the trainer's own.
            autocast: the precision of training.
            batch_size: rows of the policy's own micro-batch.
            split: what has split the policy's weights among processes; None where each has all of them.

        Raises:
            RewardError: ``share_base`` is true and the base is another one; it cannot be loaded.
            UnsupportedError: the policy's weights are split, and the base is the same one.
        """
        from .standing import OnPolicy

        self._root = root or self._root
        reason = self._apart(model)
        if reason is not None and self.share_base is True:
            raise RewardError(f'share_base: "{self.run.folder}" cannot stand on the policy, because {reason}.')
        if reason is None and split is not None:
            raise UnsupportedError(
                f'The reward model "{self.run.folder}" stands on the base of the policy, which {split} splits '
                "among processes. Give share_base: false: each process then loads a reward model of its own."
            )
        if reason is None:  # also where it has had a model of its own
            new = self._standing is None or self._standing.model is not model
            if new:
                self._say_bits(model)
            if new or sharing is not None:  # another trainer's precision; an evaluation leaves the trainer's
                self._standing = OnPolicy(self.run, model, sharing, autocast, self.batch_size or batch_size or _ROWS)
        elif self._standing is None or self._standing.shared:
            if self.share_base == "auto":
                logger.warning(
                    'The reward model "%s" is loaded beside the policy, with a base of its own, because %s.',
                    self.run.folder,
                    reason,
                )
            self._standing = self._on_its_own()
        self._compare(template or {})

    def _apart(self, model: Any) -> str | None:
        """Why it cannot stand on the policy, or None."""
        from peft import PeftModel

        from ..models.adapters import base_of

        if self.share_base is False:
            return "share_base is false"
        if not self.run.adapter:
            return "it is a whole model"
        if not isinstance(model, PeftModel):
            return "the policy has no adapter, so that its own weights are trained"
        base = base_of(model)
        return None if base == self.run.base else f'its base is "{self.run.base}" and the policy\'s is "{base}"'

    def _on_its_own(self) -> "Standing":
        import torch

        from .standing import OnItsOwn

        offload = torch.cuda.is_available() if self.offload == "auto" else bool(self.offload)
        return OnItsOwn(self.run, self.dtype, offload, self.batch_size or _ROWS)

    def _say_bits(self, model: Any) -> None:
        in_4bit = bool(getattr(model, "is_loaded_in_4bit", False))
        if in_4bit != self.run.in_4bit:
            own, here = ("4-bit" if bits else "16- or 32-bit" for bits in (self.run.in_4bit, in_4bit))
            logger.warning(
                'The reward model "%s" was trained on a %s base and stands on the %s one of the policy: its scores '
                "differ a little. Give share_base: false for its own.",
                self.run.folder,
                own,
                here,
            )

    def _compare(self, template: dict[str, Any]) -> None:
        """Find out whether the policy's prompts are its own: the same tokens, pixels and chat template."""
        if self._theirs is not None:
            self._foreign = difference(self._theirs, template, self._processor, self.run.template)

    @cached_property
    def _processor(self) -> Any:
        """Its own, that was saved with it."""
        from ..models import load_processor

        with naming(self.run.folder):
            return load_processor(self.run.folder)

    def _intake(self, standing: "Standing") -> "Intake":
        """How it reads rows itself: by its own processor, the media as the policy sees them."""
        from ..intake import Intake
        from ..models.families import placeholder_ids_by_kind

        placeholders = placeholder_ids_by_kind(standing.model.config, self._processor)
        return Intake(self._processor, placeholders, self._media, self._root, template=self.run.template)

    # ---- scores -------------------------------------------------------------------------------------------------

    def __call__(
        self, prompts: list[Any] | None = None, completions: Sequence[Any] = (), captions: Any = None, **columns: Any
    ) -> list[float]:
        """One score a completion.

        Args:
            prompts: messages, or texts to which the reward model's own chat template has been applied.
            completions: strings or message lists.
            captions: of each row a text, several, or None.
            columns: of the rows, media among them.

        Raises:
            RewardError: rows that it cannot read, or see.
        """
        if prompts is None or len(prompts) != len(completions):
            raise RewardError(
                "a reward model that sees the media needs the prompt of each completion. Call it with prompts, "
                "completions and the media columns of the rows."
            )
        if self._standing is None:
            self._standing = self._on_its_own()
            self._compare({})
        intake = self._intake(self._standing)
        theirs = self._theirs is not None and self._foreign is None
        with naming(self.run.folder):
            if not theirs and self._theirs is not None and any(isinstance(prompt, str) for prompt in prompts):
                raise RewardError(
                    f'The reward model "{self.run.folder}" cannot read prompts to which the chat template of the '
                    f"policy has been applied: {self._foreign}. Give the rows' prompts as messages."
                )
            rows = self._rows.of(prompts, columns, intake, theirs)
            samples = [sample for sample, _ in rows]
            read = self.captions.of(samples, captions)
            written: dict[tuple[int, str, tuple[str, ...]], list[int]] = {}  # completions of a group are often alike
            suffixes = []
            for sample, completion, some in zip(samples, completions, read, strict=True):
                text = completion_text(completion)
                if (key := (id(sample), text, tuple(some))) not in written:
                    written[key] = self.run.prompt.suffix(intake.processor, sample, text, some, **intake.template)
                suffixes.append(written[key])
        return self._standing([encoding for _, encoding in rows], suffixes) if rows else []
