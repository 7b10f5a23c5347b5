"""How well the boxes or points of a completion match those of the row."""

import functools
import json
import logging
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import RewardError
from .answers import said
from .boxes import (
    LAYOUTS,
    Expects,
    Layout,
    Shape,
    inside,
    iou,
    nearness,
    parse_shapes,
    same_label,
    to_corners,
)
from .options import check_name, check_number
from .picture_size import picture_size, resized_size
from .text import column_values, completion_text

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Grounding:
    """Mean similarity of the best one-to-one matching of given and right boxes or points, in [0, 1].

    The sum over the pairs (Hungarian matching) is divided by the larger number of the two, so a missing and a
    superfluous one cost alike: who sprays boxes loses. Similar are boxes by their IoU; points by lying in the right
    box (1 or 0), or, where the right one is a point, by 1 - distance / ``radius``, at least 0. A row whose truth is
    ``[]`` has nothing to find: 1 without a box, 0 with any.

    Read is the body of ``<answer>``, or what follows ``</think>``, or all of the completion; ``boxes.parse_shapes``
    lists the forms. A box without area, with exchanged corners or infinite numbers counts as given, and matches none.

    Args:
        column: the dataset column with the truth, as a list or as text, in any form that a completion may have; None:
            the row cannot be scored.
        scale: what the completion's numbers count: ``pixels`` of the picture; ``resized``: pixels of the picture as
            Qwen2-VL's and Qwen2.5-VL's processors hand it to the model (they answer in those); or the number that
            stands for the whole width and height (1000 for Qwen3-VL and InternVL, 100 for Molmo, 1).
        truth_scale: the truth's, if another. Then ``pixels`` and ``resized`` need the picture's size: the row's
            ``width`` and ``height``, or its (first) image.
        format: order of four numbers: ``xyxy``, ``xywh``, ``cxcywh`` or ``yxyx``. Written corners ``(x1,y1),(x2,y2)``
            are what they are.
        truth_format: the truth's, if another: COCO's boxes are ``xywh``.
        expects: what the completion must give, ``boxes`` or ``points``: by default what the truth is. Points are
            easier to give than boxes, so they never count where boxes are expected, nor boxes as points.
        threshold: None: similarities count as they are; a number: 1 from it on, else 0.
        radius: for truths that are points, in units of the truth's scale.
        labels: ``both``: a pair whose labels differ has similarity 0 if both have one; ``required``: also where only
            the truth has one; ``ignore``.
        processor: for ``resized``; a run gives its own.
        min_pixels, max_pixels: for ``resized``, other than the run's.
        limit: of so many given boxes the first are matched; all count as given.

    Raises:
        RewardError: options that cannot be, no such column, a picture's size that is needed and not to be had, or
            truths none of which can be read. Later ones that cannot be read give None, and a warning.
    """

    column: str = "answer"
    scale: str | float = "pixels"
    truth_scale: str | float | None = None
    format: Layout = "xyxy"
    truth_format: Layout | None = None
    expects: Expects | None = None
    threshold: float | None = None
    radius: float | None = None
    labels: Literal["both", "required", "ignore"] = "both"
    processor: Any = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    limit: int = 200
    _has_read: bool = field(init=False, default=False, repr=False)
    _told: set[str] = field(init=False, default_factory=set, repr=False)

    __name__ = "grounding"

    def __post_init__(self) -> None:
        self.scale = _scale("scale", self.scale)
        self.truth_scale = self.scale if self.truth_scale is None else _scale("truth_scale", self.truth_scale)
        self.truth_format = self.truth_format or self.format
        check_name("format", self.format, LAYOUTS)
        check_name("truth_format", self.truth_format, LAYOUTS)
        check_name("expects", self.expects or "boxes", ("boxes", "points"))
        check_name("labels", self.labels, ("both", "required", "ignore"))
        for name in ("threshold", "radius"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, above=True)
        if self.threshold is not None and self.threshold > 1:
            raise RewardError(f"threshold is {self.threshold}. Give a similarity of at most 1, such as 0.5.")
        check_number("limit", self.limit, 1)

    def use_run(self, *, processor: Any = None, media: Any = None, **_: Any) -> None:
        """Take the run's processor and pixel bounds, unless others were given."""
        self.processor = self.processor or processor
        if self.min_pixels is None and self.max_pixels is None and media is not None:
            self.min_pixels, self.max_pixels = media.min_pixels, media.max_pixels

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        truths = column_values(columns, self.column)
        return [
            None if truth is None else self._value(completion_text(completion), truth, columns, row)
            for row, (completion, truth) in enumerate(zip(completions, truths, strict=True))
        ]

    def _value(self, completion: str, truth: Any, columns: dict[str, Any], row: int) -> float | None:
        right = self._truth(truth)
        if right is None:
            return None
        shapes, expects = right
        given = parse_shapes(said(completion), expects)
        most = max(len(given), len(shapes))
        if not given or not shapes:
            return float(most == 0)
        from scipy.optimize import linear_sum_assignment

        matched = given[: max(self.limit, len(shapes))]
        similar = self._similar(matched, shapes, self._stretch(columns, row))
        if self.threshold is not None:
            similar = (similar >= self.threshold).astype(float)
        return min(1.0, float(similar[linear_sum_assignment(similar, maximize=True)].sum()) / most)

    def _similar(self, given: list[Shape], right: list[Shape], stretch: tuple[float, float]) -> Any:
        assert self.truth_format is not None, "set when the reward is made"
        theirs = to_corners(right, self.truth_format)
        mine = to_corners(given, self.format)
        mine = mine * (stretch * (mine.shape[1] // 2))
        if mine.shape[1] == 4:
            similar = iou(mine, theirs)
        elif theirs.shape[1] == 4:
            similar = inside(mine, theirs)
        elif self.radius is None:
            raise RewardError("the truths are points, and there is no radius. Give one: the distance worth nothing.")
        else:
            similar = nearness(mine, theirs, self.radius)
        if self.labels == "ignore":
            return similar
        return similar * same_label(given, right, self.labels == "required")

    def _stretch(self, columns: dict[str, Any], row: int) -> tuple[float, float]:
        """What the completion's x and y are to be multiplied with, to be in the truth's units."""
        if self.scale == self.truth_scale:
            return 1.0, 1.0
        both_numbers = isinstance(self.scale, float) and isinstance(self.truth_scale, float)
        size = None if both_numbers else picture_size(columns, row)
        mine, theirs = (self._full(scale, size, columns, row) for scale in (self.scale, self.truth_scale))
        return theirs[0] / mine[0], theirs[1] / mine[1]

    def _full(self, scale: Any, size: tuple[int, int] | None, columns: dict[str, Any], row: int) -> tuple[float, float]:
        if isinstance(scale, float):
            return scale, scale
        assert size is not None, "asked for where a scale is one of pixels"
        if scale == "pixels":
            return size
        bounds = [
            values[row] if isinstance(values := columns.get(name), list) and values[row] is not None else own
            for name, own in (("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels))
        ]
        return resized_size(size, self.processor, bounds[0], bounds[1])

    def _truth(self, value: Any) -> tuple[list[Shape], Expects] | None:
        text = value if isinstance(value, str) else json.dumps(value, default=_as_list, ensure_ascii=False)
        found = _parsed_truth(text, self.expects)
        if found is not None and self.truth_format is not None:
            import numpy as np

            if not np.isnan(to_corners(found[0], self.truth_format)).any():
                self._has_read = True
                return found
        message = (
            f'the column "{self.column}" holds {text[:120]!r}, which is no '
            f"{'point or box' if self.expects != 'boxes' else 'box'} that can be (truth_format {self.truth_format!r})."
        )
        if not self._has_read:
            raise RewardError(f"{message} Name the right column or format.")
        if text not in self._told:
            self._told.add(text)
            logger.warning('The reward "grounding": %s The row is not scored. Correct it.', message)
        return None


@functools.lru_cache(maxsize=1024)
def _parsed_truth(text: str, expects: Expects | None) -> tuple[list[Shape], Expects] | None:
    """The shapes of a truth, and what a completion must give for it; None where it has none."""
    if "".join(text.split()) == "[]":
        return [], expects or "boxes"
    shapes = parse_shapes(text, "boxes" if expects == "boxes" else None)
    if not shapes:
        return None
    return shapes, expects or ("boxes" if len(shapes[0].numbers) == 4 else "points")


def _scale(name: str, value: str | float) -> str | float:
    if value in ("pixels", "resized"):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise RewardError(f'{name} is {value!r}. Give "pixels", "resized", or the number of the whole width: 1000, 1.')
    return number


def _as_list(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise RewardError(f"the truth holds {type(value).__name__} {value!r}. Give lists of numbers, or text.")
