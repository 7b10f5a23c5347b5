"""Does every kind of medium reach the loss? Shown on a few rows of the run's own data, before step 1.

Three findings a kind of medium: blanking it moves the log-probabilities that the loss is made of; generation, a batch
and the row alone agree on them; no feature that the processor's output makes is missing.
"""

import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from ..data import Sample, blanked
from ..data.sample import swap_media
from ..errors import FlowError
from ..media import KINDS, Kind, Medium, Video
from ..media.hearing import extractor_of
from .forwards import ANYWAY, Forwards, places
from .rows import Probe, candidates, choose, differ
from .still import undisturbed

_LOG = logging.getLogger("vlm_grpo")

# Blanking has to move log-probs by so many times what two identical forwards differ by, and by more than rounding.
_TIMES_NOISE, _LEAST_MOVE = 10.0, 1e-6
# Mean differences that pass; where they do not, one rounding stands for those of every layer of two passes.
_EXACT, _COARSE, _TIMES_ROUNDING = 1e-4, 0.05, 5.0


class FlowCheck(TrainerCallback):
    """Stops a run whose media do not reach the loss, before its first step; says so, a line a kind, where they do.

    A table is looked at when training begins, whether from the start or from a checkpoint. A streaming dataset has no
    rows to choose from: the trainer shows its first batch to ``check_rows``.

    Args:
        trainer: its own; ``args.flow_check`` turns this off.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.pending = bool(trainer.args.flow_check)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.pending and isinstance(self.trainer.train_dataset, Dataset):
            self._check(*candidates(self.trainer.train_dataset))

    def check_rows(self, rows: list[dict[str, Any]]) -> None:
        """Check on these rows, unless the check has been made; a kind that they lack is not looked at.

        Raises:
            FlowError: a kind of medium does not reach the loss.
        """
        if self.pending:
            self._check(((f"row {i} of the first batch", row) for i, row in enumerate(rows)), {*KINDS, "text"})

    def _check(self, rows: Any, wanted: set[str]) -> None:
        trainer, self.pending = self.trainer, False
        main = trainer.accelerator.is_main_process
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            if main:
                _LOG.warning("Flow check: not made under DeepSpeed and FSDP, where no process runs a forward alone.")
            return
        avoid = {*trainer._tokenizer.all_special_ids, *trainer.placeholder_ids, *trainer.eos_token_ids}
        avoid |= set(trainer.generation_kwargs.get("suppress_tokens") or ())
        forwards = Forwards(trainer)
        probes = choose(rows, trainer.intake, wanted, avoid, forwards.mixed)
        if not any(probe.kinds for probe in probes):
            return
        for line in check_probes(forwards, probes):
            if main:
                _LOG.info("%s", line)


@dataclass
class _Finding:
    """What one row shows.

    Attributes:
        moved: per kind that the row shows, the largest move of a log-prob in nats when its media are blanked, and that
            between two identical forwards; None where no control has the same tokens.
        made: features that the model makes of the row alone, by the kind of medium it makes them as.
        batch: mean difference in nats between the row in a training batch and alone.
        rollout: the same between generation and the training batch.
    """

    moved: dict[Kind, tuple[float, float] | None]
    made: Counter[str]
    batch: float
    rollout: float


def check_probes(forwards: Forwards, probes: list[Probe]) -> list[str]:
    """Run the check and return its lines, one a kind of medium.

    Raises:
        FlowError: a kind of medium does not reach the loss.
    """
    with undisturbed(forwards.model):
        alone, made = zip(*(forwards.alone(probe) for probe in probes), strict=True)
        single = [_single(forwards, probe, expected) for probe, expected in zip(probes, made, strict=True)]
        moved = [_moved(forwards, probe, before) for probe, before in zip(probes, single, strict=True)]
        batch = torch.cat(single)
        if forwards.mixed:
            batch, in_batch = forwards.counted(probes)
            _check_features(forwards, probes, in_batch, sum(made, Counter()))
        rollout = forwards.rollout(probes)
        apart = zip(moved, made, _apart(batch, torch.stack(alone)), _apart(rollout, batch), strict=True)
        findings = [_Finding(*values) for values in apart]
        for probe, finding in zip(probes, findings, strict=True):
            _check_agreement(forwards, probe, finding)
    shown: list[Kind] = [kind for kind in KINDS if any(kind in probe.shows for probe in probes)]
    return [_line(forwards, kind, probes, findings) for kind in shown]


def _apart(one: Tensor, other: Tensor) -> list[float]:
    """(rows, T) twice to the rows' mean differences."""
    return (one - other).abs().mean(1).tolist()


def _single(forwards: Forwards, probe: Probe, expected: Counter[str]) -> Tensor:
    """(1, T) log-probs of one row as the loss takes them."""
    logps, made = forwards.counted([probe])
    _check_features(forwards, [probe], made, expected)
    return logps


