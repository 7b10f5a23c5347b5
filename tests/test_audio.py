"""Sounds from every kind of source, at the rate that is asked for, compared with the sine they should be."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mediafiles import sine, write_audio, write_float_wav, write_video, write_wav

from vlm_grpo.config import MediaOptions
from vlm_grpo.errors import MediaError
from vlm_grpo.media import Medium

RATE = 16000


def heard(source, rate=RATE, own_rate=None, **options) -> np.ndarray:
    return Medium("audio", source, rate=own_rate).open_audio(rate, MediaOptions(**options))


def inner_error(samples: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, without the edges, where a filter knows only half of its neighbours."""
    assert abs(len(samples) - len(expected)) <= 2
    length = min(len(samples), len(expected))
    return float(np.abs(samples[:length] - expected[:length])[400:-400].max())


@pytest.mark.parametrize("own_rate", [44100, 22050, 8000, 11025, 48000, 16000])
@pytest.mark.parametrize("kind", ["float wav", "wav", "array", "stereo wav"])
def test_resampling_is_right_and_loses_no_sample(tmp_path, own_rate, kind):
    # covers A1
    wave = sine(own_rate, 2.0)
    if kind == "array":
        samples = heard(wave, own_rate=own_rate)
    elif kind == "float wav":
        samples = heard(write_float_wav(tmp_path / "a.wav", wave, own_rate))
    else:
        samples = heard(write_wav(tmp_path / "a.wav", np.stack([wave, wave]) if "stereo" in kind else wave, own_rate))
    assert samples.dtype == np.float32 and samples.shape == (2 * RATE,)
    assert inner_error(samples, sine(RATE, 2.0)) < 1e-4


@pytest.mark.parametrize(
    ("suffix", "codec", "most"),
    [("mp3", "libmp3lame", 0.03), ("flac", "flac", 1e-3), ("ogg", "libopus", 0.03), ("m4a", "aac", 0.03)],
)
def test_compressed_sounds(tmp_path, suffix, codec, most):
    # covers A1
    own_rate = 48000 if codec == "libopus" else 44100
    write_audio(tmp_path / f"a.{suffix}", sine(own_rate, 2.0), own_rate, codec)
    samples = heard(tmp_path / f"a.{suffix}")
    assert abs(len(samples) - 2 * RATE) <= 0.05 * RATE, "encoders pad their last block"
    length = min(len(samples), 2 * RATE) - 2400
    assert np.abs(samples[2400:length] - sine(RATE, 2.0)[2400:length]).max() < most


def test_the_audio_track_of_a_video(tmp_path):
    # covers O2
    path = write_video(tmp_path / "clip.mp4", 20, 10, audio=sine(44100, 2.0), audio_rate=44100)
    for kind in ("audio", "video"):
        samples = Medium(kind, path).open_audio(RATE)
        assert abs(len(samples) - 2 * RATE) <= 0.1 * RATE
        assert np.abs(samples[2400:28000] - sine(RATE, 2.0)[2400:28000]).max() < 0.03
    with pytest.raises(MediaError, match="it has no audio track"):
        Medium("video", write_video(tmp_path / "silent.mp4", 4)).open_audio(RATE)
    with pytest.raises(MediaError, match="a list of frames, which have no audio track"):
        Medium.of([np.zeros((4, 4, 3), np.uint8)], "video").open_audio(RATE)


def test_channels_are_averaged(tmp_path):
    left, right = sine(RATE), sine(RATE, hertz=1000)
    mean = (left + right) / 2
    both = np.stack([left, right])
    sources = [both, both.T, torch.from_numpy(both), write_wav(tmp_path / "a.wav", both)]
    for source in sources:
        assert np.abs(Medium.of(source, "audio").open_audio(RATE) - mean).max() < 1e-4
    six = np.stack([left, right, left, right, left, right])
    assert np.abs(heard(write_wav(tmp_path / "six.wav", six)) - mean).max() < 1e-4, "5.1: no channel is dropped"


def test_whole_numbers_are_scaled_by_their_type():
    wave = sine(RATE)
    for dtype, scale in ((np.int16, 2**15), (np.int32, 2**31), (np.int8, 2**7)):
        samples = heard((wave * scale).astype(dtype))
        assert np.abs(samples - wave).max() <= 1 / scale + 1e-6
    assert np.abs(heard((wave * 128 + 128).astype(np.uint8)) - wave).max() <= 1 / 128
    assert np.array_equal(heard(wave.astype(np.float64)), wave)
    with pytest.raises(MediaError, match="it holds int64 samples, whose scale is not known; give float32 or int16"):
        heard(np.arange(100))


