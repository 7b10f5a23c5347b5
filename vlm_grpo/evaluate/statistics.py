"""What numbers of right and wrong answers say: intervals, pass@k, paired changes, recall over classes, yes and no."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

_RESAMPLES = 10_000


def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); (0, 1) without observations.

    >>> [round(x, 4) for x in wilson(8, 10)]
    [0.4902, 0.9433]
    """
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def pass_at_k(n: int, right: int, k: int) -> float:
    """The probability that one of ``k`` answers is right, from ``n`` answers of which ``right`` are: unbiased.

    1 - C(n - right, k) / C(n, k) (Chen et al. 2021, equation 1).

    >>> pass_at_k(4, 1, 2)
    0.5

    Raises:
        ValueError: unless 1 <= k <= n and 0 <= right <= n.
    """
    if not (1 <= k <= n and 0 <= right <= n):
        raise ValueError(f"pass_at_k(n={n}, right={right}, k={k}): needs 1 <= k <= n and 0 <= right <= n.")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def ks(samples: int) -> list[int]:
    """1, 2, 4 ... as far as ``samples``, and ``samples`` itself.

    >>> ks(6)
    [1, 2, 4, 6]
    """
    return sorted({*(2**i for i in range(samples.bit_length())), samples}) if samples else []


def paired_change(
    before: Sequence[bool], after: Sequence[bool], seed: int = 0, resamples: int = _RESAMPLES
) -> dict[str, Any]:
    """How much more is right after than before, on the same rows.

    Args:
        before, after: of each row, whether it was right.
        seed: of the resampling.
        resamples: how often the rows are drawn anew, with replacement.

    Returns:
        ``difference`` of the shares, ``ci95`` of it (paired bootstrap, percentiles), ``p`` of none (McNemar's exact
        test, two-sided), and the number of ``rows``. Without rows: 0, [-1, 1], 1, 0.

    Raises:
        ValueError: two lists of different lengths, which are not pairs.
    """
    import numpy as np

    if len(before) != len(after):
        raise ValueError(f"paired_change: {len(before)} rows before and {len(after)} after are not pairs.")
    n = len(before)
    if n == 0:
        return {"difference": 0.0, "ci95": [-1.0, 1.0], "p": 1.0, "rows": 0}
    gained = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    # A resample of n rows matters by its numbers of gained, lost and unchanged ones, which are multinomial.
    counts = np.random.default_rng(seed).multinomial(n, [gained / n, lost / n, (n - gained - lost) / n], resamples)
    differences = (counts[:, 0] - counts[:, 1]) / n
    low, high = np.percentile(differences, [2.5, 97.5]).tolist()
    return {"difference": (gained - lost) / n, "ci95": [low, high], "p": mcnemar(gained, lost), "rows": n}


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p: rows that changed did so one way or the other by the toss of a coin.

    >>> mcnemar(5, 0)
    0.0625
    """
    from scipy.special import bdtr

    changed = gained + lost
    return min(1.0, 2 * float(bdtr(min(gained, lost), changed, 0.5))) if changed else 1.0


def recalls(truths: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Of each class that is present in ``truths``, the share of its rows that was predicted right."""
    present = Counter(truths)
    right = Counter(truth for truth, given in zip(truths, predictions, strict=True) if truth == given)
    return {label: right[label] / count for label, count in present.items()}


def war_uar(truths: Sequence[str], predictions: Sequence[str]) -> tuple[float, float]:
    """Weighted and unweighted average recall.

    WAR weights the recall of each class by its frequency, which makes it the accuracy; UAR is the mean over the classes
    that are present. A class that is only predicted counts for neither, but as a wrong answer.

    >>> war_uar(["joy", "joy", "joy", "fear"], ["joy", "joy", "joy", "joy"])
    (0.75, 0.5)
    """
    each = recalls(truths, predictions)
    if not each:
        return 0.0, 0.0
    right = sum(truth == given for truth, given in zip(truths, predictions, strict=True))
    return right / len(truths), math.fsum(each.values()) / len(each)


def yes_no(truths: Iterable[str], predictions: Iterable[str | None]) -> dict[str, float]:
    """POPE's figures (Li et al. 2023): "yes" is what is to be found.

    Args:
        truths: ``yes`` or ``no``.
        predictions: ``yes``, ``no``, or None where the answer says nothing: it is wrong, and no yes.

    Returns:
        ``accuracy``, ``precision``, ``recall``, ``f1`` and ``yes_ratio`` (the share answered yes). A figure without
        anything to divide by is 0, as in scikit-learn: precision without a yes, recall without a row to be found.
    """
    pairs = Counter(zip(truths, predictions, strict=True))
    n, found = pairs.total(), pairs["yes", "yes"]
    said = sum(count for (_, given), count in pairs.items() if given == "yes")
    there = sum(count for (truth, _), count in pairs.items() if truth == "yes")
    right = sum(count for (truth, given), count in pairs.items() if truth == given)
    return {
        "accuracy": _share(right, n),
        "precision": _share(found, said),
        "recall": _share(found, there),
        "f1": _share(2 * found, said + there),
        "yes_ratio": _share(said, n),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
