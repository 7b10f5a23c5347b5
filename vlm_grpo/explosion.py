"""What is said of numbers that exploded: in which step, which number, in which layer first, in which row, what to do.

A search runs a micro-batch again with hooks on every module. All processes take part in it, each with its own rows,
because a loss exchanges figures between them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import shorten
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .data import Sample
from .encode import EncodedPrompt, where_of
from .origin import broken_weight, first_in_backward, first_in_forward
from .scoring import logps

_KEPT = "This step changed no weight, and the checkpoints before it are whole."


@dataclass
class MicroBatch:
    """A micro-batch of the current step: its loss, and the arguments of ``compute_loss``."""

    loss: Tensor
    inputs: dict[str, Any]
    items: Any = None


@dataclass
class Generated:
    """One generation: prompts, completions (none where it failed), encodings, row by row."""

    prompt_ids: list[list[int]]
    completions: list[list[int]]
    encodings: list[EncodedPrompt]


class Explosion:
    """Searches and words what a ``NumbersError`` says.

    Args:
        trainer: whose ``compute_loss`` shows its rows to ``watch``.
        tokenizer: writes the prompt of a row.
        forget: drops what media were encoded to before, so that a search sees their towers.
    """

    def __init__(self, trainer: Any, tokenizer: Any, forget: Callable[[], None]) -> None:
        self.trainer, self.tokenizer, self._forget = trainer, tokenizer, forget
        self.samples: WeakKeyDictionary[EncodedPrompt, Sample] = WeakKeyDictionary()
        self.searching = False
        self._rows: list[tuple[EncodedPrompt, bool]] = []

    def watch(self, outputs: Tensor | None, encodings: list[EncodedPrompt]) -> None:
        """Note which rows of ``outputs`` (B, T) are finite, during a search."""
        if self.searching and outputs is not None:
            self._rows += zip(encodings, outputs.detach().isfinite().flatten(1).all(1).tolist(), strict=True)

    # ---- sentences ----------------------------------------------------------------------------------------------

    def of_loss(self, value: float, batch: MicroBatch, others_finite: bool) -> str:
        """Args: the loss, the micro-batch whose loss it is on some process, whether all other losses are finite."""
        what = f"the loss is {value}"
        if (place := self.broken()) is not None:
            return self._sentence(f"{what}, because {place} NaN or infinite since an update")
        where = self._search(batch, first_in_forward)
        mine = None if math.isfinite(float(batch.loss)) else (where, self._row(others_finite))
        where, row = next((found for found in self.from_all(mine) if found), (None, ""))
        return self._sentence(f"{what}, {where or 'and finite when it is computed again'}{row}", bool(row))

    def of_gradient(self, what: str, batches: list[MicroBatch]) -> str:
        """Args: the norm in words, all micro-batches of the step."""
        for batch in batches:
            found = [place for place in self.from_all(self._search(batch, first_in_backward)) if place]
            if found:
                return self._sentence(f"{what}, {found[0]}")
        return self._sentence(f"{what}, though the parts that each micro-batch adds are finite")

    def of_generation(self, generated: Generated | None) -> str | None:
        """None on a process whose generation was fine."""
        if generated is None:
            return None
        what = "the logits of the generation are NaN or infinite"
        if (place := self.broken()) is not None:
            return self._sentence(f"{what}, because {place} NaN or infinite since an update")
        if self.is_sharded:  # a forward of one process would wait for the others
            return self._sentence(what)
        places, self._rows = self._of_each(generated), []
        self._rows = [(e, place is None) for e, place in zip(generated.encodings, places, strict=True)]
        where, row = next((place for place in places if place), None), self._row(others_finite=False)
        return self._sentence(f"{what}{where and ', '}{where or ''}{row}", bool(row))

    def of_weights(self, place: str) -> str:
        """Args: a trained weight that an update has made NaN or infinite."""
        step = self.trainer.state.global_step
        return (
            f"The update of step {step} made {place} NaN or infinite: they are not saved, and the checkpoints before "
            f"are whole. {self._advice()}"
        )

    def _sentence(self, what: str, row: bool = False) -> str:
        return f"Step {self.trainer.state.global_step + 1}: {what}. {_KEPT} {self._advice(row)}"

    def _advice(self, row: bool = False) -> str:
        args = self.trainer.args
        clip = f"lower max_grad_norm ({args.max_grad_norm:g})" if args.max_grad_norm else "set max_grad_norm"
        ways = [f"lower learning_rate ({args.learning_rate:g})", clip]
        ways = (["train in bf16 or fp32"] if args.fp16 else []) + ways + (["leave that row out"] if row else [])
        said = f"{', '.join(ways[:-1])} or {ways[-1]}."
        return said[0].upper() + said[1:]

    def _row(self, others_finite: bool) -> str:
        """The only prompt whose rows are not all finite, if others are."""
        bad = {id(encoded): encoded for encoded, finite in self._rows if not finite}
        if len(bad) != 1 or not (others_finite or any(finite for _, finite in self._rows)):
            return ""
        encoded = next(iter(bad.values()))
        sample = self.samples.get(encoded)
        text = " ".join(self.tokenizer.decode(encoded.input_ids, skip_special_tokens=True).split())
        media = " and ".join(encoded.senses)
        if sample is not None:
            media = ", ".join(f'{medium.kind} "{medium.label}"' for medium in sample.media)
        place = f" ({where_of(sample)})" if sample is not None and sample.where else ""
        return f', only in the row{place} of the prompt "{shorten(text, 100)}"' + (f" with {media}" if media else "")

    # ---- searches -----------------------------------------------------------------------------------------------

    def _search(self, batch: MicroBatch, first: Callable[..., str | None]) -> str | None:
        """Where it comes from in a micro-batch, which is run again; ``_rows`` are its rows."""
        plain = self.plain()
        model = self.trainer.model_wrapped if self.is_sharded else plain
        losses: list[Tensor] = []

        def run() -> Tensor:
            loss = self.trainer.compute_loss(model, batch.inputs, num_items_in_batch=batch.items)
            losses.append(loss.detach())
            return self.scaler.scale(loss) if self.scaler is not None and loss.requires_grad else loss

        self._forget()
        self._rows, self.searching = [], True
        try:
            where = _searched(first, plain, run)
        finally:
            self.searching = False
        if where is None and losses and not bool(losses[0].isfinite().all()):
            given = [n for n, v in batch.inputs.items() if isinstance(v, Tensor) and not bool(v.isfinite().all())]
            where = f"first seen in {', '.join(given)}" if given else "first seen in the loss, behind the model"
        return where

    def _of_each(self, generated: Generated) -> list[str | None]:
        """Each row's prompt and completion once more, in a forward of its own."""
        self._forget()
        model, accelerator, places = self.plain(), self.trainer.accelerator, []
        for ids, completion, encoded in zip(*vars(generated).values(), strict=True):
            tokens = torch.tensor([[*ids, *(completion or ids[-1:])]], device=accelerator.device)
            width = tokens.shape[1] - len(ids)
            row = (model, tokens, torch.ones_like(tokens), width, [encoded], iter([[0]]), accelerator.autocast)
            places.append(_searched(first_in_forward, model, lambda row=row: logps(*row)))
        return places

    # ---- the machinery ------------------------------------------------------------------------------------------

    @property
    def scaler(self) -> Any:
        """The loss scale, None without one."""
        return getattr(self.trainer.accelerator, "scaler", None)

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds a part of each weight only."""
        return self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled

    def plain(self) -> Any:
        """The policy without wrappers, adapters included."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def broken(self, trainable: bool = False) -> str | None:
        """A weight of the policy, or of the reference, that is not finite, as "the weights ... are"."""
        if self.is_sharded:
            return None
        place = broken_weight(self.plain(), trainable)
        if place is not None:
            return f"the weights {place} are"
        reference = None if trainable else getattr(self.trainer, "ref_model", None)
        place = None if reference is None else broken_weight(self.trainer.accelerator.unwrap_model(reference))
        return None if place is None else f"the reference model's weights {place} are"

    def from_all(self, value: Any) -> list[Any]:
        """The values of all processes."""
        return [value] if self.trainer.args.world_size == 1 else gather_object([value])


def _searched(first: Callable[..., str | None], model: Any, run: Callable[[], Any]) -> str | None:
    """A search's answer; where the pass itself fails, as for want of memory, its reason."""
    try:
        place = first(model, run)
    except RuntimeError as error:
        return f"in a layer that could not be searched for ({' '.join(str(error).split())[:200]})"
    return None if place is None else f"first seen {place}"
