"""What the trainer asks for: shared work where it is exact, checked on first use, with a count of what it saves."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..encode import EncodedPrompt
from ..errors import SharingError
from ..models.families import Family, together
from ..models.wrappers import plain_model
from ..patches.unsloth_modes import own_generate
from .attention import install, is_installed, uninstall
from .comparing import compare, gap
from .features import Features
from .forward import Scorer
from .idle import Moved, without_gradient, zero_gradients
from .mixers import has_mixers, install_mixers
from .reasons import Unshareable, reason_against
from .rollout import Prompts, generate, generation_reason

_LOG = logging.getLogger("vlm_grpo")
_CHECKED_TOKENS, _CHECKED_PROMPTS = 3, 2  # the second prompt shows what is left of the first


class GroupSharing:
    """Shares the work of a prompt among its completions.

    Args:
        family: the model's row of the table.
        mode: ``auto`` falls back with a warning where sharing is not exact, True raises there, False never shares.
        placeholders: ids of tokens that stand for media.
        autocast: the precision of training.
        aux_loss: whether the router's auxiliary loss is trained.
        fused: compute packed attention by FlexAttention.
    """

    def __init__(
        self,
        family: Family,
        mode: Literal["auto"] | bool,
        placeholders: tuple[int, ...],
        autocast: Callable[[], AbstractContextManager],
        aux_loss: bool = False,
        fused: bool = False,
    ) -> None:
        self.family, self.mode, self.autocast, self.aux_loss, self.fused = family, mode, autocast, aux_loss, fused
        self.placeholders = frozenset(placeholders)
        self.off = mode is False
        self.off_in_generation = False
        self.saved = {"prompt_tokens": 0, "encodes": 0}
        self._features: dict[int, Features] = {}
        self._checked: dict[tuple, list[int]] = {}
        self._said: set[str] = set()
        self.moved = Moved(family)

    # ---- where it is exact --------------------------------------------------------------------------------------

    def on(self, model: nn.Module, encodings: list[EncodedPrompt]) -> bool:
        """Whether these rows share their prompts' work. Decides on first use for a model.

        Raises:
            SharingError: sharing was demanded and is not exact for the model.
        """
        if self.off:
            return False
        plain = plain_model(model)
        if id(plain) in self._features and not is_installed(plain):
            del self._features[id(plain)]  # another attention was set since: everything is to be shown again
            self._checked.clear()
        if id(plain) not in self._features:
            try:
                reason = reason_against(plain, self.aux_loss)
                if reason is not None:
                    raise Unshareable(reason)
                install(plain)
                install_mixers(plain)
            except Unshareable as error:
                self.refuse(str(error))
                return False
            self._features[id(plain)] = Features(plain, self.family, self.autocast)
        return self._fits(encodings)

    def _fits(self, encodings: list[EncodedPrompt]) -> bool:
        for encoded in {id(e): e for e in encodings}.values():
            if encoded.input_ids[-1] in self.placeholders:
                self.refuse("a prompt ends in a medium", forever=False)
                return False
        return True

    def refuse(self, reason: str, forever: bool = True, generation: bool = False) -> None:
        """Fall back with the reason, said once, or raise it where sharing was demanded."""
        if self.mode is True:
            raise SharingError(
                f"group_sharing=True: the work of a prompt cannot be shared by its completions, because {reason}. "
                'Set group_sharing to "auto" or false.'
            )
        if generation:
            self.off_in_generation = True
        elif forever:
            self.off = True
        if reason not in self._said:
            self._said.add(reason)
            what = "Prompts are prefilled" if generation else "Prompts are processed"
            _LOG.warning("%s once per completion, because %s.", what, reason)

    def release(self) -> None:
        """Leave the models with the attention that they came with."""
        for features in self._features.values():
            uninstall(features.model)

    def forget(self) -> None:
        """Drop what media were encoded to: the next forward encodes them again."""
        for features in self._features.values():
            features.known.clear()

    # ---- log-probabilities --------------------------------------------------------------------------------------

    def logps(
        self,
        model: Any,
        completions: Tensor,
        mask: Tensor,
        encodings: list[EncodedPrompt],
        idle: list[bool],
        plain: Callable[[Any, list[int]], Tensor],
        batch_size: int,
        prompt_width: int = 0,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Log-probabilities and entropies (B, T) in nats, of each prompt once; None where sharing turns out inexact.

        Args:
            model: the trainer's model, wrapped as it may be.
            completions: (B, T) ids.
            mask: (B, T), 1 at real tokens.
            encodings: one per row; the rows of a group hold one object.
            idle: per row, whether its gradient is known to be zero.
            plain: log-probabilities (len(rows), T) of some rows of this batch without sharing, for the check.
            batch_size: rows of a forward at most, of groups that are not larger themselves.
            prompt_width: tokens that several prompts in one forward are padded to at least.
        """
        own = plain_model(model)
        features = self._features[id(own)]
        scorer = Scorer(model, own, features, self.autocast, self.fused)
        logps = torch.zeros(completions.shape, device=completions.device)
        entropies = torch.zeros_like(logps)
        skipped: list[EncodedPrompt] = []
        with features.settled():
            for groups in self._forwards(own, encodings, idle, batch_size):
                index = torch.tensor(groups, device=completions.device)  # (n, G)
                prompts = [encodings[rows[0]] for rows in groups]
                skip = torch.is_grad_enabled() and all(idle[row] for row in groups[0])
                before = features.encodes
                try:
                    scorer.encode(prompts, completions.device)
                    with without_gradient(completions.device) if skip else nullcontext():
                        out, entropy = scorer.groups(prompts, completions[index], mask[index], prompt_width)
                    self._check("log-probabilities", own, prompts, out, groups, mask[index], plain)
                except Unshareable as error:
                    self.refuse(str(error))
                    return None
                self._count(prompts, len(groups[0]), features.encodes - before + _trained(features, prompts))
                skipped += prompts if skip else []
                logps = logps.index_copy(0, index.flatten(), out.flatten(0, 1).to(logps.dtype))
                if entropy is not None:
                    entropies = entropies.index_copy(0, index.flatten(), entropy.flatten(0, 1).to(logps.dtype))
        if skipped:
            logps = logps + zero_gradients(own, self.family, skipped, self.moved.names or None)
        return logps, entropies

    def values(
        self,
        model: Any,
        head: Callable[[Tensor], Tensor],
        completions: Tensor,
        mask: Tensor,
        encodings: list[EncodedPrompt],
        plain: Callable[[Any, list[int]], Tensor],
        batch_size: int,
    ) -> Tensor | None:
        """A scalar head's numbers (B, T) in front of each completion token, of each prompt once; else as ``logps``.

        Args:
            head: hidden states (..., H) to numbers (...).
            plain: the numbers (len(rows), T) of some rows of this batch without sharing, for the check.
        """
        own = plain_model(model)
        features = self._features[id(own)]
        scorer = Scorer(model, own, features, self.autocast, self.fused)
        values = torch.zeros(completions.shape, device=completions.device)
        with features.settled():
            for groups in self._forwards(own, encodings, [False] * len(encodings), batch_size):
                index = torch.tensor(groups, device=completions.device)  # (n, G)
                prompts = [encodings[rows[0]] for rows in groups]
                before = features.encodes
                try:
                    scorer.encode(prompts, completions.device)
                    out = scorer.values(prompts, completions[index], mask[index], head)
                    self._check("values", own, prompts, out, groups, mask[index], plain)
                except Unshareable as error:
                    self.refuse(str(error))
                    return None
                self._count(prompts, len(groups[0]), features.encodes - before + _trained(features, prompts))
                values = values.index_copy(0, index.flatten(), out.flatten(0, 1))
        return values

    def _forwards(
        self, model: Any, encodings: list[EncodedPrompt], idle: list[bool], batch_size: int
    ) -> Iterator[list[list[int]]]:
        """The groups of each forward, of equal size each, in rows of the batch."""
        alone = self.fused or has_mixers(model)  # which know one row at a time
        kinds: dict[tuple, list[list[int]]] = {}
        for rows in groups_of(encodings):
            skip = all(idle[row] for row in rows)
            kinds.setdefault((len(rows), skip), []).append(rows)
        for (size, _), groups in kinds.items():
            most = 1 if alone else max(1, batch_size // size)
            for start in range(0, len(groups), most):
                some = groups[start : start + most]
                for numbers in together(self.family, [encodings[rows[0]] for rows in some]):
                    yield [some[number] for number in numbers]

    def _count(self, prompts: list[EncodedPrompt], rows: int, encodes: int) -> None:
        self.saved["prompt_tokens"] += sum((rows - 1) * (len(encoded.input_ids) - 1) for encoded in prompts)
        media = sum(rows for encoded in prompts if encoded.media)
        self.saved["encodes"] += max(0, media - encodes) if media else 0

    def _check(
        self,
        what: str,
        model: Any,
        prompts: list[EncodedPrompt],
        found: Tensor,
        groups: list[list[int]],
        mask: Tensor,
        plain: Callable[[Any, list[int]], Tensor],
    ) -> None:
        """On the first prompts of each kind: the same numbers as their rows have without sharing."""
        for number, (encoded, rows) in enumerate(zip(prompts, groups, strict=True)):
            checked = self._checked.setdefault((what, id(model), len(rows) > 1, *sorted(encoded.media)), [])
            if id(encoded) in checked or len(checked) == _CHECKED_PROMPTS or not bool(mask[number].any()):
                continue
            few = sorted({0, len(rows) - 1})  # the last sees the others, if any does
            with without_gradient(found.device):
                expected = plain(model, [rows[place] for place in few])
            if what == "values" and not bool(found.any()) and not bool(expected.any()):
                return  # a head of zeros shows nothing, of whatever prompt
            own = found[number].detach()[few]
            if not bool(expected.isfinite().all()) and not bool(own.isfinite().all()):
                continue  # numbers that explode with sharing and without: no difference, and the run's own matter
            low, counts = self._is_16_bit(model), mask[number][few]
            compare(what, (own - expected).abs(), counts, low, expected * counts)
            checked.append(id(encoded))

    def _is_16_bit(self, model: Any) -> bool:
        with self.autocast():
            mixed = torch.is_autocast_enabled(plain_model(model).device.type)
        return mixed or any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())

    # ---- generation ---------------------------------------------------------------------------------------------

    def generates(self, model: Any, encodings: list[EncodedPrompt]) -> bool:
        """Whether these rows share a prefill. The same decision as ``on``."""
        return not self.off_in_generation and self.on(model, encodings)

    def generate(
        self, model: Any, prompts: Prompts, index: list[int], config: GenerationConfig, pad: int, device: Any
    ) -> Tensor | None:
        """Completions (B, T) as ``model.generate`` gives them, each prompt prefilled once; None where it cannot be.

        Args:
            model: the unwrapped model.
            prompts: the unique prompts.
            index: the prompt of each row.
            config: how to generate.
            pad: the id that prompts are padded with.
            device: where it runs.
        """
        if max(map(len, prompts.ids)) < 2:  # nothing to prefill
            return None
        own = plain_model(model)
        merged, _ = own._prepare_generation_config(copy.deepcopy(config))  # what it leaves open is the model's to say
        reason = generation_reason(merged)
        if reason is not None:
            self.refuse(reason, generation=True)
            return None
        features = self._features[id(own)]
        before = features.encodes
        try:
            self._check_masks(model, own, features, prompts.encodings[0], device)
        except Unshareable as error:
            self.refuse(str(error))
            return None
        try:
            features.encode(prompts.encodings, lambda row: prompts.inputs(pad, device, [row]))
            with without_gradient(own.device):
                self._check_generation(own, features, prompts, config, pad, device)
            rows, inputs = torch.tensor(index, device=device), prompts.inputs(pad, device)
            with features.of(prompts.encodings), own_generate(own, self.autocast):
                out = generate(own, features, inputs, prompts.tokens, rows, config, model.generate)
        except Unshareable as error:
            self.refuse(str(error), generation=True)
            return None
        self.saved["prompt_tokens"] += sum(len(prompts.ids[i]) for i in index) - sum(map(len, prompts.ids))
        media = sum(bool(prompts.encodings[i].media) for i in index)
        self.saved["encodes"] += max(0, media - (features.encodes - before + _trained(features, prompts.encodings)))
        return out[:, inputs["input_ids"].shape[1] :]

    def _check_masks(self, model: Any, own: Any, features: Features, encoded: EncodedPrompt, device: Any) -> None:
        """Once: the model's masks, which are made in front of its first layer, have a place for a packed row."""
        kind = ("masks", id(own))
        if kind in self._checked:
            return
        ids = torch.tensor(encoded.input_ids[-1:], device=device).expand(1, 2, 1)
        with torch.no_grad(), features.up_to_first_layer():
            Scorer(model, own, features, self.autocast, self.fused).groups([encoded], ids, torch.ones_like(ids))
        self._checked[kind] = []

    def _check_generation(
        self, model: Any, features: Features, prompts: Prompts, config: GenerationConfig, pad: int, device: Any
    ) -> None:
        """Once: the logits of a few greedy tokens, of two prompts with two rows each, are those without sharing."""
        kind = ("generation", id(model), *sorted({name for encoded in prompts.encodings for name in encoded.media}))
        if kind in self._checked:
            return
        own = partial(type(model).generate, model)  # whoever listens to the model's generate waits for the run's
        few = list(range(min(2, len(prompts.ids))))
        index = torch.tensor(few, device=device).repeat_interleave(2)
        greedy = GenerationConfig(
            max_new_tokens=_CHECKED_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=config.pad_token_id,
            suppress_tokens=config.suppress_tokens,
        )
        with features.of([prompts.encodings[row] for row in few]), own_generate(model, self.autocast):
            inputs = prompts.inputs(pad, device, few)
            shared = generate(model, features, inputs, prompts.tokens, index, greedy, own)
        plain = own(**prompts.inputs(pad, device, index.tolist()), generation_config=greedy)
        low = self._is_16_bit(model)
        compare("logits", *gap(shared, plain, low), low, torch.stack(plain.logits))
        self._checked[kind] = []


def _trained(features: Features, prompts: list[EncodedPrompt]) -> int:
    """The prompts whose media a trained tower encodes, each time anew."""
    return sum(not kept for kept in features.kept([encoded for encoded in prompts if encoded.media]))


def groups_of(encodings: list[EncodedPrompt]) -> list[list[int]]:
    """The rows of each prompt, by the object that they share."""
    groups: dict[int, list[int]] = {}
    for row, encoded in enumerate(encodings):
        groups.setdefault(id(encoded), []).append(row)
    return list(groups.values())
