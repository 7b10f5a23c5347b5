"""A multimodal scalar reward model: an adapter and a linear head, trained on pairs of responses to one prompt.

The score is the head on the last layer's hidden state of the last token of prompt, media, response and judge's request
(LLaVA-RLHF, Sun et al. 2023, section 2.1); the loss is ``losses.pairwise_loss``.
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.trainer.utils import disable_dropout_in_model

from .config import MediaOptions
from .data import Sample
from .data.pairs import as_pairs
from .encode import EncodedPrompt
from .errors import ConfigError, GradientError, UnsupportedError
from .group import GroupSharing
from .judging.captions import Captions
from .judging.prompt import JudgePrompt
from .judging.scores import Scores
from .losses import pairwise_loss
from .models import REWARD_MODEL
from .models.adapters import base_of
from .models.families import placeholder_ids
from .models.heads import HEADS, add_head, heads_of
from .models.wrappers import is_peft_model
from .quantized import is_quantized
from .supervised import SupervisedConfig, SupervisedTrainer

_LOG = logging.getLogger("vlm_grpo")
_VERSION = 1  # of the folder's layout
_MOST_TIED = 8  # pairs in a row: fewer may be chance, in 16 bits


@dataclass
class VLMRewardConfig(SupervisedConfig):
    """transformers' ``TrainingArguments`` and ours. Precision left unset follows the machine."""

    center_rewards_coefficient: float = field(
        default=1e-3, metadata={"help": "Factor of the absolute mean score of a micro-batch, which keeps it near 0."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Turn dropout off, in adapters too, as TRL does."})
    group_sharing: Literal["auto"] | bool = field(
        default="auto",
        metadata={"help": 'Encode and read the prompt once for both responses of a pair. "auto": where it is exact.'},
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.center_rewards_coefficient) and self.center_rewards_coefficient >= 0):
            raise ConfigError(
                f"center_rewards_coefficient={self.center_rewards_coefficient}: needs 0 or more. Correct the value."
            )
        super().__post_init__()


class VLMRewardTrainer(SupervisedTrainer):
    """Learns to score the chosen response of a pair above the rejected one.

    Both responses of a pair hold one ``EncodedPrompt``, so that the prompt and its media are computed once. The first
    term of the loss is the mean over all pairs of a step, however they are spread over micro-batches and processes; the
    second is that of each micro-batch, weighted by its pairs.

    Args:
        model: with an adapter (``load_model(..., lora=LoraOptions())``); it gets a head for it if it has none.
        args: a ``VLMRewardConfig``.
        train_dataset: pairs, in any form that ``data.pairs.as_pairs`` takes.
        eval_dataset: as ``train_dataset``.
        processing_class: the processor; it is copied and never changed.
        media_root: the folder that relative media paths start from.
        media: how media are opened, and what happens to those that cannot be.
        judge: the request that is read behind a response; by default the built-in one.
        captions: true captions of media, for the judge alone.
        kwargs: the remaining arguments of transformers' ``Trainer``.

    Raises:
        ConfigError: a model without an adapter, an argument of another type, or fewer pairs than a batch where such
            batches are dropped.
        DataFormatError: a row that is no pair.
        GradientError: the head or a trained tower receives no gradient on step 1, or no pair's scores differ.
        NumbersError: a loss, a gradient or a weight became NaN or infinite.
        UnsupportedError: FSDP or DeepSpeed.
    """

    def __init__(
        self,
        model: Any,
        args: VLMRewardConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        media_root: str | Path | None = None,
        media: MediaOptions | dict[str, Any] | None = None,
        judge: JudgePrompt | None = None,
        captions: Captions | None = None,
        **kwargs: Any,
    ) -> None:
        _check_types(args, judge, captions)
        if not is_peft_model(model):
            raise ConfigError(
                f"A reward model is an adapter, and this {type(model).__name__} has none. Load it with "
                "load_model(..., lora=LoraOptions()), or add one by PEFT's get_peft_model."
            )
        if "default" not in heads_of(model):
            with torch.random.fork_rng():  # the same head whatever was drawn before
                torch.manual_seed(args.seed)
                add_head(model)
        heads_of(model)["default"].requires_grad_(True)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        self.judge = judge or JudgePrompt.of(None, None)
        self.captions = captions
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, media_root, media, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UnsupportedError(
                "A reward model is not trained under FSDP or DeepSpeed: its scores are read from parts of the model, "
                "which these spread over processes. Train it with DDP, or with one process."
            )
        check_size(self.train_dataset, args)
        placeholders = placeholder_ids(model.config, self.processing_class)
        self.autocast: Any = self.accelerator.autocast
        self.sharing = GroupSharing(self._family, args.group_sharing, placeholders, self.autocast)
        self._tallies: dict[str, _Tally] = defaultdict(_Tally)
        self._tied = 0

    # ---- rows ---------------------------------------------------------------------------------------------------

    def read_dataset(self, dataset: Any, name: str) -> Any:
        return None if dataset is None else super().read_dataset(as_pairs(dataset, name), name)

    def collate_rows(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows to their encodings and what is read behind them, chosen and rejected.

        ``labels`` (B,) holds a one a pair, by which transformers counts them.
        """
        read = [self.read_row(row, rows) for row in rows]
        pairs = [self.suffixes(row, sample) for row, sample, _ in read]
        return {
            "labels": torch.ones(len(rows), dtype=torch.long),
            "encodings": [encoding for _, _, encoding in read],
            "chosen": [chosen for chosen, _ in pairs],
            "rejected": [rejected for _, rejected in pairs],
        }

    def suffixes(self, row: dict[str, Any], sample: Sample) -> tuple[list[int], list[int]]:
        """The tokens behind the prompt for the chosen and the rejected response, the captions in the same order."""
        captions = self.captions_of(sample)
        chosen, rejected = (
            self.judge.suffix(self.processing_class, sample, row[name], captions) for name in ("chosen", "rejected")
        )
        return chosen, rejected

    def captions_of(self, sample: Sample) -> list[str]:
        """The captions that the judge is shown of a row's media."""
        return [] if self.captions is None else list(self.captions.of(sample, self.args.seed))

    # ---- scores and loss ----------------------------------------------------------------------------------------

    def scorer(self, model: Any = None, pairs: int = 8) -> Scores:
        """What scores rows: of the wrapped model in training, of the plain one by default."""
        plain = self.accelerator.unwrap_model(self.model)
        model = plain if model is None else model
        head = heads_of(plain)["default"]
        return Scores(model, head, sharing=self.sharing, autocast=self.autocast, batch_size=2 * pairs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        encodings: list[EncodedPrompt] = [encoding for encoding in inputs["encodings"] for _ in range(2)]
        suffixes = [suffix for pair in zip(inputs["chosen"], inputs["rejected"], strict=True) for suffix in pair]
        pairs = len(inputs["encodings"])
        scores = self.scorer(model, pairs)(encodings, suffixes)[:, None]
        self.show_checks(scores, encodings)
        chosen, rejected = scores.view(pairs, 2).unbind(1)
        loss = pairwise_loss(chosen, rejected, self.args.center_rewards_coefficient)
        if num_items_in_batch is not None:
            loss = loss * (pairs / num_items_in_batch) * self.processes()
        self._tallies[self._mode].add(chosen.detach(), rejected.detach())
        self.numbers.note(loss, inputs, num_items_in_batch)
        return (loss, {"chosen": chosen, "rejected": rejected}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Pairs: transformers would leave out one a batch, as labels of tokens are shifted."""
        count: Any = torch.tensor(sum(len(batch["labels"]) for batch in batch_samples), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count)
        return count.sum()

    @property
    def _mode(self) -> str:
        assert self.model is not None, "transformers has it by now"
        return "train" if self.model.training else "eval"

    def part_of(self, name: str) -> str:
        return "head" if f"{HEADS}." in name else super().part_of(name)

    def forget(self) -> None:
        self.sharing.forget()

    # ---- what is logged, kept and saved -------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the figures of all pairs since the last log, by the names of TRL's RewardTrainer."""
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        if mode in self._tallies and "train_runtime" not in logs:
            tally = self._tallies.pop(mode).of_all(self.args.world_size)
            prefix = "eval_" if mode == "eval" else ""
            # In place, as TRL does: an evaluation's own dictionary is what the best checkpoint is chosen by.
            logs.update({f"{prefix}{name}": value for name, value in tally.figures().items()} if tally.pairs else {})
            if mode == "train":
                self._check_ties(tally)
        super().log(logs, start_time)

    def _check_ties(self, tally: "_Tally") -> None:
        self._tied = self._tied + int(tally.pairs) if tally.ties == tally.pairs else 0
        if self._tied >= _MOST_TIED:
            raise GradientError(
                f"Step {self.state.global_step}: both responses of each of the last {self._tied} pairs got the same "
                "score, so nothing is learned. Look at the pairs, and whether the judge's prompt shows the response."
            )

    def _resume_state(self) -> dict[str, Any]:
        return {**super()._resume_state(), "tally": list(self._tallies["train"].summed()), "tied": self._tied}

    def _load_resume_state(self, state: dict[str, Any]) -> None:
        super()._load_resume_state(state)
        self._tallies["train"], self._tied = _Tally(*state["tally"]), state["tied"]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        self.judge.save(folder)
        about = {
            "version": _VERSION,
            "base_model": base_of(self.accelerator.unwrap_model(self.model)),
            "load_in_4bit": is_quantized(self.model),
            "stem": self.judge.stem,
            "captions": self.captions is not None,
            "media": self.intake.media.model_dump(mode="json", exclude={"scan", "on_bad"}),
        }
        (folder / REWARD_MODEL).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_types(args: Any, judge: Any, captions: Any) -> None:
    """What a notebook easily confuses: a file's name for what is read from it, another trainer's options for these."""
    if not isinstance(args, VLMRewardConfig):
        raise ConfigError(f"args is a {type(args).__name__}: VLMRewardTrainer takes a VLMRewardConfig. Give one.")
    for name, value, cls, how in (
        ("judge", judge, JudgePrompt, "JudgePrompt.of(FILE)"),
        ("captions", captions, Captions, "Captions.read(FILE)"),
    ):
        if value is not None and not isinstance(value, cls):
            raise ConfigError(f"{name} is a {type(value).__name__}: it needs a {cls.__name__}. Give {how}.")


def check_size(dataset: Any, args: VLMRewardConfig) -> None:
    """Refuse a dataset of which no batch would be taken; say where one is smaller than a batch.

    Raises:
        ConfigError: see above.
    """
    pairs = len(dataset) if hasattr(dataset, "__len__") else None
    batch = args.per_device_train_batch_size * args.world_size
    if pairs is None or pairs >= batch:
        return
    said = f"The training dataset has {pairs} pairs, and a batch takes {batch}"
    if pairs == 0 or args.dataloader_drop_last:
        raise ConfigError(f"{said}: no step could be taken. Add pairs, or lower per_device_train_batch_size.")
    _LOG.warning("%s: every step takes all of them.", said)


@dataclass
class _Tally:
    """Sums over pairs. What was added last stays on the device until it is asked for, so that no step waits for it."""

    pairs: float = 0.0
    right: float = 0.0
    ties: float = 0.0
    margin: float = 0.0
    total: float = 0.0
    least: float = math.inf
    greatest: float = -math.inf

    def __post_init__(self) -> None:
        self._new: list[Tensor] = []

    def add(self, chosen: Tensor, rejected: Tensor) -> None:
        """Scores (B,) each, without their graph."""
        margin, both = (chosen - rejected).float(), torch.cat([chosen, rejected]).float()
        tied = (margin == 0).sum()
        figures = [(margin > 0).sum() + 0.5 * tied, tied, margin.sum(), both.sum(), both.min(), both.max()]
        self._new.append(torch.stack([margin.new_tensor(float(len(margin))), *(f.float() for f in figures)]))

    def summed(self) -> tuple[float, ...]:
        """The fields, with all that was added."""
        for new in torch.stack(self._new).tolist() if self._new else ():
            self._take(new)
        self._new = []
        return astuple(self)

    def of_all(self, processes: int) -> "_Tally":
        """The sums of all processes."""
        if processes == 1:
            self.summed()
            return self
        found = _Tally()
        for values in gather_object([self.summed()]):
            found._take(values)
        return found

    def figures(self) -> dict[str, float]:
        """By TRL's names; a tie counts as half right."""
        return {
            "accuracy": self.right / self.pairs,
            "margin": self.margin / self.pairs,
            "mean_reward": self.total / (2 * self.pairs),
            "min_reward": self.least,
            "max_reward": self.greatest,
        }

    def _take(self, values: Sequence[float]) -> None:
        sums = zip(fields(self)[:5], values[:5], strict=True)
        for field_, value in sums:
            setattr(self, field_.name, getattr(self, field_.name) + value)
        self.least, self.greatest = min(self.least, values[5]), max(self.greatest, values[6])
