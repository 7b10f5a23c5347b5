"""Which frames of a video are taken, proved by frames that say their number; and what is no video."""

import random
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mediafiles import number_of, numbered_frame, sine, write_audio, write_video
from PIL import Image

from vlm_grpo.config import MediaOptions
from vlm_grpo.errors import DataFormatError, MediaError, UnsupportedError
from vlm_grpo.media import Medium
from vlm_grpo.media.video import _jump, _Lost, _walk, frame_indices, measure


def rule(**values) -> MediaOptions:
    return MediaOptions(**values)


def numbers(video) -> list[int]:
    return [number_of(frame) for frame in video.frames]


@pytest.mark.parametrize(
    ("total", "duration", "options", "expected"),
    [
        (100, 10.0, {}, [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]),  # one a second
        (100, 10.0, {"base_interval": 2.5}, [0, 33, 66, 99]),  # 10 / 2.5
        (100, 10.0, {"fps": 0.4}, [0, 33, 66, 99]),  # the same interval
        (100, 10.0, {"base_interval": 5, "min_frames": 2}, [0, 99]),
        (100, 10.0, {"base_interval": 5}, [0, 33, 66, 99]),  # 2, raised to min_frames = 4
        (100, 100.0, {"max_frames": 5}, [0, 25, 50, 74, 99]),  # 24.75, 49.5, 74.25
        (100, 0.2, {"min_frames": 1}, [49]),  # round(0.2) = 0, raised to 1: the middle one
        (101, 1.0, {"min_frames": 1}, [50]),
        (3, 60.0, {}, [0, 1, 2]),  # never more than it has
        (1, 60.0, {}, [0]),
        (2, 0.0, {}, [0, 1]),
    ],
)
def test_the_count_is_duration_by_interval_within_the_limits(total, duration, options, expected):
    # covers Q2
    assert frame_indices(total, duration, rule(**options)) == expected


def test_a_drawn_count_lies_between_the_limits_and_is_seeded():
    # covers Q2
    options = rule(min_frames=4, max_frames=8, dynamic_sample=True)
    drawn = [frame_indices(26, 2.6, options, draw=random.Random(seed)) for seed in range(60)]
    assert {len(indices) for indices in drawn} == {4, 5, 6, 7, 8}
    assert drawn == [frame_indices(26, 2.6, options, draw=random.Random(seed)) for seed in range(60)]
    assert all(indices[0] == 0 and indices[-1] == 25 for indices in drawn)
    assert frame_indices(26, 5.0, options) == frame_indices(26, 5.0, rule(min_frames=4, max_frames=8)), "no draw"
    short = {len(frame_indices(5, 1.0, options, draw=random.Random(seed))) for seed in range(40)}
    assert short == {4, 5}, "the limits are those of the clip"
    assert frame_indices(2, 1.0, options, draw=random.Random(0)) == [0, 1]


@pytest.mark.parametrize(
    ("count", "total", "frame_cnts", "expected"),
    [
        # 8 * 15/26 = 4.62 and 3.38: five and three; frames 0..14 and 15..25.
        (8, 26, [15, 11], [0, 4, 7, 11, 14, 15, 20, 25]),
        # 1.33, 1.33, 1.33: the first of equal remainders takes the fourth.
        (4, 30, [1, 1, 1], [0, 9, 14, 24]),
        # 0.2, 3.8: nothing of the first; four of the frames 5..99.
        (4, 100, [5, 95], [5, 36, 68, 99]),
        # Segments of 1 and 9 frames, 5.5 and 4.5 wanted: the first has only one to give.
        (10, 10, [55, 45], list(range(10))),
        # Segments of 2, 0, 1, 0, 1 and 0 frames; 1.1 and five times 0.4 wanted.
        (3, 4, [3, 1, 1, 1, 1, 1], [0, 2, 3]),
    ],
)
def test_segments_share_the_count_by_largest_remainder(count, total, frame_cnts, expected):
    # covers Q2
    options = rule(min_frames=count, max_frames=count, dynamic_sample=True)
    assert frame_indices(total, 1.0, options, frame_cnts, random.Random(0)) == expected


