"""Stops a run whose numbers explode, before they reach a weight or a checkpoint.

In every step: the losses and the norm that clipping takes anyway, looked at once before the update. Where a number
first exploded is searched for only then (``explosion.py``).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor
from transformers import Trainer, TrainerCallback

from .encode import EncodedPrompt
from .errors import NumbersError
from .explosion import Explosion, Generated, MicroBatch

# A loss scale starts at 65536 and halves with each skipped step: 17 of them in a row bring it below 1.
_LEAST_SCALE, _MOST_SKIPPED = 1.0, 20
_LARGEST_LOGIT = 1e30  # divided by a temperature, more than this is infinite
_NO_PROBABILITIES = "probability tensor contains"  # what sampling says of NaN on a CPU


class FiniteNumbers(Trainer):
    """Sits between a trainer and transformers': asks ``numbers`` before each update and each checkpoint."""

    numbers: "NumbersCheck"

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.numbers.before_update(norm)
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.numbers.check_weights()
        super()._save_checkpoint(model, trial)


class NumbersCheck(TrainerCallback):
    """Looks at losses, gradient norms, generated logits and weights; all processes stop together.

    Args:
        trainer: a ``FiniteNumbers``, whose ``compute_loss`` calls ``note`` and ``said.watch``.
        tokenizer: writes the prompt of a row.
        log: called with ``numbers/...`` metrics where a loss scale is in use; the last value before a log counts.
        forget: drops what media were encoded to before, so that a search sees their towers.
    """

    def __init__(
        self, trainer: Any, tokenizer: Any, log: Callable[[str, float], None], forget: Callable[[], None] = lambda: None
    ) -> None:
        self.trainer, self._log = trainer, log
        self.said = Explosion(trainer, tokenizer, forget)
        self._batches: list[MicroBatch] = []
        self._last: list[MicroBatch] = []
        self._generated: Generated | None = None
        self._skipped = self._skipped_in_a_row = 0
        self._scale = 0.0

    # ---- the loss and its gradient ------------------------------------------------------------------------------

    def note(self, loss: Tensor, inputs: dict[str, Any], items: Any = None) -> Tensor:
        """Remember a micro-batch until the update. Returns ``loss``."""
        if loss.requires_grad and not self.said.searching:
            self._batches.append(MicroBatch(loss.detach().mean(), inputs, items))
        return loss

    def before_update(self, norm: Any) -> None:
        """Stop before an update by what is not finite.

        Args:
            norm: of the gradient of this step, unscaled; None where the library keeps it to itself.

        Raises:
            NumbersError: a loss is not finite; or the norm is, where no loss scale adapts to that.
        """
        batches, self._batches = self._batches, []
        self._last = batches if self.said.scaler is not None else []
        found = self._values([batch.loss for batch in batches], norm)  # processes x (micro-batches, norm)
        exploded = [
            (number, row[number]) for number in range(len(batches)) for row in found if not math.isfinite(row[number])
        ]
        if exploded:
            number, value = exploded[0]
            alone = len(exploded) == 1 and len(found) * len(batches) > 1
            raise NumbersError(self.said.of_loss(value, batches[number], alone))
        if norm is not None and not math.isfinite(found[0][-1]) and not self._loss_scale_adapts:
            raise NumbersError(self.said.of_gradient(f"the gradient norm is {found[0][-1]}", batches))

    def _values(self, losses: list[Tensor], norm: Any) -> list[list[float]]:
        figures = [*losses, *([] if norm is None else [norm])]
        if not figures:
            return [[]]
        device = self.trainer.accelerator.device
        full = [figure.full_tensor() if hasattr(figure, "full_tensor") else figure for figure in figures]
        values = torch.stack([torch.as_tensor(figure, device=device).detach().float() for figure in full])[None]
        values = gather(values) if self.trainer.args.world_size > 1 else values
        assert isinstance(values, Tensor), "one tensor in, one tensor out"
        return values.tolist()

    # ---- the loss scale -----------------------------------------------------------------------------------------

    @property
    def _loss_scale_adapts(self) -> bool:
        """DeepSpeed has one of its own."""
        return self.said.scaler is not None or (self.trainer.args.fp16 and self.trainer.is_deepspeed_enabled)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self.said.scaler is None:
            return
        # accelerate's own answer does not see that a fused optimizer, the default, skips a step within itself
        scale, before = self.said.scaler.get_scale(), self._scale
        skipped, self._scale = scale < before, scale
        self._skipped += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        self._log("numbers/skipped_steps", float(self._skipped))
        self._log("numbers/loss_scale", scale)
        if skipped and (scale < _LEAST_SCALE or self._skipped_in_a_row >= _MOST_SKIPPED):
            what = f"fp16 gradients overflowed in {self._skipped_in_a_row} steps in a row, at last with a loss scale of"
            raise NumbersError(self.said.of_gradient(f"{what} {scale:g}", self._last))
        self._last = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self._skipped = 0

    # ---- weights ------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._batches, self._skipped_in_a_row = [], 0
        self._scale = 0.0 if self.said.scaler is None else self.said.scaler.get_scale()
        place = self.said.broken()
        if place is not None:
            place = place[0].upper() + place[1:]
            raise NumbersError(
                f"{place} NaN or infinite before step {state.global_step + 1}: what they were loaded from is broken. "
                "Load the model anew, or continue from another checkpoint."
            )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.check_weights()

    def check_weights(self) -> None:
        """Raise ``NumbersError`` where an update has made a trained weight NaN or infinite; before each save."""
        place = self.said.broken(trainable=True)
        if place is not None:
            raise NumbersError(self.said.of_weights(place.removesuffix(" are")))

    # ---- generation ---------------------------------------------------------------------------------------------

    @contextmanager
    def generating(self, prompt_ids: list[list[int]], encodings: list[EncodedPrompt]) -> Iterator[list[list[int]]]:
        """Around a generation, whose completions go into the list: notes NaN and infinite logits.

        They are replaced before anything is sampled from them: sampling would end a GPU's process by an assertion.

        Raises:
            NumbersError: there are some. Several processes leave that to ``after_generation``.
        """
        completions: list[list[int]] = []
        exploded: list[Tensor] = []

        def look(module: Any, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.requires_grad:
                last = output[..., -1:, :]
                bad = ~(last < _LARGEST_LOGIT)
                exploded[:] = [bad.any() | exploded[0] if exploded else bad.any()]
                last.masked_fill_(bad, 0)

        head = self.said.plain().get_output_embeddings()
        handle = None if head is None else head.register_forward_hook(look)
        try:
            yield completions
        except RuntimeError as error:
            if not (exploded and bool(exploded[0])) and _NO_PROBABILITIES not in str(error):
                raise
            failed = Generated(prompt_ids, [[]] * len(prompt_ids), encodings)
            raise NumbersError(self.said.of_generation(failed)) from error
        finally:
            if handle is not None:
                handle.remove()
        if exploded and bool(exploded[0]):
            self._generated = self._generated or Generated(prompt_ids, completions, encodings)
        if self.trainer.args.world_size == 1:
            self.after_generation()

    def after_generation(self) -> None:
        """Once a rollout on every process: stop all of them where the logits of one exploded, by a ``NumbersError``."""
        if any(self.said.from_all(self._generated is not None)):
            said = self.said.from_all(self.said.of_generation(self._generated))
            raise NumbersError(next(text for text in said if text))
