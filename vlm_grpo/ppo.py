"""``VLMPPOTrainer``: PPO on the rollouts, media, sharing and scores of ``VLMGRPOTrainer``.

In place of a group's mean stands a value that the model learns, by an adapter and a head of its own on the same base;
the KL to the reference is taken off the reward of each token. Sampling, the clipped loss and its metrics are TRL's.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .advantages import (
    KLController,
    RunningMoments,
    explained_variance,
    gae,
    kl_penalty,
    masked_mean,
    token_rewards,
    whiten,
)
from .critic import VALUE, ValueCheck, add_values, value_parameters, values_of
from .errors import ConfigError, UnsupportedError
from .group import to_units
from .losses import value_loss
from .models.heads import HEADS
from .models.modes import without_checkpointing
from .models.wrappers import is_peft_model
from .ppo_config import VLMPPOConfig
from .rates import split_groups
from .scoring import as_one_forward
from .trainer import VLMGRPOTrainer


class VLMPPOTrainer(VLMGRPOTrainer):
    """PPO for prompts with images, videos, sounds and text in one batch. Takes what ``VLMGRPOTrainer`` takes.

    The reward of a token is ``-kl_coef`` times its KL to the reference, and that of the last one the weighted sum of
    the reward functions beside it. Advantages (B, T) are generalised advantage estimates (Schulman et al. 2016), the
    loss is the clipped one of Schulman et al. (2017) plus ``vf_coef`` times the clipped value loss.

    With PEFT, the values are of an adapter ``value`` that starts as a copy of a reward model's on the same base, else
    of the policy's, with a head of zeros; the reference is a frozen copy of the policy's as it starts. Without PEFT the
    values are a head's on the policy itself. A completion whose rewards all failed or gave None teaches nothing.

    Args:
        args: a ``VLMPPOConfig``.
        model, reward_funcs, ...: see ``VLMGRPOTrainer``. No ``tools``.
        values: the folder ``value`` of an earlier run, whose values are gone on with.

    Raises:
        UnsupportedError: tools.
        Others as ``VLMGRPOTrainer``.
    """

    _tag_names = ["trl", "ppo", "vlm-grpo"]
    compares = False

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *others: Any,
        values: str | Path | None = None,
        **named: Any,
    ) -> None:
        args = VLMPPOConfig.of(args)
        if named.get("tools"):
            raise UnsupportedError("tools have no test with PPO yet. Leave them out, or train by GRPO.")
        if is_peft_model(model) and {"ref", VALUE} & model.peft_config.keys():
            raise ConfigError(
                "The model has an adapter ref or value, of an earlier trainer. Load it anew; values=RUN/value goes on "
                "with those of a finished run."
            )
        self.kl_control = KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        self._moments = RunningMoments()
        self._update: dict[str, Any] | None = None  # the micro-batch whose loss is computed
        self._columns = set[str]()
        with _reference_of(args):
            super().__init__(model, reward_funcs, args, *others, **named)
        self.beta = 0.0
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UnsupportedError("PPO has no test under FSDP or DeepSpeed yet. Use DDP, or one process.")
        if args.vf_coef > 0:
            self._give_values(None if values is None else Path(values))

    def _args_of(self, args: Any) -> VLMPPOConfig:
        return args  # made already, and lent a beta

    def _give_values(self, folder: Path | None) -> None:
        if self.optimizer is not None:
            raise ConfigError(
                "An optimizer of your own lacks the values, which this trainer makes. Leave it out (there are "
                "learning_rate, value_learning_rate and optim), or set vf_coef=0."
            )
        policy, check = self.accelerator.unwrap_model(self.model), self._gradient_check
        add_values(policy, self.args.disable_dropout, folder)
        # A head of zeros hands no gradient on: on step 1 the adapter of the values says nothing of any tower.
        own, tower_of = {id(parameter) for parameter in value_parameters(policy)}, check.tower_of
        names = {name for name, parameter in policy.named_parameters() if id(parameter) in own}
        check.tower_of = lambda name: VALUE if name in names else tower_of(name)
        if check.pending:
            # A tower hears of its media alone; values read the hidden states in front of the vocabulary's head.
            others = {HEADS, "lm_head"}
            always = {name for name in names if tower_of(name) == "language" and others.isdisjoint(name.split("."))}
            self.add_callback(ValueCheck(always))

    def create_optimizer(self, model: Any = None) -> Any:
        new, rate = self.optimizer is None, self.args.value_learning_rate
        optimizer = super().create_optimizer(model)
        if new and rate is not None:
            own = value_parameters(self.accelerator.unwrap_model(self.model))
            self._group_of |= split_groups(optimizer, dict.fromkeys(own, VALUE), {VALUE: rate})
        return optimizer

    # ---- rollout ------------------------------------------------------------------------------------------------

    def _needs_old(self) -> bool:
        return not self._defers()  # the KL is theirs, whatever the updates need

    def _defers(self) -> bool:
        """Whether a rollout is one micro-batch: its first update computes what the model as it drew it says."""
        return self.model.training and self.args.steps_per_generation == 1

    def _needs_reference(self) -> bool:
        return self.kl_control.coef > 0

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        first = self.accelerator.process_index * len(inputs)
        own = rewards[first : first + len(inputs)]
        # As TRL adds them up: of a row without any, the sum is NaN.
        self._scores = (own * self.reward_weights.to(own.device)).nansum(1).masked_fill(own.isnan().all(1), torch.nan)
        return rewards

    def _add_old_and_ref_logps(self, batch: dict[str, Any]) -> None:
        super()._add_old_and_ref_logps(batch)
        batch["scores"] = self._shaped(batch)
        if self._defers():
            batch["place"] = torch.arange(len(batch["scores"]), device=batch["scores"].device)  # TRL shuffles
            return
        with torch.no_grad(), without_checkpointing(self.model):
            batch["old_values"] = self._old_values(batch)
        self._add_advantages(batch)

    def _old_values(self, batch: dict[str, Any]) -> Tensor:
        train = self.model.training
        size = self.args.per_device_train_batch_size if train else self.args.per_device_eval_batch_size
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        width, rows = batch["completion_ids"].size(1), batch["encodings"]
        return as_one_forward(self.model, lambda own: self._values(ids, mask, width, rows, size, own))

    def _values(self, ids: Tensor, mask: Tensor, *arguments: Any) -> Tensor:
        """The values (B, T) in front of each completion token; zeros without any."""
        if self.args.vf_coef == 0:
            return torch.zeros(len(ids), arguments[0], device=ids.device)
        return values_of(self, ids, mask, *arguments)

    def _add_advantages(self, batch: dict[str, Any]) -> None:
        """Returns and advantages (B, T) of a rollout; the KL that it was drawn with adapts the coefficient."""
        args, control, mask = self.args, self.kl_control, batch["completion_mask"]
        old, reference = batch["old_per_token_logps"], batch.pop("ref_per_token_logps", None)
        scores = batch.pop("scores").masked_fill(~mask.bool().any(1), torch.nan)  # what is masked whole has no part
        known = ~scores.isnan()
        batch["scored"] = known.to(mask.dtype)
        mask = mask * batch["scored"][:, None]
        kl = torch.zeros_like(old) if reference is None else kl_penalty(old, reference, args.kl_estimator)
        rewards = token_rewards(self._scaled(scores), kl, mask, control.coef)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, total=self._total)
        values = batch["old_values"]
        advantages, batch["returns"] = gae(rewards, values, mask, args.gamma, args.lam)
        self._note_rollout(advantages, batch["returns"], values, (kl * mask).sum(1)[known], scores[known], mask)
        if args.whiten_advantages:
            advantages = whiten(advantages, mask, total=self._total)
        batch["advantages"] = advantages
        figures = {"advantages": row_means(advantages, mask), "score": scores, "value": row_means(values, mask)}
        if reference is not None:
            figures["kl"] = (kl * mask).sum(1)
        if "place" in batch:
            order = batch.pop("place").argsort()
            figures = {name: own[order] for name, own in figures.items()}
        self._note_completions(figures)

    def _shaped(self, batch: dict[str, Any]) -> Tensor:
        """Scores (B,), less what a completion without an end loses; NaN where there is none."""
        scores, penalty = self._scores.float(), self.args.missing_eos_penalty
        if penalty:
            ends = torch.tensor(self.eos_token_ids, device=scores.device)
            ended = (torch.isin(batch["completion_ids"], ends) & batch["completion_mask"].bool()).any(1)
            scores = scores - penalty * (~ended).float()
        return scores

    def _scaled(self, scores: Tensor) -> Tensor:
        """Scores as they become rewards; 0 for none, which no token is given."""
        if self.args.normalize_scores:
            if self.model.training:
                self._moments.update(scores, self._total)
            scores = (scores - self._moments.mean) / self._moments.std
        if self.args.score_clip is not None:
            scores = scores.clamp(-self.args.score_clip, self.args.score_clip)
        return scores.nan_to_num(0.0)

    def _note_rollout(
        self, advantages: Tensor, returns: Tensor, values: Tensor, kl: Tensor, scores: Tensor, mask: Tensor
    ) -> None:
        """The metrics of a rollout over all processes; what TRL has logged of groups goes."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in ("frac_reward_zero_std", "advantage/mean", "advantage/std"):
            if len(metrics.get(name, ())) > 1:
                metrics[name].pop()
            else:
                metrics.pop(name, None)
        found = {"advantages": advantages, "returns": returns, "values": values}
        for name, own in found.items():
            metrics[name].append(masked_mean(own, mask, self._total).item())
        metrics["explained_variance"].append(explained_variance(values, returns, mask, self._total).item())
        sums = self._total(torch.stack([kl.sum(), scores.sum(), kl.new_tensor(float(len(kl)))]))
        count = max(1.0, sums[2].item())
        mean_kl = sums[0].item() / count
        if self._needs_reference():
            metrics["kl"].append(mean_kl)
        metrics["score"].append(sums[1].item() / count)
        metrics["kl_coef"].append(self.kl_control.coef)
        if self.model.training:
            self.kl_control.update(mean_kl, int(count))

    def _note_completions(self, figures: dict[str, Tensor]) -> None:
        """What samples.jsonl and TRL's table tell beside each completion: means over its tokens, and its KL.

        A column that a reward logs under the same name stays the reward's.
        """
        logged = self._logs["advantages"]
        every = self.accelerator.gather(figures.pop("advantages")).tolist()
        for _ in range(min(len(every), len(logged))):
            logged.pop()
        logged.extend(every)
        theirs = {name for name, values in self._logs["extra"].items() if values} - self._columns
        for name, own in figures.items():
            if name in theirs:
                continue
            self._columns.add(name)
            column = self.accelerator.gather(own).tolist()
            self._logs["extra"][name].extend(None if math.isnan(value) else value for value in column)

    def _total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(value, reduction="sum")

    # ---- loss ---------------------------------------------------------------------------------------------------

    def _idle(self, inputs: dict[str, Any]) -> list[bool]:
        return [False] * len(inputs["encodings"])  # a value learns from a row that the policy does not

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._update = inputs
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._update = None

    def _score_rows(self, *arguments: Any) -> tuple[Any, ...]:
        found = super()._score_rows(*arguments)
        if self._update is None:
            return found
        self._logps = found[0].detach()
        ids, mask, width, rows, size, _, model = arguments
        return (*found, self._values(ids, mask, width, rows, size, model))

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        logps, batch = found[0], self._update
        if logps is not None and batch is not None and "old_values" not in batch:  # TRL reads on in this very batch
            batch |= {"old_per_token_logps": logps.detach(), "old_values": self._beside[0].detach()}
            self._add_advantages(batch)
            kept = {name: value for name, value in batch.items() if name != "num_images"}
            self._buffered_inputs = [to_units(kept, self._unit)]
        return found

    def _whole_loss(self, loss: Tensor, inputs: dict[str, Any]) -> Tensor:
        (values,), self._beside = self._beside, []  # what keeps a graph keeps its memory
        mask = inputs["completion_mask"] * inputs["scored"][:, None]
        of_values, clipped = value_loss(
            values, inputs["old_values"], inputs["returns"], mask, self.args.cliprange_value
        )
        share = self._share(inputs, mask)
        self._note_update(
            {"loss/policy": loss, "loss/value": of_values * share, "vf_clipfrac": clipped * share}, inputs
        )
        return loss + self.args.vf_coef * of_values * share

    def _share(self, inputs: dict[str, Any], mask: Tensor) -> Tensor | float:
        """What a micro-batch's mean over its tokens weighs in the gradient, as it does in TRL's loss."""
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        if self.loss_type != "dapo":
            return 1 / accumulation
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * accumulation / self.args.steps_per_generation
        return mask.sum() / tokens

    def _note_update(self, parts: dict[str, Tensor], inputs: dict[str, Any]) -> None:
        """The metrics of a micro-batch; ``parts`` are weighed as they are in the gradient."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        mask, old = inputs["completion_mask"], inputs["old_per_token_logps"]
        moved = masked_mean(0.5 * (self._logps - old).square(), mask, self._total)
        metrics["approx_kl"].append(moved.item())
        metrics["clipfrac"].append(metrics["clip_ratio/region_mean"][-1])
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        for name, own in parts.items():
            mean = self._total(own.detach()).item() / self.accelerator.num_processes
            metrics[name].append(mean * accumulation)

    # ---- resume -------------------------------------------------------------------------------------------------

    def _resume_state(self) -> dict[str, Any]:
        return {**super()._resume_state(), "kl_control": self.kl_control.state(), "moments": self._moments.state()}

    def _load_resume_state(self, state: dict[str, Any]) -> None:
        super()._load_resume_state(state)
        self.kl_control.load(state["kl_control"])
        self._moments.load(state["moments"])


def row_means(values: Tensor, mask: Tensor) -> Tensor:
    """The mean (B,) of each row's real tokens; 0 of a row without any."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


@contextmanager
def _reference_of(args: VLMPPOConfig) -> Iterator[None]:
    """Within it TRL and what stands in its place make a reference, as they do where ``beta`` is not 0."""
    args.beta = float(args.kl_coef)
    try:
        yield
    finally:
        args.beta = 0.0