def test_indices_always_increase_and_keep_the_count():
    # covers Q2
    chance = random.Random(5)
    for _ in range(3000):
        total, most = chance.randint(1, 60), chance.randint(1, 40)
        options = rule(min_frames=chance.randint(1, most), max_frames=most, dynamic_sample=chance.random() < 0.7)
        lengths = [chance.randint(1, 9) for _ in range(chance.randint(1, 12))]
        indices = frame_indices(total, chance.random() * 50, options, lengths, chance)
        assert all(a < b for a, b in zip(indices, indices[1:], strict=False))
        assert indices[0] >= 0 and indices[-1] < total
        assert min(options.min_frames, total) <= len(indices) <= min(most, total)


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        *(("mp4", "libx264"), ("mkv", "libx264"), ("mov", "mpeg4"), ("avi", "mpeg4"), ("ts", "libx264")),
        *(("webm", "libvpx-vp9"), ("h264", "libx264"), ("mpg", "mpeg2video")),
    ],
)
def test_the_frames_taken_are_the_frames_meant(tmp_path, suffix, codec):
    # covers Q2
    path = write_video(tmp_path / f"clip.{suffix}", 40, 25, codec=codec, gop=10)
    for options in (rule(min_frames=1, max_frames=1), rule(base_interval=0.2), rule(min_frames=40, max_frames=40)):
        video = Medium("video", path).open_video(options)
        assert numbers(video) == video.indices and video.total == 40
        assert video.frames.shape == (len(video.indices), 48, 64, 3) and video.frames.dtype == np.uint8
        assert video.fps == pytest.approx(25, rel=1e-6) and video.duration == pytest.approx(1.6)
    assert len(Medium("video", path).open_video(rule(base_interval=0.2)).indices) == 8
    assert numbers(Medium("video", path.read_bytes()).open_video(rule(max_frames=4))) == [0, 13, 26, 39]


@pytest.mark.parametrize("name", ["a:b.mp4", "concat:x|y.mp4", "frame %03d.mp4", "Überfahrt 船 #1?.mp4", "-i.mp4"])
def test_a_name_is_only_a_name(tmp_path, monkeypatch, name):
    """FFmpeg has protocols and patterns."""
    write_video(tmp_path / "clip.mp4", 12).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (name, str(tmp_path / name)):
        assert Medium.of(path, "video").open_video().total == 12


def test_a_gif_is_a_video(tmp_path):
    path = write_video(tmp_path / "clip.gif", 20, 10, codec="gif")
    video = Medium("video", path).open_video(rule(max_frames=4))
    assert video.indices == [0, 6, 13, 19] and video.fps == 10 and video.duration == 2
    # 256 fixed colours: the frames are told apart, their numbers are not exact.
    levels = [int(frame.mean()) for frame in video.frames]
    expected = [numbered_frame(i).mean() for i in video.indices]
    assert np.abs(np.array(levels) - expected).max() < 20


def test_the_rate_is_the_true_one(tmp_path):
    """Qwen2.5-VL's temporal positions are made of it."""
    # covers Q2
    path = write_video(tmp_path / "ntsc.mp4", 60, Fraction(30000, 1001))
    video = Medium("video", path).open_video()
    assert video.fps == pytest.approx(30000 / 1001, rel=1e-6)
    assert video.duration == pytest.approx(60 * 1001 / 30000, rel=1e-3)
    slow = Medium("video", write_video(tmp_path / "slow.mkv", 8, Fraction(1, 2))).open_video()
    assert slow.fps == 0.5 and slow.duration == 16 and slow.total == 8


def test_a_longer_sound_does_not_lengthen_the_clip(tmp_path):
    path = write_video(tmp_path / "clip.mkv", 20, 10, audio=sine(16000, 5.0))
    video = Medium("video", path).open_video()
    assert (video.total, video.duration, video.fps) == (20, 2.0, 10.0)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("options", [{}, {"x264-params": "open-gop=1:bframes=3"}, {"x264-params": "bframes=0"}])
def test_jumping_to_key_frames_takes_the_same_frames_as_walking(tmp_path, suffix, options):
    path = write_video(tmp_path / f"clip.{suffix}", 240, 24, gop=24, options=options)
    clip = measure(path)
    assert clip.total == 240 and len(clip.keys) >= 10
    for indices in ([0], [239], [5, 23, 24, 25, 47, 130, 239], [1, 2, 3, 200, 201], list(range(240))):
        walked, _ = _walk(path, indices, rule())
        try:
            jumped = list(_jump(path, clip, indices, rule()))
        except _Lost:
            assert suffix == "ts", "mpegts seeks by guessing; the walk is what it falls back to"
            continue
        assert np.array_equal(jumped, walked) and [number_of(frame) for frame in walked] == indices
    assert numbers(Medium("video", path).open_video(rule(min_frames=16))) == [round(i * 239 / 15) for i in range(16)]


