"""The grounding reward: forms, scales and matchings by hand, and completions made to cheat."""

import io
import json
import logging
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_grpo.config import MediaOptions
from vlm_grpo.errors import RewardError
from vlm_grpo.media import Medium
from vlm_grpo.rewards.boxes import parse_shapes
from vlm_grpo.rewards.grounding import Grounding

BOX = [0, 0, 10, 10]
SHIFTED = "[5, 0, 15, 10]"  # 50 shared, 150 together


def score(completion, truth, columns=None, **options) -> float | None:
    return Grounding(**options)([completion], answer=[truth], **{k: [v] for k, v in (columns or {}).items()})[0]


@pytest.mark.parametrize(
    "completion",
    [
        "[1, 2, 30, 40]",
        "[[1, 2, 30, 40]]",
        "(1.0, 2., 30, 4e1)",
        "[1 2 30 40]",
        "<answer>[1,2,30,40]</answer>",
        "<think>perhaps [5, 6, 7, 8]</think>[1, 2, 30, 40]",
        "<think>[5,6,7,8]</think><answer>\n[1,2,30,40]\n</answer> or [5,6,7,8]",
        '```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}]\n```',
        '{"bbox": [1, 2, 30, 40]}',
        "{'box': (1, 2, 30, 40)}",
        '[{"label": "cat", "bbox_2d": [1, 2, 30, 40]}, {"bbox_2d": [9, 9, 9',  # cut off
        '{"x1": 1, "y1": 2, "x2": 30, "y2": 40}',
        "(1,2),(30,40)",
        "<|box_start|>(1,2),(30,40)<|box_end|>",
        "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(30,40)<|box_end|>",
        "<ref>cat</ref><box>[[1, 2, 30, 40]]</box>",
        "<box>(1,2),(30,40)</box>",
        [{"role": "assistant", "content": "The cat (left) is at [1, 2, 30, 40]."}],
    ],
)
def test_every_form_of_a_box_is_read(completion):
    assert score(completion, [1, 2, 30, 40]) == 1.0
    assert score(completion, [{"bbox": [1, 2, 30, 40], "label": "Cat"}]) == 1.0


@pytest.mark.parametrize(
    ("completion", "points"),
    [
        ('[{"point_2d": [1, 2], "label": "cat"}]', [(1, 2)]),
        ("(1, 2)", [(1, 2)]),
        ("(1,2),(3,4)", [(1, 2), (3, 4)]),
        ("<|box_start|>(1,2)<|box_end|>", [(1, 2)]),
        ('<point x="1.5" y="2" alt="cat">cat</point>', [(1.5, 2)]),
        ('<points x1="1" y1="2" x2="3" y2="4" alt="cats">cats</points>', [(1, 2), (3, 4)]),
        ("<point>1 2</point>", [(1, 2)]),
        ('{"x": 1, "y": 2}', [(1, 2)]),
        ("click(start_box='(1,2)')", [(1, 2)]),
        ("[1, 2, 3, 4]", []),
        ("(1, 2, 3)", []),
        ("1, 2", []),
    ],
)
def test_every_form_of_a_point_is_read(completion, points):
    assert [shape.numbers for shape in parse_shapes(completion, "points")] == points


def test_labels_are_those_of_the_box():
    text = '[{"bbox_2d": [1,2,3,4], "label": "a \\"cat\\""}, {"label": "dog", "bbox_2d": [5,6,7,8]}] [1,1,2,2]'
    assert [shape.label for shape in parse_shapes(text)] == ['a "cat"', "dog", None]
    assert [s.label for s in parse_shapes("<ref>a</ref><box>[[1,2,3,4],[5,6,7,8]]</box><ref>b</ref>[1,1,2,2]")] == [
        "a",
        "a",
        "b",
    ]
    assert parse_shapes('<point x="1" y="2" alt="cat">cat</point>')[0].label == "cat"


