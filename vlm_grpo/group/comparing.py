"""Whether numbers with sharing are those without it, up to rounding."""

from typing import Any

import torch
from torch import Tensor

from .reasons import Unshareable

# The largest difference of a log-probability, value or logit that rounding explains.
_TOLERANCE, _TOLERANCE_16_BIT = 1e-4, 5e-2
# In 16 bits, by how much a single token may differ more than the average of its row.
_ONE_TOKEN = 20


def compare(what: str, difference: Tensor, counts: Tensor, low: bool, values: Tensor) -> None:
    """Raise where a difference (rows, tokens) is more than rounding: of a token, or in 16 bits of a row's average.

    The spacing of 16-bit logits grows with them, so there one token proves little, and the largest of the
    ``values`` that were rounded counts.
    """
    difference = difference.masked_fill(counts == 0, 0.0)  # what does not count may be NaN
    worst, tolerance = difference.max(), _TOLERANCE
    if low:
        average = (difference.sum(1) / counts.sum(1).clamp(min=1)).max()
        worst = torch.maximum(average, worst / _ONE_TOKEN)
        largest = values.masked_fill(~values.isfinite(), 0.0).abs().max()
        tolerance = max(_TOLERANCE_16_BIT, torch.finfo(torch.bfloat16).eps * float(largest))
    if not float(worst) <= tolerance:
        raise Unshareable(
            f"the {what} of the first groups differ by {float(worst):.1e} from those without sharing "
            f"(at most {tolerance:.0e} is rounding)"
        )


def gap(shared: Any, plain: Any, low: bool) -> tuple[Tensor, Tensor]:
    """Differences of the logits (B, steps), and where they count: up to the first token in which two rows differ.

    What follows that token has other inputs. A difference is the largest of a token's logits; in 16 bits that of the
    log-probabilities, as it is expected of a token that is sampled.
    """
    steps = len(plain.logits)
    same = (shared.sequences[:, -steps:] == plain.sequences[:, -steps:]).int()
    before = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], 1).cumprod(1)  # (B, steps)

    def difference(found: Tensor, expected: Tensor) -> Tensor:
        if not low:
            return (found - expected).abs().masked_fill(found == expected, 0.0).amax(-1)  # also where both are infinite
        found, expected = found.float().log_softmax(-1), expected.float().log_softmax(-1)
        known = expected.isfinite()  # suppressed tokens are not
        return (expected.exp() * (found - expected).abs()).masked_fill(~known, 0.0).sum(-1)

    return torch.stack([difference(a, b) for a, b in zip(shared.logits, plain.logits, strict=True)], 1), before
