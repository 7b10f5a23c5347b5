"""Rows for the comparison of batches with single rows: how many media, of which sizes, and what stands beside them."""

from typing import Any

from .media import audio, image, video

TEXTS = ("count one", "count two", "count three", "count four")  # a row can be told from its tokens
COUNTS = {"one": (1, 1, 1, 1), "several": (2, 2, 2, 2), "counts": (1, 2, 3, 1), "none": (1, 0, 2, 0)}
COUNTS |= {"sizes": (1, 1, 1, 1), "sizes in a row": (2, 1, 3, 1)}
_SIZES = ((56, 56), (84, 56), (56, 112), (112, 84))
_FRAMES, _RATES, _SECONDS = (4, 6, 2, 8), (2.0, 4.0, 1.0, 3.0), (0.5, 0.8, 0.31, 1.2)

# What a family's own processor refuses or gets wrong, so that no row of it can be right.
_IMPOSSIBLE = {
    ("llava_onevision", "video sizes in a row"),  # clips of one row must have as many frames
    ("internvl", "video sizes in a row"),
    ("paligemma", "image none"),  # a row without a picture is refused
    ("smolvlm", "mixed row"),  # a row's clips take the place of its pictures
}


def cases(family: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The cases that a family of these kinds of media can have."""
    found = [f"{kind} {case}" for kind in kinds for case in COUNTS]
    found += ["mixed batch", "mixed row"] if len(kinds) > 1 else []
    return tuple(case for case in found if (family, case) not in _IMPOSSIBLE)


def rows(case: str, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """Three rows or more of ``case``, as ``CASES`` names it; ``fps`` is the rate of the row's videos.

    ``sizes`` are pictures and clips of other widths and heights, clips of other lengths and rates, and sounds of other
    lengths. ``mixed batch`` has a row of each kind and one without any, ``mixed row`` all kinds in every row.
    """
    if case == "mixed batch":
        return [_row(i, [kind] if kind else [], kinds) for i, kind in enumerate([*kinds, *kinds[:1], None])]
    if case == "mixed row":
        orders = [list(kinds), list(reversed(kinds)), [*kinds, *kinds], list(kinds)]
        return [_row(i, order, kinds) for i, order in enumerate(orders)]
    kind, _, which = case.partition(" ")
    return [_row(i, [kind] * count, (kind,), "sizes" in which) for i, count in enumerate(COUNTS[which])]


def _row(number: int, kinds: list[str], columns: tuple[str, ...], sizes: bool = False) -> dict[str, Any]:
    media: dict[str, list[Any]] = {kind: [] for kind in columns}  # a table's rows have the same columns
    for place, kind in enumerate(kinds):
        seed, which = 10 * number + place, (number + place) % 4 if sizes else 0
        if kind == "image":
            media[kind].append(image(seed, _SIZES[which]))
        elif kind == "video":
            media[kind].append(video(seed, _FRAMES[which], _SIZES[which]))
        else:
            media[kind].append(audio(seed, _SECONDS[which]))
    slots = [{"type": kind, "text": None} for kind in kinds]
    text = {"type": "text", "text": TEXTS[number % len(TEXTS)] + " and one" * (number // len(TEXTS))}
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": [*slots, text]}]}
    row |= {f"{kind}s": items for kind, items in media.items()}
    return row | ({"fps": _RATES[number % 4] if sizes else 2.0} if "video" in media else {})