@pytest.mark.parametrize(
    ("completion", "truth", "expected"),
    [
        (SHIFTED, BOX, 1 / 3),
        ("[0,0,10,10] [0,0,10,10]", [BOX, [20, 0, 30, 10]], 1 / 2),  # the same twice
        ("[20,0,30,10] [0,0,10,10]", [BOX, [20, 0, 30, 10]], 1.0),  # any order
        # The first box is 2/3 with either: greedy in order gives (2/3 + 3/7) / 2, the best matching (2/3 + 1) / 2.
        ("[2,0,12,10] [0,0,10,10]", [BOX, [4, 0, 14, 10]], 5 / 6),
        ("[0,0,10,10]", [BOX, [20, 0, 30, 10]], 1 / 2),
        ("[0,0,10,10]" * 5, BOX, 1 / 5),
        (" ".join(f"[{x},{y},{x + 10},{y + 10}]" for x in range(0, 100, 10) for y in range(0, 100, 10)), BOX, 1 / 100),
        ("[0,0,1000,1000]", BOX, 1e-4),  # the whole picture
        ("", BOX, 0.0),
        (" \n", BOX, 0.0),
        ("...", BOX, 0.0),
        ("there is no cat", BOX, 0.0),
        ("<answer></answer>[0,0,10,10]", BOX, 0.0),
        ("<answer>[9,9,10,10]</answer><answer>[0,0,10,10]</answer>", BOX, 0.01),
        ("(5, 5)", BOX, 0.0),  # a point is easier than a box
        ("[10,10,0,0]", BOX, 0.0),  # exchanged corners
        ("[10,0,0,10]", BOX, 0.0),
        ("[0,0,0,10]", BOX, 0.0),
        ("[0,0,10,10] [5,5,5,5]", BOX, 1 / 2),  # no area, but given
        ("[0,0,10,1e999]", BOX, 0.0),
        ("[-1e300,-1e300,1e300,1e300]", BOX, 0.0),
        ("[NaN, 0, 10, 10]", BOX, 0.0),
        ("[-5, 0, 5, 10]", BOX, 1 / 3),
        ("[0, 0, 10, 10, 10]", BOX, 0.0),
        ("[x1, y1, x2, y2]", BOX, 0.0),
        ("", [], 1.0),
        ("[]", "[]", 1.0),
        ("[0,0,10,10]", [], 0.0),
        ("[0,0,10,10]", None, None),
        ("[0,0,10,10]", "<answer>[0,0,10,10]</answer>", 1.0),
        ("[0,0,10,10]", '[{"bbox_2d": [0,0,10,10]}]', 1.0),
        ("[0,0,10,10]", np.array(BOX), 1.0),
        ("[0,0,10,10]", {"bbox": [BOX], "category": ["cat"]}, 1.0),
    ],
)
def test_boxes_by_hand(completion, truth, expected):
    assert score(completion, truth) == (None if expected is None else pytest.approx(expected))


def test_a_threshold_makes_each_pair_right_or_wrong():
    assert score(SHIFTED, BOX, threshold=0.5) == 0.0
    assert score(SHIFTED, BOX, threshold=1 / 3) == 1.0
    assert score("[2,0,12,10] [0,0,10,10]", [BOX, [4, 0, 14, 10]], threshold=0.6) == 1.0
    assert score("[2,0,12,10] [0,0,10,10]", [BOX, [4, 0, 14, 10]], threshold=0.9) == 1 / 2


def test_labels_that_differ_make_no_pair():
    truth = [{"bbox_2d": BOX, "label": "cat"}]
    cat, dog, none = (json.dumps({"bbox_2d": BOX, "label": name}) for name in (" Cat. ", "dog", ""))
    bare = "[0,0,10,10]"
    assert [score(text, truth) for text in (cat, dog, none, bare)] == [1.0, 0.0, 0.0, 1.0]
    assert [score(text, truth, labels="required") for text in (cat, dog, none, bare)] == [1.0, 0.0, 0.0, 0.0]
    assert [score(text, truth, labels="ignore") for text in (cat, dog, none, bare)] == [1.0, 1.0, 1.0, 1.0]
    assert score(dog, BOX, labels="required") == 1.0  # the truth has none
    both = [{"bbox_2d": BOX, "label": "cat"}, {"bbox_2d": [1, 0, 11, 10], "label": "dog"}]
    assert score(f"{dog}{cat}", both) == pytest.approx((1 + 9 / 11) / 2)  # each with its own, not with its nearest


@pytest.mark.parametrize(
    ("completion", "options", "expected"),
    [
        ("(5, 5)", {"expects": "points"}, 1.0),
        ("(10, 10)", {"expects": "points"}, 1.0),
        ("(11, 5)", {"expects": "points"}, 0.0),
        ("(5, 5) (6, 6)", {"expects": "points"}, 1 / 2),
        ("[0, 0, 10, 10]", {"expects": "points"}, 0.0),
        ("(1e999, 5)", {"expects": "points"}, 0.0),
        ('<point x="50" y="50">cat</point>', {"expects": "points", "scale": 100, "truth_scale": 10}, 1.0),
    ],
)
def test_points_in_boxes(completion, options, expected):
    assert score(completion, BOX, **options) == expected


