"""Pure tensors of PPO: KL penalties, per-token rewards, advantages, whitening. Nothing here knows a trainer or a model.

A (B, T) tensor holds completions, right-padded; ``mask`` (B, T) is 1 or True at real tokens. Masked tokens may also
stand in the middle (a tool's output): they are skipped as if they were not there, and whatever they hold, NaN included,
reaches no other token. Everything is computed in float32.

``total`` adds a small tensor up over all processes and returns the sum; left out, there is one process. All processes
call it equally often, whatever they hold.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import ConfigError, nearest

Estimator = Literal["k1", "k1_clamped", "k3"]
Total = Callable[[Tensor], Tensor]

_EPSILON = 1e-8  # TRL's: beside a variance, so that equal values divide by something
# A spread below this share of the mean is nothing but rounding, that of sums over thousands of tokens included.
_ROUNDING = 16 * torch.finfo(torch.float32).eps
_LARGEST_CHANGE = 0.2  # of the KL coefficient: Ziegler et al. 2019, section 2.2


def identity(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


def require_shape(shape: torch.Size, **tensors: Tensor) -> None:
    """Tensors that would broadcast give a wrong number instead of an error."""
    for name, tensor in tensors.items():
        assert tensor.shape == shape, f"{name} is {tuple(tensor.shape)} where {tuple(shape)} belongs"


def kl_penalty(logps: Tensor, ref_logps: Tensor, estimator: Estimator) -> Tensor:
    """How far each sampled token moved from the reference: estimates of KL(policy || reference), in nats.

    ``k1`` and ``k3`` are those of Schulman (2020, "Approximating KL divergence"); ``k1_clamped``, ``max(k1, 0)``, is
    LLaVA-RLHF's (Sun et al. 2023).

    Args:
        logps: (B, T) log-probabilities of the sampled tokens under the policy that sampled them.
        ref_logps: (B, T) under the reference.
        estimator: which.

    Returns:
        (B, T).

    Raises:
        ConfigError: an unknown estimator.
    """
    require_shape(logps.shape, ref_logps=ref_logps)
    gap = logps.float() - ref_logps.float()
    if estimator == "k1":
        return gap
    if estimator == "k1_clamped":
        return gap.clamp(min=0)
    if estimator == "k3":
        return torch.expm1(-gap) + gap  # without the loss of digits of exp(x) - 1 near 0
    known = list(get_args(Estimator))
    hint = nearest(str(estimator), known)
    raise ConfigError(f"kl_estimator={estimator}: there is no such estimator.{hint} There are: {', '.join(known)}.")


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coef: float) -> Tensor:
    """What each token earns: ``-coef * kl``, and on a completion's last real token its score as well.

    Args:
        scores: (B,); that of a row without a real token is not used. A NaN is not left out: mask such a row.
        kl: (B, T) in nats.
        mask: (B, T).
        coef: the score that a nat costs.

    Returns:
        (B, T), 0 at masked tokens.
    """
    require_shape(mask.shape, kl=kl)
    require_shape(mask.shape[:1], scores=scores)
    real = mask.bool()
    from_here_on = real.flip(1).cumsum(1).flip(1)
    rewards = torch.where(real, -coef * kl.float(), 0.0)
    return torch.where(real & (from_here_on == 1), rewards + scores.float()[:, None], rewards)


@torch.no_grad()  # targets: a gradient through them would train the values towards themselves
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantages and the returns that values are trained towards (Schulman et al. 2016, equation 16).

    ``A_t = r_t + gamma * V_{t+1} - V_t + gamma * lam * A_{t+1}``; behind the last real token both are 0.

    Args:
        rewards: (B, T).
        values: (B, T), what each token's state was expected to return before the token was sampled.
        mask: (B, T).
        gamma: discount of a token, 0 to 1.
        lam: 0 trusts the values of the next token, 1 only the rewards.

    Returns:
        Advantages and ``advantages + values``, (B, T), 0 at masked tokens, without a gradient.

    Raises:
        ConfigError: ``gamma`` or ``lam`` outside 0 to 1.
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ConfigError(f"{name}={number}: needs 0 or more, at most 1. Correct the value.")
    require_shape(mask.shape, rewards=rewards, values=values)
    real, rewards, values = mask.bool(), rewards.float(), values.float()
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, :1].sum(1))
    for t in range(mask.size(1) - 1, -1, -1):
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        next_advantage = torch.where(real[:, t], advantage, next_advantage)
        next_value = torch.where(real[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(real[:, t], advantage, 0.0)
    return advantages, torch.where(real, advantages + values, 0.0)


def masked_mean(values: Tensor, mask: Tensor, total: Total = identity) -> Tensor:
    """() mean over the real tokens of all processes; 0 where there is none. Carries a gradient where ``total`` does."""
    require_shape(mask.shape, values=values)
    real = mask.bool()
    summed, count = total(torch.stack([torch.where(real, values.float(), 0.0).sum(), real.sum().float()]))
    return summed / count.clamp(min=1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, total: Total = identity) -> Tensor:
    """To variance 1 over the real tokens of all processes (unbiased, plus 1e-8, as in TRL), and to mean 0.

    Values that are equal but for rounding, and a single one, are centred only.

    Args:
        values: (B, T).
        mask: (B, T).
        shift_mean: False keeps the mean that the values had.
        total: as this module says.

    Returns:
        (B, T), 0 at masked tokens.
    """
    centred, mean, variance, _ = _moments(values, mask, total)
    whitened = centred * torch.where(variance == 0, 1.0, torch.rsqrt(variance + _EPSILON))
    return whitened if shift_mean else torch.where(mask.bool(), whitened + mean, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, total: Total = identity) -> Tensor:
    """() how much of the returns' variance the values foretell: ``1 - var(returns - values) / var(returns)``.

    1 is all of it, 0 is no better than a constant; 0 also where all returns are equal but for rounding.
    ``values``, ``returns``, ``mask`` are (B, T), ``total`` as this module says.
    """
    require_shape(mask.shape, values=values, returns=returns)
    _, _, unexplained, _ = _moments(returns.float() - values.float(), mask, total)
    _, _, variance, _ = _moments(returns, mask, total)
    return torch.where(variance == 0, 0.0, 1 - unexplained / variance)


def _moments(values: Tensor, mask: Tensor, total: Total) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values less their mean (B, T; 0 at masked ones); their mean, unbiased variance and number, () each.

    Two passes, of which the second also takes out the rounding of the first one's mean: whitening would blow it up
    where values are nearly equal.
    """
    require_shape(mask.shape, values=values)
    real = mask.bool()
    values = torch.where(real, values.float(), 0.0)
    summed, count = total(torch.stack([values.sum(), real.sum().float()]))
    divisor = count.clamp(min=1)
    first = summed / divisor
    centred = torch.where(real, values - first, 0.0)
    rest, squares = total(torch.stack([centred.sum(), centred.square().sum()]))
    shift = rest / divisor
    mean = first + shift
    variance = squares / (divisor - 1).clamp(min=1)
    equal = variance <= (_ROUNDING * mean).square()
    return torch.where(real, centred - shift, 0.0), mean, torch.where(equal, 0.0, variance), count