def test_fewer_frames_than_announced_are_chosen_from_anew(tmp_path, monkeypatch):
    import vlm_grpo.media.video as module

    path = write_video(tmp_path / "clip.mp4", 20, 10)
    true = measure(path)
    claimed = module.Clip(50, 5.0, 10.0, [*true.times, *range(10**6, 10**6 + 30)], true.keys)
    monkeypatch.setattr(module, "measure", lambda source: claimed)
    video = Medium("video", path).open_video(rule(max_frames=5))
    assert video.indices == [0, 6, 13, 19] == numbers(video), "2 s, raised to min_frames"
    assert (video.total, video.duration) == (20, 2.0)


def test_pixel_bounds_hold_for_each_frame(tmp_path):
    # covers O5
    path = write_video(tmp_path / "clip.mp4", 12, size=(160, 120))
    for source in (path, [numbered_frame(i, (160, 120)) for i in range(12)]):
        medium = Medium.of(source, "video")
        small = medium.open_video(rule(max_pixels=3000))
        assert small.frames.shape[1:] == (47, 63, 3) and numbers(small) == small.indices
        large = medium.open_video(rule(min_pixels=40000))
        assert large.frames.shape[1:] == (174, 231, 3) and numbers(large) == large.indices
    own = Medium("video", path, overrides={"max_pixels": 300, "min_frames": 2, "base_interval": 0.6})
    assert own.open_video(rule(max_pixels=3000)).frames.shape == (2, 15, 20, 3), "the row's own limits win"