def test_points_near_points():
    assert score("(3, 4)", [0, 0], radius=10) == 1 / 2  # 5 away
    assert score("(3, 4)", [0, 0], radius=5) == 0.0
    assert score("(3, 4)", [0, 0], radius=10, threshold=0.4) == 1.0
    assert score("(0,0),(10,0)", [[10, 0], [0, 0]], radius=5) == 1.0
    assert score("(0,0)", [[10, 0], [0, 0]], radius=5) == 1 / 2
    assert score("[0, 0, 1, 1]", [0, 0], radius=5) == 0.0
    with pytest.raises(RewardError, match="the truths are points, and there is no radius"):
        score("(3, 4)", [0, 0])


@pytest.mark.parametrize(
    ("layout", "truth"),
    [("xyxy", [10, 20, 40, 60]), ("xywh", [10, 20, 30, 40]), ("cxcywh", [25, 40, 30, 40]), ("yxyx", [20, 10, 60, 40])],
)
def test_formats_of_four_numbers(layout, truth):
    assert score("[10, 20, 40, 60]", truth, truth_format=layout) == 1.0
    assert score(str(truth), [10, 20, 40, 60], format=layout, truth_format="xyxy") == 1.0
    assert score("(10,20),(40,60)", truth, format=layout) == 1.0  # corners are corners


def as_png(picture, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def turned() -> bytes:
    """250 x 500 as stored, shown turned by its EXIF orientation."""
    picture = Image.new("RGB", (250, 500))
    exif = picture.getexif()
    exif[0x0112] = 6
    return as_png(picture, exif=exif)


@pytest.mark.parametrize(
    "columns",
    [
        {"width": 500, "height": 250},
        {"image": Image.new("RGB", (500, 250))},
        {"images": [Image.new("RGB", (500, 250)), Image.new("RGB", (7, 7))]},
        {"image": {"bytes": as_png(Image.new("RGB", (500, 250))), "path": None}},
        {"image": Medium.of(Image.new("RGB", (500, 250)))},
        {"image": np.zeros((250, 500, 3), np.uint8)},
        {"image": {"bytes": turned(), "path": None}},
        {"image": Image.open(io.BytesIO(turned()))},
        {"prompts": [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (500, 250))}]}]},
    ],
)
def test_a_thousand_against_pixels_of_the_upright_picture(columns):
    # 100 and 300 of 1000 are 50 and 150 of 500; 200 and 400 are 50 and 100 of 250.
    assert score("[100, 200, 300, 400]", [50, 50, 150, 100], columns, scale="1000", truth_scale="pixels") == 1.0
    assert score("[0.1, 0.2, 0.3, 0.4]", [50, 50, 150, 100], columns, scale=1, truth_scale="pixels") == 1.0
    assert score("[50, 50, 150, 100]", [0.1, 0.2, 0.3, 0.4], columns, truth_scale=1) == pytest.approx(1.0)


def test_a_picture_by_path_and_scales_that_need_none(tmp_path):
    Image.new("RGB", (500, 250)).save(tmp_path / "a.jpg")
    columns = {"image": str(tmp_path / "a.jpg")}
    assert score("[100, 200, 300, 400]", [50, 50, 150, 100], columns, scale=1000, truth_scale="pixels") == 1.0
    assert score("[100, 200, 300, 400]", [0.1, 0.2, 0.3, 0.4], scale=1000, truth_scale=1) == pytest.approx(1.0)
    with pytest.raises(RewardError, match='the row has no image and no "width" and "height"'):
        score("[1, 2, 3, 4]", [1, 2, 3, 4], {"images": []}, scale=1000, truth_scale="pixels")


@pytest.mark.parametrize("bounds", [{}, {"max_pixels": 20_000}, {"min_pixels": 200_000}])
def test_pixels_of_the_picture_as_the_model_sees_it(bounds):
    from transformers.models.qwen2_vl import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor()
    own = {"min_pixels": 3136, "max_pixels": 1003520} | bounds
    picture = Image.new("RGB", (301, 199))
    grid = processor([picture], return_tensors="pt", **own)["image_grid_thw"][0].tolist()
    width, height = 14 * grid[2], 14 * grid[1]
    assert (width, height) != picture.size
    reward = Grounding(scale="resized", truth_scale="pixels")
    reward.use_run(processor=processor, media=MediaOptions(**bounds), max_completion_length=8)
    right = f"[{0.5 * width}, 0, {width}, {0.5 * height}]"
    truth = [[150.5, 0, 301, 99.5]]
    assert reward([right], answer=truth, image=[picture]) == [pytest.approx(1.0)]
    of_row = Grounding(scale="resized", truth_scale="pixels", processor=processor)
    limits = {name: [value] for name, value in bounds.items()}
    assert of_row([right], answer=truth, image=[picture], **limits) == [pytest.approx(1.0)]


