"""Boxes and points as models and datasets write them, and how alike two lists of them are."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .text import normalized

if TYPE_CHECKING:
    import numpy as np

Expects = Literal["boxes", "points"]
Layout = Literal["xyxy", "xywh", "cxcywh", "yxyx"]
LAYOUTS = ("xyxy", "xywh", "cxcywh", "yxyx")

_NUMBER = r"[-+]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?"
# Possessive: a text of nothing but brackets, digits or spaces is read once.
_WRITTEN = re.compile(
    rf"[\[(]\s*+(?P<group>{_NUMBER}(?:(?:\s*+,\s*+|\s++){_NUMBER}){{1,3}}+)\s*+,?\s*+[\])]"
    rf"|<point>\s*+(?P<plain>{_NUMBER}(?:\s*+,\s*+|\s++){_NUMBER})\s*+</point>"
    r"|<points?\s(?P<attributes>[^<>]*+)>"
    r"|<ref>(?P<ref>[^<>]*+)</ref>|<\|object_ref_start\|>(?P<object>[^<>]*+)<\|object_ref_end\|>"
)
_IN_GROUP = re.compile(_NUMBER)
_ATTRIBUTE = re.compile(rf"\b([xy])(\d{{0,4}})\s*+=\s*+[\"']?({_NUMBER})")
_ALT = re.compile(r"\balt\s*+=\s*+[\"']([^\"']*+)")
_OBJECT = re.compile(r"\{[^{}]*+\}")
_LABEL = re.compile(
    r"[\"'](?:label|category|class|name)[\"']\s*+:\s*+(?:\"((?:[^\"\\]|\\.)*+)\"|'((?:[^'\\]|\\.)*+)')", re.DOTALL
)
_KEYED = re.compile(rf"[\"'](x1|y1|x2|y2|x|y)[\"']\s*+:\s*+({_NUMBER})")
_LARGEST = 1e7  # pixels; beyond it areas lose their meaning, then overflow


@dataclass(frozen=True)
class Shape:
    """One box (four numbers) or point (two), in the units and order in which it was written.

    Attributes:
        corners: two written points, ``(x1,y1),(x2,y2)``: the order of the numbers is known.
    """

    numbers: tuple[float, ...]
    label: str | None = None
    corners: bool = False


def parse_shapes(text: str, expects: Expects | None = None) -> list[Shape]:
    """The boxes or the points of a text, in its order; read once, so a hostile text takes linear time.

    Known are four or two numbers in brackets or parentheses, with or without JSON around them (``[x1, y1, x2, y2]``,
    ``{"bbox_2d": [...], "label": "cat"}``, ``{"point_2d": [x, y]}``, cut off or not), ``(x1,y1),(x2,y2)`` in
    ``<box>`` or ``<|box_start|>`` or without, ``{"x": 1, "y": 2}`` and ``{"x1": ...}``, ``<point x="1" y="2">``,
    ``<points x1="1" y1="2" x2=...>`` and ``<point>1 2</point>``. Labels are those of the innermost JSON object, of
    ``<ref>`` or ``<|object_ref_start|>`` before, or ``alt``. What is not a number ("NaN") makes no shape.

    Args:
        expects: None: boxes where the text has any, else points.
    """
    found = list(_shapes(text, pairs=expects != "points"))
    boxes = [shape for shape in found if len(shape.numbers) == 4]
    points = [shape for shape in found if len(shape.numbers) == 2]
    return points if expects == "points" or (expects is None and not boxes) else boxes


def _shapes(text: str, pairs: bool) -> Iterator[Shape]:
    first: tuple[Shape, int] | None = None  # a point that may be a box's corner, and where it ends
    for shape, start, end in _written(text):
        is_corner = pairs and len(shape.numbers) == 2 and text[start] == "("
        if first is not None:
            corner, before = first
            first = None
            if is_corner and text[before:start].strip() in ("", ","):
                yield Shape(corner.numbers + shape.numbers, corner.label, corners=True)
                continue
            yield corner
        if is_corner:
            first = shape, end
        elif len(shape.numbers) != 3:
            yield shape
    if first is not None:
        yield first[0]


def _written(text: str) -> Iterator[tuple[Shape, int, int]]:
    """Every shape as it stands, three numbers too, with its start and end in the text."""
    objects = [(match.start(), match.end(), _label(match[0])) for match in _OBJECT.finditer(text)]
    used, at = set(), 0
    reference: str | None = None
    for match in _WRITTEN.finditer(text):
        start, end = match.span()
        if (named := match["ref"] if match["ref"] is not None else match["object"]) is not None:
            reference = named.strip()
        elif match["attributes"] is not None:
            yield from ((shape, start, end) for shape in _tagged(match["attributes"]))
        else:
            while at < len(objects) and objects[at][1] <= start:
                at += 1
            inside = at < len(objects) and objects[at][0] <= start
            if inside:
                used.add(at)
            numbers = tuple(map(float, _IN_GROUP.findall(match["group"] or match["plain"])))
            yield Shape(numbers, objects[at][2] if inside else reference), start, end
    for number, (start, end, label) in enumerate(objects):
        if number not in used:
            yield from ((shape, start, end) for shape in _keyed(text[start:end], label))


def _tagged(attributes: str) -> Iterator[Shape]:
    alt = _ALT.search(attributes)
    values = {(axis, number): float(value) for axis, number, value in _ATTRIBUTE.findall(attributes)}
    for (axis, number), value in values.items():
        if axis == "x" and ("y", number) in values:
            yield Shape((value, values["y", number]), alt[1] if alt else None)


def _keyed(text: str, label: str | None) -> Iterator[Shape]:
    values = {key: float(value) for key, value in _KEYED.findall(text)}
    for keys in (("x1", "y1", "x2", "y2"), ("x", "y")):
        if all(key in values for key in keys):
            yield Shape(tuple(values[key] for key in keys), label, corners=len(keys) == 4)
            return


def _label(text: str) -> str | None:
    match = _LABEL.search(text)
    if match is None or match[1] is None:
        return None if match is None else match[2]
    try:
        return json.loads(f'"{match[1]}"', strict=False)
    except ValueError:  # an escape that JSON does not have
        return match[1]


def to_corners(shapes: Sequence[Shape], layout: Layout) -> "np.ndarray":
    """(N, 4) x1, y1, x2, y2 of boxes, or (N, 2) x, y of points; NaN where a box or point cannot be.

    That is a box without area or with its corners exchanged, and any number that is infinite or above 1e7.
    """
    import numpy as np

    if not shapes:
        return np.zeros((0, 4))
    values = np.array([shape.numbers for shape in shapes], dtype=float)
    if values.shape[1] == 4:
        of_layout = np.array([not shape.corners for shape in shapes])
        values[of_layout] = _corners(values[of_layout], layout)
    with np.errstate(invalid="ignore"):
        fine = (np.abs(values) <= _LARGEST).all(1)
        if values.shape[1] == 4:
            fine &= (values[:, 2] > values[:, 0]) & (values[:, 3] > values[:, 1])
    values[~fine] = np.nan
    return values


def _corners(values: "np.ndarray", layout: Layout) -> "np.ndarray":
    import numpy as np

    a, b, c, d = values.T
    with np.errstate(over="ignore", invalid="ignore"):
        columns = {
            "xyxy": (a, b, c, d),
            "xywh": (a, b, a + c, b + d),
            "cxcywh": (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
            "yxyx": (b, a, d, c),
        }[layout]
    return np.stack(columns, axis=1)


def iou(boxes: "np.ndarray", others: "np.ndarray") -> "np.ndarray":
    """(N, M) intersection over union of (N, 4) and (M, 4) corners; 0 where a box is NaN."""
    import numpy as np

    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = [(shapes[:, 2:] - shapes[:, :2]).prod(-1) for shapes in (boxes, others)]
    return np.nan_to_num(shared / (areas[0][:, None] + areas[1][None] - shared), nan=0.0)


def inside(points: "np.ndarray", boxes: "np.ndarray") -> "np.ndarray":
    """(N, M) 1 where a point of (N, 2) lies in a box of (M, 4), its edge included; else 0, and where one is NaN."""
    low, high = boxes[None, :, :2], boxes[None, :, 2:]
    return ((points[:, None] >= low) & (points[:, None] <= high)).all(-1).astype(float)


def nearness(points: "np.ndarray", others: "np.ndarray", radius: float) -> "np.ndarray":
    """(N, M) 1 - distance / ``radius`` of (N, 2) and (M, 2), at least 0; 0 where one is NaN."""
    import numpy as np

    distance = np.linalg.norm(points[:, None] - others[None], axis=-1)
    return np.nan_to_num(np.clip(1 - distance / radius, 0, None), nan=0.0)


def same_label(shapes: Sequence[Shape], others: Sequence[Shape], required: bool) -> "np.ndarray":
    """(N, M) whether labels agree, but for case; one without a label agrees with all, or with none if ``required``.

    Of ``others``, those without a label agree with all.
    """
    import numpy as np

    theirs = [None if shape.label is None else normalized(shape.label) for shape in others]
    rows = []
    for shape in shapes:
        mine = None if shape.label is None else normalized(shape.label)
        rows.append([other is None or (not required if mine is None else mine == other) for other in theirs])
    return np.array(rows, dtype=bool).reshape(len(shapes), len(others))