class KLController:
    """The coefficient of the KL penalty, fixed or led to a target (Ziegler et al. 2019, section 2.2).

    We differ in one thing: more samples than the horizon count as the horizon, since beyond five times as many one
    update could make the coefficient negative.

    Args:
        coef: what it starts from.
        target: of the KL of a completion, in nats; None keeps ``coef``.
        horizon: completions in which it changes by a fifth at most.

    Raises:
        ConfigError: numbers that cannot work.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: float = 10000) -> None:
        if not 0 <= coef < math.inf:
            raise ConfigError(f"kl_coef={coef}: needs 0 or more. Correct the value.")
        if target is not None and not 0 < target < math.inf:
            raise ConfigError(
                f"kl_target={target}: needs more than 0. Correct it, or leave it out for a fixed kl_coef."
            )
        if target is not None and coef == 0:
            raise ConfigError(f"kl_coef=0 beside kl_target={target}: 0 cannot adapt. Start from more, such as 0.2.")
        if not 0 < horizon < math.inf:
            raise ConfigError(f"kl_horizon={horizon}: needs more than 0. Correct the value.")
        self.coef, self.target, self.horizon = float(coef), target, horizon

    def update(self, kl: float, samples: int) -> None:
        """Move the coefficient a little, where there is a target.

        Args:
            kl: mean over completions of the KL of all their tokens, in nats; one that is not finite changes nothing.
            samples: completions it is taken over.
        """
        if self.target is None or not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1, -_LARGEST_CHANGE), _LARGEST_CHANGE)
        self.coef *= 1 + error * min(samples / self.horizon, 1)

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"coef": self.coef}

    def load(self, state: dict[str, float]) -> None:
        """Go on from ``state()``; target and horizon stay this controller's own."""
        if self.target is not None:  # a fixed one is the config's
            self.coef = float(state["coef"])


class RunningMoments:
    """Mean and standard deviation of all scores of a run, batch by batch (Chan, Golub and LeVeque 1983).

    Attributes:
        count: scores so far.
        mean: of them; 0 before the first.
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def update(self, scores: Tensor, total: Total = identity) -> None:
        """Add a batch.

        Args:
            scores: of any shape; NaN (a reward that failed) and infinite ones are left out.
            total: as this module says.
        """
        _, mean, variance, count = (moment.cpu() for moment in _moments(scores, scores.isfinite(), total))
        added = int(count)
        if not added:
            return
        before, gap = self.count, float(mean) - self.mean
        self.count += added
        self.mean += gap * added / self.count
        self._squares += float(variance) * (added - 1) + gap * gap * before * added / self.count

    @property
    def std(self) -> float:
        """Unbiased; 1 before the scores differ, so that it can always be divided by."""
        std = math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0
        return std if std > _ROUNDING * abs(self.mean) else 1.0

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load(self, state: dict[str, float]) -> None:
        """Go on from ``state()``."""
        self.count, self.mean, self._squares = int(state["count"]), float(state["mean"]), float(state["squares"])