def test_a_clip_filmed_with_the_telephone_turned_is_upright(tmp_path):
    upright = Medium("video", write_video(tmp_path / "a.mp4", 20)).open_video().frames[-1]
    for rotation in (90, 180, -90):
        path = write_video(tmp_path / f"{rotation}.mp4", 20, rotation=rotation)
        turned = Medium("video", path).open_video().frames[-1]
        assert np.array_equal(turned, np.rot90(upright, rotation // 90)), "counter-clockwise"


def test_frames_chosen_by_the_user_are_only_thinned(tmp_path):
    # covers Q2
    frames = [numbered_frame(i) for i in range(20)]
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    array = np.stack(frames)
    sources = [frames, tuple(Image.fromarray(frame) for frame in frames), array, torch.from_numpy(array)]
    sources += [[f"{i}.png" for i in range(20)], [(tmp_path / f"{i}.png").read_bytes() for i in range(20)]]
    sources += [torch.from_numpy(array).permute(0, 3, 1, 2), array.astype(np.float32) / 255]
    sources += [[{"bytes": None, "path": str(tmp_path / f"{i}.png")} for i in range(20)]]
    for source in sources:
        medium = Medium.of(source, "video", tmp_path)
        video = medium.open_video(rule(base_interval=100, max_frames=5, dynamic_sample=True), random.Random(0))
        assert video.indices == [0, 5, 10, 14, 19] == numbers(video)
        assert (video.total, video.fps, video.duration) == (20, 2.0, 10.0), "2 frames a second, as Qwen assumes"
        assert len(medium.open_video(rule(max_frames=50)).indices) == 20
    assert Medium.of(frames, "video", overrides={"fps": 5}).open_video().fps == 5
    assert Medium("video", frames, rate=8.0).open_video().duration == 2.5
    grey = Medium.of([np.full((4, 4), i, np.uint8) for i in range(3)], "video").open_video()
    assert grey.frames[:, 0, 0].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]


def test_a_decoder_of_torchcodec_is_a_clip():
    # covers Q2
    class Decoder:
        metadata = SimpleNamespace(num_frames=40, average_fps=10.0, duration_seconds=4.0)

        def get_frames_at(self, indices):
            frames = np.stack([numbered_frame(i) for i in indices])
            return SimpleNamespace(data=torch.from_numpy(frames).permute(0, 3, 1, 2))

    video = Medium.of(Decoder(), "video").open_video()
    assert video.indices == [0, 13, 26, 39] == numbers(video) and video.fps == 10


def test_a_decoder_that_datasets_made_stays_lazy(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 20)

    class Decoder:
        def __init__(self, **cell):
            self._hf_encoded = cell

    assert Medium.of(Decoder(path=str(path), bytes=None), "video").source == path
    assert numbers(Medium.of(Decoder(path=None, bytes=path.read_bytes()), "video").open_video()) == [0, 6, 13, 19]


def test_what_is_no_video_is_one_sentence_with_its_row(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", 40, container={"movflags": "faststart"}).read_bytes()
    slow = write_video(tmp_path / "slow.mp4", 40).read_bytes()
    (tmp_path / "zero.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "tail.mp4").write_bytes(slow[: len(slow) * 2 // 3])
    write_audio(tmp_path / "sound.mp4", sine(16000))
    cases = {
        "zero.mp4": "it is empty",
        "text.mp4": "no sound or video that FFmpeg knows",
        "half.mp4": "it is truncated",
    }
    cases |= {"tail.mp4": "damaged|torn", "sound.mp4": "it has no video stream", ".": "it is a folder"}
    for name, reason in cases.items():
        with pytest.raises(MediaError, match=reason) as caught:
            Medium("video", tmp_path / name, "train.jsonl row 17").open_video()
        assert str(tmp_path) in str(caught.value) and " — train.jsonl row 17." in str(caught.value)
    with pytest.raises(MediaError, match=r'The video "/no/such.mp4" does not exist — row 3. Correct the path'):
        Medium.of("/no/such.mp4", "video", where="row 3").open_video()
    for source, reason in (
        ([], "it has no frames"),
        (np.zeros((0, 4, 4, 3), np.uint8), "it has no frames"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], r"different sizes \(4x4 and 5x4\)"),
        ([tmp_path / "none.png"], r'a frame, number 0 \(".*none.png"\), that does not exist'),
        (np.full((2, 4, 4, 3), np.nan), "holds NaN"),
    ):
        with pytest.raises(MediaError, match=reason):
            Medium.of(source, "video").open_video()
    for lengths in ([0, 3], [1.5], "ab", []):
        with pytest.raises(MediaError, match="frame_cnts=.*must be whole numbers above 0"):
            Medium("video", whole, overrides={"frame_cnts": lengths}).open_video()
    with pytest.raises(DataFormatError, match="min_frames=9 is more than max_frames=3"):
        Medium("video", whole, overrides={"min_frames": 9, "max_frames": 3}).open_video()
    for value in (5, None, np.zeros((4, 4)), np.zeros((2, 5, 4, 7)), Image.new("RGB", (4, 4)), {"x": 1}):
        with pytest.raises(MediaError, match="A video must be a path, bytes, a list of frames.* — row 4"):
            Medium.of(value, "video", where="row 4")


def test_a_song_with_a_cover_is_no_video(tmp_path):
    import av

    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as out:
        sound, cover = out.add_stream("aac", rate=16000, layout="mono"), out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        out.mux(cover.encode(av.VideoFrame.from_ndarray(numbered_frame(3), "rgb24")))
        out.mux(cover.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, 0
        out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    with pytest.raises(MediaError, match="it has no video stream"):
        Medium("video", tmp_path / "song.m4a").open_video()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "gif"])
def test_no_damage_raises_anything_else(tmp_path, suffix):
    codec = "gif" if suffix == "gif" else "libx264"
    whole = write_video(tmp_path / f"clip.{suffix}", 12, codec=codec, audio=None).read_bytes()
    chance = random.Random(0)
    damaged = [whole[:length] for length in range(0, len(whole), max(1, len(whole) // 25))]
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(4):
            data[chance.randrange(len(data))] = chance.randrange(256)
        damaged.append(bytes(data))
    refused = 0
    for data in damaged:
        try:
            video = Medium("video", data).open_video()
            assert len(video.frames) == len(video.indices) > 0
        except MediaError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 5


def test_without_pyav_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    import sys

    path = write_video(tmp_path / "clip.mp4", 4)
    monkeypatch.setitem(sys.modules, "av", None)
    for use in (lambda m: m.open_video(), lambda m: m.open_audio(16000)):
        with pytest.raises(UnsupportedError, match="pip install av"):
            use(Medium("video", path))
    assert Medium.of([numbered_frame(0)], "video").open_video().total == 1, "frames need no PyAV"
