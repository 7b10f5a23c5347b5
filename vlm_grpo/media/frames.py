"""Which frames of a clip are taken: whole numbers only, nothing is opened here."""

import random

from ..config import MediaOptions


def frame_indices(
    total: int,
    duration: float,
    options: MediaOptions,
    frame_cnts: list[int] | None = None,
    draw: random.Random | None = None,
) -> list[int]:
    """Strictly increasing frame numbers within ``0..total - 1``.

    The count is ``round(duration / interval)``, at least ``min_frames`` and at most ``max_frames``, where the interval
    is ``base_interval`` seconds, or ``1 / fps``, or 1. The frames are spread evenly from the first to the last one; a
    single frame is the middle one. A shorter clip gives every frame it has.

    With ``dynamic_sample`` and ``draw`` the count is drawn uniformly between the two limits instead, and spread over
    the clip's segments in proportion to ``frame_cnts``, evenly inside each. Without ``draw``, as in an evaluation, the
    fixed rule holds.

    Args:
        total: frames of the clip, at least 1.
        duration: its length in seconds.
        frame_cnts: relative lengths of consecutive segments of the clip.
        draw: where the count comes from.
    """
    assert total > 0, "the caller refuses a clip without frames"
    least, most = min(options.min_frames, total), min(options.max_frames, total)
    if options.dynamic_sample and draw is not None:
        count = draw.randint(least, most)
        return _over_segments(total, count, frame_cnts) if frame_cnts else spread(total, count)
    interval = options.base_interval or (1 / options.fps if options.fps else 1.0)
    return spread(total, min(max(round(duration / interval), least), most))


def spread(total: int, count: int, start: int = 0) -> list[int]:
    """``count`` of the ``total`` numbers from ``start`` on, evenly from first to last; one alone is the middle one."""
    if count == 1:
        return [start + (total - 1) // 2]
    gaps = count - 1
    return [start + (2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(count)]  # rounded, halves up


def _over_segments(total: int, count: int, lengths: list[int]) -> list[int]:
    whole, starts = sum(lengths), [0]
    for number in range(1, len(lengths) + 1):
        starts.append((2 * total * sum(lengths[:number]) + whole) // (2 * whole))
    sizes = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    indices: list[int] = []
    for start, size, share in zip(starts, sizes, _shares(count, lengths, sizes), strict=False):
        indices += spread(size, share, start) if share else []
    return indices


def _shares(count: int, lengths: list[int], sizes: list[int]) -> list[int]:
    """``count`` in proportion to ``lengths`` by largest remainder, never more than a segment's ``sizes``."""
    whole = sum(lengths)
    shares = [min(count * length // whole, size) for length, size in zip(lengths, sizes, strict=True)]
    order = sorted(range(len(lengths)), key=lambda k: (-(count * lengths[k] % whole), k))
    left = count - sum(shares)
    while left:
        for k in order:
            if left and shares[k] < sizes[k]:
                shares[k] += 1
                left -= 1
    return shares