def test_sources_of_datasets_and_torchcodec(tmp_path):
    # covers A7
    wave = sine(22050)
    path = write_wav(tmp_path / "a.wav", wave, 22050)
    expected = heard(path)
    decoder = SimpleNamespace(
        get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(wave)[None], sample_rate=22050)
    )
    made_by_datasets = SimpleNamespace(_hf_encoded={"bytes": None, "path": str(path)}, get_all_samples=None)
    sources = ["a.wav", path, path.read_bytes(), {"bytes": path.read_bytes(), "path": "gone.wav"}, decoder]
    sources += [{"bytes": None, "path": "a.wav"}, {"array": wave, "sampling_rate": 22050, "path": None}]
    sources += [{"array": wave.tolist(), "sampling_rate": 22050}, made_by_datasets, f"file://{path}"]
    for source in sources:
        assert np.abs(Medium.of(source, "audio", tmp_path).open_audio(RATE) - expected).max() < 1e-4
    assert Medium.of({"array": wave, "sampling_rate": 22050}, "audio").rate == 22050
    assert np.array_equal(heard(wave), wave), "without a rate it is the model's"


def test_the_run_or_the_row_may_cut(tmp_path):
    path = write_wav(tmp_path / "a.wav", sine(44100, 3.0), 44100)
    for source, own_rate in ((path, None), (sine(44100, 3.0), 44100)):
        whole = heard(source, own_rate=own_rate)
        assert np.array_equal(heard(source, own_rate=own_rate, max_audio_seconds=1.25), whole[: 5 * RATE // 4])
        assert len(heard(source, own_rate=own_rate, max_audio_seconds=60)) == 3 * RATE
    assert len(Medium("audio", path, overrides={"max_audio_seconds": 0.5}).open_audio(RATE)) == RATE // 2


def test_what_is_no_sound_is_one_sentence_with_its_row(tmp_path):
    # covers A7
    nan = sine(RATE)
    nan[77] = np.nan
    (tmp_path / "zero.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("not a sound")
    write_wav(tmp_path / "none.wav", np.zeros(0))
    write_float_wav(tmp_path / "nan.wav", nan)
    write_float_wav(tmp_path / "infinite.wav", np.where(np.isnan(nan), np.inf, nan))
    cases = {"zero.wav": "it is empty", "text.wav": "that FFmpeg knows", "none.wav": "it has no samples|no audio track"}
    cases |= {"nan.wav": "it holds NaN or infinite samples", "infinite.wav": "it holds NaN or infinite samples"}
    for name, reason in cases.items():
        with pytest.raises(MediaError, match=reason) as caught:
            Medium("audio", tmp_path / name, "train.jsonl row 17").open_audio(RATE)
        message = str(caught.value)
        assert str(tmp_path / name) in message and " — train.jsonl row 17." in message and "\n" not in message
    with pytest.raises(MediaError, match=r'The audio "/no/such.wav" does not exist — row 3. Correct the path'):
        Medium.of("/no/such.wav", "audio", where="row 3").open_audio(RATE)
    for samples, reason in ((nan, "holds NaN"), (np.zeros(0, np.float32), "no samples"), (np.zeros((2, 0)), "no samp")):
        with pytest.raises(MediaError, match=reason):
            heard(samples)
    with pytest.raises(MediaError, match="a rate of 0.5 samples a second"):
        heard(sine(RATE), own_rate=0.5)
    for value in (5, None, [0.1, 0.2], np.zeros((2, 2, 2)), {"path": None}, np.float32(1)):
        with pytest.raises(MediaError, match="An audio must be a path, bytes or an array.* — row 4"):
            Medium.of(value, "audio", where="row 4")


def test_no_damage_raises_anything_else(tmp_path):
    for name, codec in (("a.mp3", "libmp3lame"), ("a.flac", "flac"), ("a.m4a", "aac")):
        whole = write_audio(tmp_path / name, sine(RATE, 0.5), codec=codec).read_bytes()
        chance, refused = random.Random(0), 0
        for number in range(60):
            data = bytearray(whole[: chance.randrange(len(whole))] if number % 2 else whole)
            for _ in range(4 if data else 0):
                data[chance.randrange(len(data))] = chance.randrange(256)
            try:
                assert np.isfinite(heard(bytes(data))).all()
            except MediaError as error:
                refused += 1
                assert "\n" not in str(error)
        assert refused > 5
