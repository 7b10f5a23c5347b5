"""Bad media are found before training: each kind of them, at both levels, once a file, and in bounded memory."""

import logging
import os
import re
import sqlite3
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import tiny
from mediafiles import encoded, numbered_frame, png_header, sine, write_audio, write_float_wav, write_video, write_wav
from PIL import Image, ImageFile

import vlm_grpo.media.check as check_module
from vlm_grpo.config import MediaOptions
from vlm_grpo.data.scan import ScanReport, scan
from vlm_grpo.errors import UnsupportedError
from vlm_grpo.media import Medium
from vlm_grpo.media.check import check_medium

LEVELS = ("headers", "full")


def found(source, kind="image", level="headers", rate=None, heard=False, **overrides) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check_medium(Medium(kind, source, "row 1", overrides, rate), level, MediaOptions(), heard)


@pytest.fixture
def folder(tmp_path):
    """Good and bad files of each kind."""
    photo = encoded(tiny.image(1, (80, 60)), "JPEG")
    nan = sine(16000, 0.2)
    nan[7] = np.nan
    files = {
        **{"good.jpg": photo, "good.png": encoded(tiny.image(1)), "tail.jpg": photo + b"\0" * 5000},
        **{"torn.jpg": photo[: len(photo) // 2], "zero.mp4": b"", "empty.png": png_header(0, 5)},
        **{"bomb.png": png_header(30000, 30000), "warned.png": png_header(11000, 11000), "text.png": b"not a picture"},
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    write_video(tmp_path / "good.mp4", 12, audio=sine(16000, 1.2))
    write_video(tmp_path / "silent.mp4", 12)
    write_video(tmp_path / "frameless.mp4", 0)
    write_video(tmp_path / "frameless.mkv", 0)
    write_audio(tmp_path / "sound.mp4", sine(16000, 0.5))
    write_wav(tmp_path / "good.wav", sine(16000, 0.2))
    write_wav(tmp_path / "none.wav", np.zeros(0))
    write_float_wav(tmp_path / "nan.wav", nan)
    return tmp_path


@pytest.mark.parametrize("level", LEVELS)
def test_each_kind_of_bad_media_is_found(folder, level):
    # covers A7
    bad = {
        ("image", "missing.png"): "does not exist",
        ("image", "torn.jpg"): "truncated",
        ("image", "empty.png"): "cannot be read",
        ("image", "bomb.png"): "decompression bomb",
        ("image", "warned.png"): "decompression bomb",
        ("image", "text.png"): "it is no picture that Pillow knows",
        ("image", "."): "is a folder",
        ("image", "zero.mp4"): r"is empty \(0 bytes\)",
        ("video", "missing.mp4"): "does not exist",
        ("video", "zero.mp4"): r"is empty \(0 bytes\)",
        ("video", "frameless.mp4"): "has no frames",
        ("video", "frameless.mkv"): "its end is missing",
        ("video", "sound.mp4"): "has no video stream",
        ("video", "text.png"): "has 0 pixels",
        ("audio", "silent.mp4"): "has no audio track",
        ("audio", "none.wav"): "has no (samples|audio track)",
        ("audio", "zero.mp4"): r"is empty \(0 bytes\)",
    }
    for (kind, name), problem in bad.items():
        text = found(folder / name, kind, level)
        assert text is not None and re.search(problem, text), (kind, name, text)
        assert "\n" not in text and str(folder) not in text
    good = {"image": ["good.jpg", "good.png", "tail.jpg"], "video": ["good.mp4", "silent.mp4"]}
    good["audio"] = ["good.wav", "good.mp4", "sound.mp4"]
    for kind, names in good.items():
        for name in names:
            assert found(folder / name, kind, level) is None, name
            assert found((folder / name).read_bytes(), kind, level) is None, name
    assert found(folder / "nan.wav", "audio", level) == (
        None if level == "headers" else "holds NaN or infinite samples"
    )


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_in_memory_is_looked_through_at_both_levels(folder, level):
    nan = sine(16000, 0.2)
    nan[7] = np.nan
    frames = [numbered_frame(i) for i in range(3)]
    for source, kind, problem in (
        (nan, "audio", "holds NaN or infinite samples"),
        (np.zeros(0, np.float32), "audio", "has no samples"),
        (Image.new("RGB", (0, 5)), "image", "has 0 pixels (0x5)"),
        (Image.fromarray(np.float32([[np.nan]])), "image", "holds NaN or infinite pixels"),
        ([], "video", "has no frames"),
        (np.zeros((0, 4, 4, 3), np.uint8), "video", "has no frames"),
        (np.full((2, 4, 4, 3), np.nan), "video", "holds NaN or infinite pixels"),
        ([*frames, folder / "gone.png"], "video", f'has a frame, number 3 ("{folder}/gone.png"), that does not exist'),
        (
            [frames[0], b"123"],
            "video",
            "has a frame, number 1, that cannot be read (it is no picture that Pillow knows)",
        ),
    ):
        assert found(Medium.of(source, kind).source, kind, level) == problem
    assert found(sine(16000), "audio", level, rate=22050) is None
    assert found(Medium.of(frames, "video").source, "video", level) is None
    assert found(np.stack(frames), "video", level) is None
    assert found(np.stack(frames), "video", level, heard=True) == "has no audio track"
    assert found(folder / "good.mp4", "video", level, heard=True) is None
    assert found(folder / "silent.mp4", "video", level, heard=True) == "has no audio track"
    assert "frame_cnts" in (found(folder / "good.mp4", "video", level, frame_cnts=[0]) or "")
    assert "min_frames=9" in (found(folder / "good.mp4", "video", level, min_frames=9, max_frames=3) or "")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "MPO"])
def test_headers_find_a_cut_and_never_blame_a_whole_picture(kind):
    chance = np.random.default_rng(0)
    image = Image.fromarray(chance.integers(0, 255, (90, 120, 3), dtype=np.uint8))
    options = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
    whole = encoded(image, kind, **options)
    assert found(whole) is None and found(whole + b"\0" * 3000) is None
    assert found(whole[: len(whole) // 3]) is not None


def test_a_photograph_with_a_thumbnail_or_a_film_behind_it():
    thumbnail = encoded(Image.new("RGB", (16, 16)), "JPEG")
    photo = encoded(tiny.image(1, (400, 300)), "JPEG", exif=b"Exif\0\0" + thumbnail)
    assert found(photo) is None
    assert "truncated" in (found(photo[:-900]) or ""), "the end marker of the thumbnail is not the photo's"
    assert found(photo + bytes(200_000)) is None


def test_pillow_may_be_told_to_take_truncated_images(folder, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert found(folder / "torn.jpg") is None and found(folder / "torn.jpg", level="full") is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**10)
    assert found(folder / "bomb.png") is None, "a raised limit is respected"


def rows(*names: str, kind="image", root=None) -> list[tuple[int, Medium]]:
    return [(number, Medium.of(name, kind, root)) for number, name in enumerate(names, 1)]


def test_the_report_lists_rows_and_the_total(folder):
    # covers A7
    media = [
        *((1, Medium("image", folder / "good.png")), (2, Medium("image", folder / "torn.jpg"))),
        *((17, Medium("video", folder / "sound.mp4")), (17, Medium("image", folder / "gone.png"))),
        (30, Medium("audio", folder / "good.wav")),
    ]
    report = scan(iter(media), MediaOptions(), "training media", cache=folder / "c.sqlite")
    assert report.checked == 5 and sorted(report.bad) == [2, 17]
    lines = report.text().split("\n")
    assert len(lines) == 3 and lines[2] == "The dataset has 2 rows with bad media."
    assert lines[0].startswith(f'row 2: the image "{folder}/torn.jpg" cannot be read (')
    assert f'the video "{folder}/sound.mp4" has no video stream' in lines[1] and "; " in lines[1]
    many = ScanReport(50, {row: ['the image "x" does not exist'] for row in range(1, 26)})
    lines = many.text().split("\n")
    assert len(lines) == 22 and lines[20] == "... and 5 more." and lines[21].startswith("The dataset has 25 rows")
    assert ScanReport(1, {3: ["x"]}).text("a.jsonl") == "a.jsonl row 3: x." and ScanReport(5).text() == ""


def test_off_looks_at_nothing(folder):
    def media():
        raise AssertionError("touched")
        yield

    assert scan(media(), MediaOptions(scan="off"), "media") == ScanReport()


def test_a_file_is_checked_once_and_remembered_until_it_changes(folder, monkeypatch):
    looked: list[str] = []
    original = check_module.check_medium
    monkeypatch.setattr(check_module, "check_medium", lambda m, *rest: looked.append(m.label) or original(m, *rest))
    cache, path = folder / "deep" / "c.sqlite", str(folder / "good.png")
    torn = str(folder / "torn.jpg")
    media = rows(*[path] * 50, *[torn] * 3)

    def run(**options) -> tuple[list[str], ScanReport]:
        looked.clear()
        return looked, scan(iter(media), MediaOptions(**options), "media", cache=cache)

    looks, report = run()
    assert sorted(looks) == [path, torn] and report.checked == 53 and sorted(report.bad) == [51, 52, 53]
    looks, again = run()
    assert looks == [torn] and again == report, "what was good is not opened again, what was bad is"
    assert sorted(run(scan="full")[0]) == [path, torn], "another level is another question"
    stamp = os.stat(path).st_mtime_ns
    os.utime(path, ns=(stamp + 1, stamp + 1))
    assert sorted(run()[0]) == [path, torn]
    (folder / "good.png").write_bytes(b"now it is text")
    assert sorted(run()[1].bad) == list(range(1, 54))
    (folder / "good.png").unlink()
    assert "does not exist" in run()[1].bad[1][0]


def test_what_hangs_on_options_is_not_mixed_up(folder):
    cache, clip = folder / "c.sqlite", Medium("video", folder / "silent.mp4")
    wrong = Medium("video", folder / "silent.mp4", overrides={"frame_cnts": [0]})
    assert not scan([(1, clip)], MediaOptions(), "media", cache=cache).bad
    assert sorted(scan([(1, clip), (2, wrong)], MediaOptions(), "media", cache=cache).bad) == [2]
    assert sorted(scan([(1, clip)], MediaOptions(audio_in_video=True), "media", cache=cache).bad) == [1]
    assert not scan([(1, clip)], MediaOptions(), "media", cache=cache).bad
    assert sorted(scan([(1, Medium("image", clip.source))], MediaOptions(), "media", cache=cache).bad) == [1]


@pytest.mark.parametrize("state", ["torn", "folder", "no folder", "locked", "other table"])
def test_a_cache_that_cannot_be_used_breaks_nothing(folder, state, caplog, monkeypatch):
    cache, held = folder / "c.sqlite", None
    if state == "torn":
        cache.write_bytes(b"SQLite format 3\0" + b"rubbish" * 300)
    elif state == "folder":
        cache.mkdir()
    elif state == "no folder":
        (folder / "file").write_text("")
        cache = folder / "file" / "c.sqlite"
    elif state == "other table":
        sqlite3.connect(cache).execute("create table good (x)")
    else:
        monkeypatch.setattr("vlm_grpo.data.scan._SECONDS_LOCKED", 0.05)
        held = sqlite3.connect(cache)
        held.execute("create table if not exists good (x)")
        held.execute("begin exclusive")
    with caplog.at_level(logging.DEBUG, "vlm_grpo"):
        report = scan(rows("good.png", "gone.png", "good.jpg", root=folder), MediaOptions(), "media", cache=cache)
    assert report.checked == 3 and sorted(report.bad) == [2]
    assert len([r for r in caplog.records if "cache of checked media" in r.message]) == 1
    if held is not None:
        held.close()


def test_the_default_cache_is_where_the_environment_says(folder, monkeypatch):
    monkeypatch.setenv("VLM_GRPO_CACHE", str(folder / "own"))
    scan(rows("good.png", root=folder), MediaOptions(), "media")
    assert (folder / "own" / "media-scan.sqlite").is_file()


def test_media_do_not_pile_up(folder):
    """A generator of media is not drained ahead of the threads, and none is kept."""
    alive, most, lock = 0, 0, threading.Lock()

    class Counted(Medium):
        __slots__ = ()

        def __init__(self, *rest) -> None:
            nonlocal alive, most
            with lock:
                alive += 1
                most = max(most, alive)
            super().__init__(*rest)

        def __del__(self) -> None:
            nonlocal alive
            with lock:
                alive -= 1

    data = (folder / "good.png").read_bytes()
    for number in range(2000):
        os.link(folder / "good.png", folder / f"{number}.png")
    media = ((i, Counted("image", folder / f"{i}.png" if i % 2 else data)) for i in range(2000))
    report = scan(media, MediaOptions(), "media", workers=2, cache=folder / "c.sqlite")
    assert report == ScanReport(2000) and alive == 0 and most < 40


def test_media_are_checked_side_by_side(folder, monkeypatch):
    """As on a network drive, where each file takes its time."""
    monkeypatch.setattr(check_module, "check_medium", lambda *rest: time.sleep(0.05))
    start = time.monotonic()
    media = [(i, Medium("image", bytes([i]))) for i in range(32)]
    assert scan(media, MediaOptions(), "media", workers=16, cache=folder / "c.sqlite").checked == 32
    assert time.monotonic() - start < 0.8, "one after another it would be 1.6 s"


def test_the_bar_is_for_terminals_and_comes_late(folder, monkeypatch, capfd):
    media = [(i, Medium("image", folder / "good.png", overrides={"max_frames": 20 + i})) for i in range(5)]
    monkeypatch.setattr("vlm_grpo.data.scan._SECONDS_WITHOUT_BAR", 0.0)
    scan(media, MediaOptions(), "media of training", cache=folder / "c.sqlite")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    scan(media, MediaOptions(), "media of training", cache=folder / "c.sqlite", total=5)
    out, err = capfd.readouterr()
    assert out == "" and "media of training" in err
    monkeypatch.setattr("vlm_grpo.data.scan._SECONDS_WITHOUT_BAR", 60.0)
    scan(media, MediaOptions(), "media of training", cache=folder / "c.sqlite")
    assert capfd.readouterr() == ("", "")


def test_without_pyav_the_scan_says_it_once_instead_of_blaming_every_video(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert not scan(rows("good.png", root=folder), MediaOptions(), "media", cache=folder / "c.sqlite").bad
    with pytest.raises(UnsupportedError, match="pip install av"):
        scan(rows("good.mp4", "silent.mp4", kind="video", root=folder), MediaOptions(), "media", cache=folder / "c")