def _moved(forwards: Forwards, probe: Probe, before: Tensor) -> dict[Kind, tuple[float, float] | None]:
    """As ``_Finding.moved``. Noise takes the place of blanks where the media are blank themselves, or hardly differ."""
    if not probe.shows:
        return {}
    noise = _largest(forwards.score([probe]), before)
    moved: dict[Kind, tuple[float, float] | None] = {}
    for kind in probe.shows:
        moves = []
        for noisy in (False, True):
            other = forwards.trainer.intake.encode(_without(probe.sample, kind, forwards.trainer, noisy))
            if other.input_ids == probe.encoding.input_ids and differ(other, probe.encoding):
                moves.append(_largest(forwards.score([probe], [other]), before))
                if moves[-1] > max(_TIMES_NOISE * noise, _LEAST_MOVE):
                    break
        else:
            if moves:
                raise FlowError(
                    f"The {kind} of {probe.sample.where} does not reach the loss: blanking it moves the "
                    f"log-probabilities by {max(moves):.1e} nats, and two identical forwards differ by {noise:.1e} "
                    f"({forwards.family}). Its tensors are lost between the processor and the model, or its tower or "
                    f"projector is untrained and lets nothing through. {ANYWAY}"
                )
        moved[kind] = (moves[-1], noise) if moves else None
    return moved


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _check_features(forwards: Forwards, probes: list[Probe], made: Counter[str], expected: Counter[str]) -> None:
    for kind in KINDS:
        if made[kind] < expected[kind]:  # a batch may make more of them: padded ones
            raise FlowError(
                f"The {kind} of {places(probes)} does not reach the loss whole: the model makes {made[kind]} {kind} "
                f"features of what the trainer gives it, and {expected[kind]} of the processor's own output "
                f"({forwards.family}). Its {kind} tensors are lost or cut on the way to the model. {ANYWAY}"
            )


def _check_agreement(forwards: Forwards, probe: Probe, finding: _Finding) -> None:
    allowed = _EXACT if forwards.precision == torch.float32 else _COARSE
    if max(finding.rollout, finding.batch) > allowed:
        allowed = max(allowed, _TIMES_ROUNDING * forwards.rounding(probe))
    what = f"the {' and '.join(probe.kinds) or 'text'} of {probe.sample.where}"
    if finding.batch > allowed:
        raise FlowError(
            f"A training batch reads {what} differently: its log-probabilities are {finding.batch:.1e} nats from those "
            f"of the row alone, {allowed:.1e} is allowed ({forwards.family}). The batch mixes up or loses media of its "
            f"rows, or the model cannot take such rows together: train on one kind of medium at a time. {ANYWAY}"
        )
    if finding.rollout > allowed:
        raise FlowError(
            f"Generation and training disagree on {what}: the log-probabilities of one completion are "
            f"{finding.rollout:.1e} nats apart, {allowed:.1e} is allowed ({forwards.family}). The two see different "
            f"inputs, or the model's cached generation is not exact. {ANYWAY}"
        )


def _line(forwards: Forwards, kind: Kind, probes: list[Probe], findings: list[_Finding]) -> str:
    """What the rows with this kind of medium showed; the first of them gives the figures of a single row."""
    held = [(probe, finding) for probe, finding in zip(probes, findings, strict=True) if kind in probe.kinds]
    probe, first = next(pair for pair in held if kind in pair[0].shows)
    move = first.moved[kind]
    blank = "its blank has other tokens, so it was not tried"
    if move is not None:
        blank = f"blanking moves log-probs by {move[0]:.2g} nats, noise {move[1]:.1g}"
    rollout = max(finding.rollout for _, finding in held)
    # Families may add features to those they make, or have no method that makes them: so this is said, not checked.
    made = first.made[kind] or first.made.total()  # some make a video's as pictures
    ids = forwards.trainer.intake.placeholders.get(kind, ())
    tokens = max((probe.encoding.input_ids.count(token) for token in ids), default=0)
    features = f"{made} features for {tokens} tokens" if made else "features not counted"
    return f"Flow check: {kind} reaches the loss ({blank}; rollout and training agree to {rollout:.1g}; {features})."


def _without(sample: Sample, kind: Kind, trainer: Any, noisy: bool) -> Sample:
    """The sample with one kind of its media blank, or noise; of a video that is heard, one half."""
    import numpy as np
    from PIL import Image

    options, draw = trainer.intake.media, np.random.default_rng(0)
    rate = getattr(extractor_of(trainer.intake.processor), "sampling_rate", None)

    def filled(values: Any) -> Any:
        if not noisy:
            return values
        if values.dtype == np.uint8:
            return draw.integers(0, 256, values.shape, np.uint8)
        return draw.uniform(-0.5, 0.5, values.shape).astype(values.dtype)

    def other(medium: Medium, blank: Medium) -> Medium:
        source = blank.source
        if isinstance(source, Video) and source.sound is not None:
            assert rate is not None, "a video is heard only where the processor hears"
            seen, heard = medium.open_video(options).frames, medium.open_audio(rate, options)
            seen = filled(source.frames) if kind == "video" else seen
            source = replace(source, frames=seen, sound=filled(source.sound) if kind == "audio" else heard)
        elif medium.kind != kind:
            return medium
        elif isinstance(source, Video):
            source = replace(source, frames=filled(source.frames))
        else:
            source = Image.fromarray(filled(np.asarray(source))) if kind == "image" else filled(source)
        return Medium(medium.kind, source, medium.where, blank.overrides, blank.rate)

    pairs = zip(sample.media, blanked(sample, options, rate).media, strict=True)
    return swap_media(sample, {id(medium): other(medium, blank) for medium, blank in pairs})
