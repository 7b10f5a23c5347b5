"""Pure tensors: what TRL lacks or cannot do on every device. Nothing here knows a trainer or a model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from .advantages import masked_mean, require_shape
from .errors import ConfigError

# 16 MiB of fp32 logits, of which a handful of copies exist at a time: full matmul speed, little memory.
_CHUNK_ELEMENTS = 1 << 22


def chunked_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("log_probs", "entropy"),
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Log-probabilities of ``targets`` under a language-model head, in plain torch, without the (N, V) logits.

    The head runs in chunks of rows, so at most one chunk of logits exists at a time. A frozen head keeps, from its
    forward pass, each row's derivative (N, H) of the log-probability, and its backward pass is one product with a
    number per row; a trained head, and a gradient through the entropy, compute each chunk's logits again. Same
    arguments and results as TRL's Triton kernel, on any device.

    Args:
        hidden: (N, H) hidden states that predict ``targets``.
        weight: (V, H) head weight; ``bias``: (V,) or None.
        targets: (N,) token ids.
        temperature: the sampling temperature the logits are divided by.
        chunk_size: rows per chunk at most; None chooses by the vocabulary.
        softcap: ``softcap * tanh(logits / softcap)`` is applied before the temperature, as in Gemma.
        logit_scale: a model's own factor on its logits.
        outputs: which of ``log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1`` to compute.

    Returns:
        Five (N,) tensors in that order, in nats where they are logarithms; None for what was not asked for.
        ``log_probs`` and ``entropy`` carry gradients.
    """
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[0])
    rows = rows if chunk_size is None else min(rows, chunk_size)
    head = _Head(temperature, softcap, logit_scale, outputs)
    with_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    chunks = []
    for start in range(0, max(1, hidden.shape[0]), rows):  # one empty chunk keeps the graph when N is 0
        part, own = hidden[start : start + rows], targets[start : start + rows]
        if with_gradient:
            chunks.append(_Statistics.apply(head, part, weight, bias, own))
        else:
            chunks.append(head.statistics(head.logits(part, weight, bias), own))
    columns = zip(*chunks, strict=True)
    return tuple(None if column[0] is None else torch.cat(column) for column in columns)  # type: ignore[return-value]


def pairwise_loss(chosen: Tensor, rejected: Tensor, center: float = 0.0) -> Tensor:
    """How badly the scores of pairs tell the chosen response from the rejected one, in nats.

    ``mean(-log sigmoid(chosen - rejected)) + center * |mean(chosen + rejected)|``: the likelihood of Bradley and Terry
    (1952), and LLaVA-RLHF's term (Sun et al. 2023) that keeps the mean score near 0, which pairs alone leave open.
    TRL's term of the name ``center_rewards_coefficient`` squares each sum instead, which also draws scores together.

    Args:
        chosen: (B,) scores.
        rejected: (B,) scores of the other responses to the same prompts.
        center: the coefficient of the second term.
    """
    return softplus(rejected - chosen).mean() + center * (chosen + rejected).mean().abs()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """How badly values foretell the returns; a value that has moved far already gains nothing from moving further.

    ``0.5 * mean(max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2))`` over real tokens, as in TRL's former PPO and
    in the code of Schulman et al. (2017).

    Args:
        values: (B, T).
        old_values: (B, T), those of the rollout.
        returns: (B, T).
        mask: (B, T), 1 at real tokens; whatever the others hold, NaN included, has no part in it.
        clip: the distance; None clips nothing.

    Returns:
        The loss (), 0 with a gradient of 0 where there is no real token; and the share of clipped tokens ().

    Raises:
        ConfigError: a ``clip`` of 0 or less.
    """
    if clip is not None and not clip > 0:
        raise ConfigError(f"cliprange_value={clip}: needs more than 0. Correct it, or give none for no clipping.")
    require_shape(mask.shape, values=values, old_values=old_values, returns=returns)
    # before the squares: a NaN behind them would come back through their derivative
    values, old, returns = (torch.where(mask.bool(), part.float(), 0.0) for part in (values, old_values, returns))
    losses = free = (values - returns).square()
    if clip is not None:
        clipped = (values.clamp(old - clip, old + clip) - returns).square()
        losses = torch.maximum(free, clipped)
    return 0.5 * masked_mean(losses, mask), masked_mean((losses > free).float(), mask)