def test_resized_pixels_need_a_processor_that_resizes():
    with pytest.raises(RewardError, match='the scale "resized" needs the processor of a Qwen2-VL'):
        score("[1, 2, 3, 4]", [1, 2, 3, 4], {"width": 9, "height": 9}, scale="resized", truth_scale="pixels")
    assert score("[1, 2, 3, 4]", [1, 2, 3, 4], scale="resized") == 1.0  # the truth in the same pixels


@pytest.mark.parametrize(
    ("options", "columns", "message"),
    [
        ({"scale": "percent"}, {}, 'scale is \'percent\'. Give "pixels", "resized"'),
        ({"truth_scale": -1}, {}, "truth_scale is -1"),
        ({"format": "xyhw"}, {}, "format='xyhw' is none of xyxy, xywh, cxcywh, yxyx"),
        ({"threshold": 50}, {}, "threshold is 50"),
        ({"radius": 0}, {}, "radius=0 is not a number above 0"),
        ({"expects": "box"}, {}, "expects='box' is none of boxes, points"),
        ({}, {"solution": [BOX]}, 'there is no column "answer" \\(the rows have: solution\\)'),
        ({}, {"answer": ["cat"]}, "the column \"answer\" holds 'cat', which is no point or box"),
        ({"expects": "boxes"}, {"answer": [[1, 2]]}, "holds '\\[1, 2\\]', which is no box"),
        ({}, {"answer": [[10, 20, 5, 5]]}, "which is no point or box that can be \\(truth_format 'xyxy'\\)"),
    ],
)
def test_what_users_get_wrong_is_named(options, columns, message):
    with pytest.raises(RewardError, match=message):
        Grounding(**options)(["[1, 2, 3, 4]"], **columns)


def test_a_truth_that_cannot_be_read_later_costs_its_row_alone(caplog):
    reward = Grounding()
    answers = [BOX, "cat", [10, 0, 0, 10], [float("nan"), 0, 1, 1], "cat"]
    with caplog.at_level(logging.WARNING):
        assert reward(["[0,0,10,10]"] * 5, answer=answers) == [1.0, None, None, None, None]
    assert [record.message.count("The row is not scored") for record in caplog.records] == [1, 1, 1]


def test_a_spray_of_boxes_is_matched_in_part_and_divided_by_all():
    spray = "[0,0,10,10]" + "[1,1,2,2]" * 999
    assert score(spray, BOX) == 1 / 1000
    assert score("[1,1,2,2]" * 999 + "[0,0,10,10]", BOX) == pytest.approx(0.01 / 1000)  # not among the first
    many = [[10 * n, 0, 10 * n + 9, 9] for n in range(300)]
    assert score(str(many), many) == 1.0  # more truths than the limit


@pytest.mark.parametrize(
    "hostile",
    [
        "[" * 100_000,
        "{" * 100_000,
        "(" + " " * 100_000,
        "[1," * 50_000,
        "[" + "1" * 100_000,
        "[" + "1 " * 50_000,
        "(1,2)" * 20_000,
        "{" + "[1,2,3,4]" * 10_000 + "}",
        '{"label":"' * 10_000,
        '"label"' + " " * 100_000,
        "<point" * 20_000,
        "<points " + "x" * 100_000,
        "<point x=1 " * 10_000,
        "<ref>" * 20_000,
        "[1.1e" * 20_000,
        "<think>" * 10_000 + "<answer>" * 10_000,
    ],
    ids=lambda text: text[:12],
)
def test_hostile_texts_take_linear_time(hostile):
    start = time.perf_counter()
    for expects in ("boxes", "points"):
        assert 0 <= score(hostile, BOX, expects=expects) <= 0.1
    assert time.perf_counter() - start < 2


PIECES = st.sampled_from(list("[](){},.-+e0123456789 \"'<>|/") + ["<point x=", "<box>", '"label": "', "<ref>", "NaN"])
TEXTS = st.text(max_size=40) | st.lists(PIECES, max_size=40).map("".join)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-50, 50)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    TEXTS | st.lists(st.lists(NUMBERS, min_size=2, max_size=4), max_size=4).map(json.dumps),
    st.sampled_from([BOX, [BOX, [5, 5, 20, 20]], [3, 4], []]),
    st.sampled_from(["boxes", "points", None]),
    st.sampled_from(["xyxy", "xywh", "cxcywh", "yxyx"]),
)
def test_any_text_stays_in_range(completion, truth, expects, layout):
    if expects == "boxes" and truth == [3, 4]:
        return
    reward = Grounding(expects=expects, format=layout, truth_format="xyxy", radius=3, scale=1000, truth_scale=10)
    (value,) = reward([completion], answer=[truth])
    assert value is not None and 0 <= value <= 1
