"""Rows to samples: every kind of medium, in columns or in the message parts, with options of its own."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_grpo import load_data, scan_media
from vlm_grpo.data import to_sample
from vlm_grpo.errors import DataFormatError, MediaError
from vlm_grpo.media import KINDS

TEXT = {"type": "text", "text": "what"}


def row(*parts, **columns) -> dict:
    return {"prompt": [{"role": "user", "content": [*parts, TEXT]}], **columns}


def sources(sample) -> list:
    return [(medium.kind, medium.source) for medium in sample.media]


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_takes_its_column(kind):
    # covers O1 A1 A7
    one = to_sample(row({"type": kind}, **{kind: "a.bin"}), Path("/root"))
    assert sources(one) == [(kind, Path("/root/a.bin"))]
    two = to_sample(row({"type": kind}, {"type": kind}, **{f"{kind}s": ["a.bin", "/b.bin"]}), Path("/root"))
    assert sources(two) == [(kind, Path("/root/a.bin")), (kind, Path("/b.bin"))]
    inside = to_sample(row({"type": kind, kind: "a.bin"}), Path("/root"))
    assert sources(inside) == sources(one)
    assert [part["type"] for part in one.prompt[0]["content"]] == [kind, "text"]
    assert one.columns == {}


def test_kinds_are_matched_each_in_its_own_order():
    mixed = row({"type": "audio"}, {"type": "image"}, {"type": "video"}, {"type": "image"})
    sample = to_sample({**mixed, "images": ["1.png", "2.png"], "video": "c.mp4", "audio": "s.wav"})
    assert sources(sample) == [
        ("audio", Path("s.wav")),
        ("image", Path("1.png")),
        ("video", Path("c.mp4")),
        ("image", Path("2.png")),
    ]


def test_media_without_slots_go_before_the_first_user_text_images_first():
    sample = to_sample({"prompt": [{"role": "user", "content": "what"}], "audio": "s.wav", "image": "1.png"})
    assert [part["type"] for part in sample.prompt[0]["content"]] == ["image", "audio", "text"]


@pytest.mark.parametrize("kind", KINDS)
def test_slots_and_media_of_a_kind_match_in_number(kind):
    with pytest.raises(DataFormatError, match=rf'row 3: the prompt has 2 {kind} slots but "{kind}\(s\)" holds 1'):
        to_sample(row({"type": kind}, {"type": kind}, **{kind: "a"}), where="row 3")
    with pytest.raises(DataFormatError, match=rf'he prompt has 1 {kind} slot but "{kind}\(s\)" holds 2'):
        to_sample(row({"type": kind}, **{f"{kind}s": ["a", "b"]}))
    with pytest.raises(DataFormatError, match=f'both "{kind}" and "{kind}s"'):
        to_sample(row({"type": kind}, **{kind: "a", f"{kind}s": ["a"]}))


def test_a_list_in_the_video_column_is_its_frames_or_several_clips():
    frames = [Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4))]
    assert len(to_sample(row({"type": "video"}, video=frames)).media) == 1
    assert len(to_sample(row({"type": "video"}, video=["1.png", "2.jpg"])).media) == 1
    assert len(to_sample(row({"type": "video"}, {"type": "video"}, video=["a.mp4", "b.mp4"])).media) == 2
    assert len(to_sample(row({"type": "video"}, {"type": "video"}, videos=[frames, ["1.png"]])).media) == 2
    array = np.zeros((3, 4, 4, 3), np.uint8)
    for given in (array, array.tolist()):  # a table makes lists of an array
        (medium,) = to_sample(row({"type": "video"}, video=given)).media
        assert medium.source.shape == (3, 4, 4, 3)


def test_numbers_in_the_audio_column_are_one_sound():
    wave = np.linspace(-1, 1, 50, dtype=np.float32)
    for given in (wave, wave.tolist()):
        (medium,) = to_sample(row({"type": "audio"}, audio=given)).media
        assert np.allclose(medium.source, wave)
    assert len(to_sample(row({"type": "audio"}, {"type": "audio"}, audio=["a.wav", "b.wav"])).media) == 2


def test_options_of_a_row_and_of_a_part():
    # covers O5 Q2
    sample = to_sample(
        row(
            {"type": "video", "fps": 4.0},
            {"type": "image"},
            {"type": "audio"},
            video="v.mp4",
            image="i.png",
            audio="a.wav",
            max_pixels=100,
            fps=2.0,
            meta={"min_frames": 2, "frame_cnts": [3, 1], "dynamic_sample": True, "speaker": 7},
        )
    )
    video, image, audio = sample.media
    assert video.overrides == {
        "max_pixels": 100,
        "fps": 4.0,
        "min_frames": 2,
        "frame_cnts": [3, 1],
        "dynamic_sample": True,
    }
    assert image.overrides == {"max_pixels": 100}
    assert audio.overrides == {}
    assert sample.columns["meta"]["speaker"] == 7 and sample.columns["fps"] == 2.0, "rewards still see them"
    assert video.options().fps == 4.0 and video.options().max_frames == 16
    with pytest.raises(DataFormatError, match="min_frames=8 is more than max_frames=4"):
        to_sample(row({"type": "video", "min_frames": 8, "max_frames": 4}, video="v.mp4")).media[0].options()


def test_the_row_is_not_changed():
    # covers O1: the original mutated prompts in place
    given = row({"type": "video"}, video="v.mp4")
    before = repr(given)
    to_sample(given)
    assert repr(given) == before


def test_options_of_a_part_survive_a_file(tmp_path: Path):
    (tmp_path / "v.mp4").touch()
    (tmp_path / "f.png").touch()
    part = {"type": "video", "video": "v.mp4", "fps": 0.5, "max_frames": 7, "max_pixels": 999}
    frames = {"type": "video", "video": ["f.png", "f.png"], "fps": 4.0}
    slot = {"type": "video", "max_frames": 5}
    given = [row(part), row(frames), row(slot, video="v.mp4")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in given))
    found = [to_sample(r).media[0].overrides for r in load_data(str(tmp_path / "rows.jsonl"))]
    assert found == [{"fps": 0.5, "max_frames": 7, "max_pixels": 999}, {"fps": 4.0}, {"max_frames": 5}]


def test_what_is_no_medium_is_reported_among_the_bad_ones(tmp_path: Path):
    given = [{"prompt": [{"role": "user", "content": "x"}], "image": name} for name in ("https://a/b.png", "gone.png")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in given))
    with pytest.raises(MediaError, match="rows.jsonl row 1"):
        load_data(str(tmp_path / "rows.jsonl"))
    rows = load_data(str(tmp_path / "rows.jsonl"), check_files=False)
    assert sorted(scan_media(rows, "rows.jsonl").bad) == [1, 2]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": [{"role": None, "content": "x"}]}, 'has no "role"'),
        ({"prompt": [{"role": "user", "content": "x"}], "audio": [[[1.0, 2.0], [3.0]]]}, "form no array"),
    ],
)
def test_rows_that_once_ended_in_a_traceback(row, sentence):
    with pytest.raises(DataFormatError, match=sentence):
        to_sample(row)