@dataclass(frozen=True)
class _Head:
    temperature: float
    softcap: float | None
    logit_scale: float
    outputs: tuple[str, ...]

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(n, V) at the sampling temperature, in fp32 or better; what may be written on."""
        logits = linear(hidden.to(weight.dtype), weight, bias)
        # Half precision is enough for the product, not for the normaliser.
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if self.softcap is None:
            return logits.mul_(self.logit_scale / self.temperature)
        return logits.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of ``logits`` by the head's own product."""
        if self.softcap is None:
            return self.logit_scale / self.temperature
        saturation = logits * (self.temperature / self.softcap)
        return saturation.square_().neg_().add_(1).mul_(self.logit_scale / self.temperature)

    def statistics(self, logits: Tensor, targets: Tensor) -> tuple[Tensor | None, ...]:
        normaliser = logits.logsumexp(-1)
        log_probs = logits.gather(-1, targets[:, None])[:, 0] - normaliser
        entropy = log_sum_sq = mean_logits = is_top1 = None
        if "entropy" in self.outputs:
            entropy = normaliser - torch.linalg.vecdot((logits - normaliser[:, None]).exp_(), logits)
        if "log_sum_sq_probs" in self.outputs:
            log_sum_sq = (2 * (logits - normaliser[:, None])).logsumexp(-1)
        if "mean_logits" in self.outputs:
            mean_logits = logits.mean(-1)
        if "is_top1" in self.outputs:
            is_top1 = logits.argmax(-1) == targets
        return log_probs, entropy, log_sum_sq, mean_logits, is_top1

    def log_prob_slope(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(n, V): the derivative of the log-probabilities by the head's own product. Writes on ``logits``."""
        slope = self.slope(logits)
        probs = logits.sub_(logits.logsumexp(-1, keepdim=True)).exp_()
        return _minus_from_one_hot(probs, targets).mul_(slope)


def _minus_from_one_hot(probs: Tensor, targets: Tensor) -> Tensor:
    """One at the targets, minus ``probs``; writes on them."""
    return probs.neg_().scatter_add_(1, targets[:, None], torch.ones_like(probs[:, :1]))


class _Statistics(torch.autograd.Function):
    """``_Head.statistics``; log-probabilities and entropies carry gradients."""

    @staticmethod
    def forward(ctx: Any, head: _Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.head, ctx.autocast = head, _autocast(hidden.device.type)
        logits = head.logits(hidden, weight, bias)
        found = head.statistics(logits, targets)
        derivative = None
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        if frozen:
            derivative = (head.log_prob_slope(logits, targets).to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(hidden, weight, bias, targets, derivative)
        ctx.mark_non_differentiable(*(output for output in found[2:] if output is not None))
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_log_prob: Tensor | None, of_entropy: Tensor | None, *rest: Any) -> Any:
        hidden, weight, bias, targets, derivative = ctx.saved_tensors
        if derivative is not None and of_entropy is None and of_log_prob is not None:
            return None, derivative * of_log_prob[:, None].to(derivative.dtype), None, None, None
        with ctx.autocast:
            logits = ctx.head.logits(hidden, weight, bias)
        total = torch.zeros_like(logits)
        if of_entropy is not None:
            log_probs = logits - logits.logsumexp(-1, keepdim=True)
            probs = log_probs.exp()
            entropy = -torch.linalg.vecdot(probs, log_probs)[:, None]
            total += log_probs.add_(entropy).mul_(probs).mul_(ctx.head.slope(logits)).mul_(-of_entropy[:, None])
        if of_log_prob is not None:
            total += ctx.head.log_prob_slope(logits, targets).mul_(of_log_prob[:, None])
        total = total.to(weight.dtype)
        of_weight = total.T @ hidden.to(weight.dtype) if weight.requires_grad else None
        of_bias = total.sum(0) if bias is not None and bias.requires_grad else None
        return None, (total @ weight).to(hidden.dtype), of_weight, of_bias, None


def _autocast(device: str) -> torch.autocast:
    """The precision that is in force now, to compute in again later."""
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
