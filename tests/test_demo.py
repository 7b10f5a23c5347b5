"""The demos' data, models and configs, the whole of each with the number of steps shrunk, and (slow) for real."""

import hashlib
import json
import re
import shutil
import stat
import subprocess
import sys
import wave
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from vlm_grpo import demo, load_data, load_model, run
from vlm_grpo.cli import app
from vlm_grpo.config import resolved
from vlm_grpo.data import to_sample
from vlm_grpo.data.pairs import as_pairs
from vlm_grpo.demo import RECIPES, digits, espeak, judging, motion, preferences, speech
from vlm_grpo.demo import rlhf as chain
from vlm_grpo.demo.speech import Utterance
from vlm_grpo.encode import encode
from vlm_grpo.errors import ConfigError
from vlm_grpo.report import filmstrip, spectrogram
from vlm_grpo.trainer_config import VLMGRPOConfig, build_args

FILES = ("labels", "train", "held-out")
KEYS = {
    *("modality", "algorithm", "seed", "accuracy_before", "ci95_before", "accuracy_after", "ci95_after"),
    *("accuracy_sft_only", "accuracy_control", "reward_first", "reward_last", "steps", "seconds", "run_dir"),
}
JUDGE_KEYS = {
    *("score_before", "score_after", "reward_model_seconds", "reward_model_dir"),
    *(
        f"reward_model_{name}{end}"
        for name in ("pair_accuracy", "pair_ci95", "blanked_accuracy", "blanked_ci95")
        for end in ("", "_with_captions")
    ),
}
ANSWERS = {"image": digits.DIGITS, "video": tuple(motion.DIRECTIONS), "audio": digits.DIGITS}


def rows_of(folder: Path, names: tuple[str, ...] = FILES) -> dict[str, list[dict[str, Any]]]:
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in names}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All modalities' files: ``data / modality``."""
    folder = tmp_path_factory.mktemp("data")
    for modality, recipe in RECIPES.items():
        recipe.write_data(folder / modality, 0)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for modality, recipe in RECIPES.items():
        recipe.save_model(folder / modality, 0)
    return folder


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modality", "sizes"),
    [("image", (100, 1247, 450)), ("video", (24, 1323, 450)), ("audio", (50, 1150, 400))],
)
def test_every_medium_is_in_one_part_only(data: Path, modality: str, sizes: tuple[int, ...]):
    rows = rows_of(data / modality)
    assert tuple(len(part) for part in rows.values()) == sizes
    assert sizes[0] == RECIPES[modality].labels
    media = [row[modality] for part in rows.values() for row in part]
    assert len(set(media)) == sum(sizes) and all((data / modality / name).is_file() for name in media)
    for part in rows.values():  # a part without some answer would measure something else
        assert set(Counter(row["answer"] for row in part)) == set(ANSWERS[modality])
    for row in rows["train"][:20]:
        assert [part["type"] for part in row["prompt"][0]["content"]] == [modality, "text"]


@pytest.mark.parametrize("modality", RECIPES)
def test_a_seed_draws_its_own_labels_and_never_from_the_held_out_rows(
    data: Path, modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(motion, "write_mp4", lambda *_: None)
    monkeypatch.setattr(speech, "speak", lambda spoken: [np.ones(4000, np.float32)] * len(spoken))
    RECIPES[modality].write_data(tmp_path, 1)
    first, second = rows_of(data / modality), rows_of(tmp_path)
    assert second["held-out"] == first["held-out"]
    labels = [{row[modality] for row in rows["labels"]} for rows in (first, second)]
    assert len(labels[0] & labels[1]) < 0.3 * len(labels[0]), "of 1,200 rows or more, drawn anew"
    pool = [{row[modality]: row for name in ("labels", "train") for row in rows[name]} for rows in (first, second)]
    assert pool[0] == pool[1]


@pytest.mark.parametrize(("modality", "each"), [("video", 6), ("audio", 5)])
def test_few_labels_have_every_answer_equally_often(data: Path, modality: str, each: int):
    labels = rows_of(data / modality)["labels"]
    assert Counter(row["answer"] for row in labels) == dict.fromkeys(ANSWERS[modality], each)


def test_pictures_and_labels_are_scikit_learns(data: Path):
    scans: Any = load_digits()
    for row in [row for part in rows_of(data / "image").values() for row in part]:
        index = int(Path(row["image"]).stem)
        assert row["answer"] == digits.DIGITS[scans.target[index]]
    for index in range(0, 1797, 100):
        with Image.open(data / "image" / "digits" / f"{index:04d}.png") as picture:
            assert picture.mode == "RGB"
            small = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX)).flatten()
        alike = [np.corrcoef(small, scan)[0, 1] for scan in scans.data]
        assert np.argmax(alike) == index


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == motion.FPS and stream.frames == motion.FRAMES
        assert container.duration == 1_000_000, "microseconds"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]).astype(float)


def path_of(frames: np.ndarray) -> np.ndarray:
    """The centre of what is bright, (x, y) for each frame."""
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]]
    light = frames.mean(3)
    return np.stack([(light * axis).sum((1, 2)) / light.sum((1, 2)) for axis in (x, y)], 1)


def test_clips_show_what_their_answer_says(data: Path):
    rows = rows_of(data / "video", (*FILES, "reversed"))
    for row in rows["train"][::25] + rows["held-out"][::25] + rows["reversed"][::25]:
        steps = np.diff(path_of(frames_of(data / "video" / row["video"])), axis=0)
        assert np.allclose(steps, steps.mean(0), atol=1.5), "evenly, but for whole pixels"
        assert motion.STEP[0] - 1 <= np.abs(steps.mean(0)).max() <= motion.STEP[1] + 1
        way = {name: np.dot(steps.mean(0), direction) for name, direction in motion.DIRECTIONS.items()}
        assert max(way, key=lambda name: way[name]) == row["answer"], row["video"]


def test_clips_are_real_digits_whole_and_alike_in_every_frame(data: Path):
    scans, _ = digits.load_scans()
    for index in range(0, 1797, 150):
        frames = frames_of(data / "video" / "clips" / f"{index:04d}.mp4")
        brightness = frames.mean((1, 2, 3))
        assert np.ptp(brightness) < 0.02 * brightness.mean(), "nothing leaves the picture, nothing fades"
        digit = np.asarray(digits.picture_of(scans[index], motion.DIGIT), float)
        windows = np.lib.stride_tricks.sliding_window_view(frames[0, :, :, 0], digit.shape)
        assert np.abs(windows - digit).mean((2, 3)).min() < 1, "grey levels of 255"


def test_a_reversed_clip_has_the_same_frames_and_the_opposite_answer(data: Path):
    rows = rows_of(data / "video", ("held-out", "reversed"))
    assert len(rows["reversed"]) == 450 and set(motion.OPPOSITE) == set(motion.DIRECTIONS)
    for row, backwards in zip(rows["held-out"], rows["reversed"], strict=True):
        assert backwards["answer"] == motion.OPPOSITE[row["answer"]]
        assert backwards["video"] == row["video"].replace(".mp4", "-reversed.mp4")
    for row, backwards in list(zip(rows["held-out"], rows["reversed"], strict=True))[::90]:
        one, other = (frames_of(data / "video" / r["video"]) for r in (row, backwards))
        assert np.abs(one - other[::-1]).mean() < 1


def test_a_place_does_not_tell_the_direction():
    random = np.random.RandomState(0)
    scan = digits.load_scans()[0][0]
    middles = {
        name: np.mean([path_of(motion.moving(scan, name, random)[..., None])[1:3].mean(0) for _ in range(300)], 0)
        for name in motion.DIRECTIONS
    }
    for middle in middles.values():
        assert np.abs(middle - middles["left"]).max() < 2.5, "pixels of 56: the path's middle is drawn alike for all"


def test_the_same_frames_give_the_same_bytes(tmp_path: Path):
    frames = motion.moving(digits.load_scans()[0][7], "up", np.random.RandomState(7))
    for name in ("one", "two"):
        motion.write_mp4(tmp_path / f"{name}.mp4", frames, motion.FPS)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


# ---- pairs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    preferences.write_preferences(folder, 0)
    return folder


def pairs_of(folder: Path, name: str) -> list[tuple[str, str, str]]:
    """(picture, chosen, rejected) of each row, by the labels in the file."""
    out = []
    for line in (folder / name).open():
        row = json.loads(line)
        outputs = [row[f"output_{number}"]["value"] for number in (1, 2)]
        out.append((Path(row["image"]).name, outputs[row["preference"] - 1], outputs[2 - row["preference"]]))
    return out


# covers L1
def test_pairs_are_read_as_a_users_and_the_chosen_word_is_scikit_learns(judged: Path):
    target: Any = load_digits().target
    data = as_pairs(load_data(str(judged / preferences.HELD_OUT_PAIRS)))
    assert len(data) == 450
    written = pairs_of(judged, preferences.HELD_OUT_PAIRS)
    assert [(row["chosen"], row["rejected"]) for row in data] == [pair[1:] for pair in written]
    for picture, chosen, rejected in written + pairs_of(judged, preferences.PAIRS):
        assert chosen == digits.DIGITS[target[int(picture[:4])]] != rejected
    sample = to_sample(data[0])
    assert isinstance(sample.prompt, list)
    assert [part["type"] for part in sample.prompt[0]["content"]] == ["image", "text"]


def test_without_the_picture_no_word_is_better_than_another(judged: Path):
    held_out = pairs_of(judged, preferences.HELD_OUT_PAIRS)
    trained = [pair for pair in pairs_of(judged, preferences.PAIRS) if pair[2] in digits.DIGITS]
    for pairs in (held_out, trained):
        counts = Counter((chosen, rejected) for _, chosen, rejected in pairs)
        assert len(counts) == 90, "every word against every other"
        assert all(counts[chosen, rejected] == counts[rejected, chosen] for chosen, rejected in counts)
    firsts = Counter(json.loads(line)["preference"] for line in (judged / preferences.PAIRS).open())
    assert 0.47 < firsts[1] / firsts.total() < 0.53


def test_who_is_judged_is_neither_asked_by_grpo_nor_held_out(judged: Path):
    seen = {picture for picture, *_ in pairs_of(judged, preferences.PAIRS)}
    rows = rows_of(judged, ("labels", "prompts", "held-out"))
    others = {name: {Path(row["image"]).name for row in part} for name, part in rows.items()}
    assert len(seen) == preferences.JUDGED and [len(part) for part in others.values()] == [100, 499, 450]
    assert not any(seen & part for part in others.values()) and not others["prompts"] & others["labels"]
    assert {picture for picture, *_ in pairs_of(judged, preferences.HELD_OUT_PAIRS)} == others["held-out"]
    captions = json.loads((judged / preferences.CAPTIONS).read_text())
    for picture, chosen, _ in pairs_of(judged, preferences.HELD_OUT_PAIRS):
        assert captions[picture] == [f"this is a {chosen}"]


def test_a_muddled_answer_is_never_one_digit():
    random = np.random.RandomState(0)
    drawn = {preferences.muddled("six", random) for _ in range(2000)}
    assert {"six six", "six nine", "nine six", "right", "? six"} <= drawn
    assert not drawn & set(digits.DIGITS)


def test_partners_never_share_an_answer_even_where_one_is_common():
    answers = np.array([0] * 49 + list(range(1, 10)) * 6)
    met = preferences.partners(np.arange(103), answers, np.random.RandomState(0))
    assert len(met) == 102 and len({row for row, _ in met}) == 102
    assert all(answers[one] != answers[other] and (other, one) in met for one, other in met)


def test_the_judges_words_change_nothing_of_the_other_demos_models(tmp_path: Path, models: Path):
    recipe = judging.judged(RECIPES["image"])
    recipe.save_model(tmp_path, 0)
    plain, judges = (load_model(folder)[1].tokenizer.get_vocab() for folder in (models / "image", tmp_path))
    assert {word for word in judges if word not in plain} == set(preferences.WORDS)
    assert {word: judges[word] for word in plain} == plain
    request = preferences.REQUEST.split("%}")[-1].split()
    assert {*request, *preferences.STEM.split(), "this", "is", "a", "seven"} <= set(judges)


def test_the_runs_of_the_reward_model_share_the_policys_base(tmp_path: Path):
    recipe = RECIPES["image"]
    plain, captioned = (judging.reward_config(recipe, tmp_path, 3, captions=which) for which in (False, True))
    rewards = [{"model": plain.output}, "accuracy=0"]
    grpo = demo.grpo_config(recipe, tmp_path, 3, False, rewards, preferences.PROMPTS)
    assert plain.model == captioned.model == grpo.model and plain.train["seed"] == 3
    assert plain.judge and captioned.judge and plain.judge.captions is None and captioned.judge.captions
    assert [(spec.name, spec.weight) for spec in grpo.rewards] == [("model", 1.0), ("accuracy", 0.0)]
    assert not plain.rewards and str(grpo.data.train).endswith(preferences.PROMPTS)


# ---- words -----------------------------------------------------------------------------------------------------------


def samples_of(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768


def test_recordings_hold_one_word_of_their_length(data: Path):
    spans: dict[str, list[float]] = {}
    for row in rows_of(data / "audio")["train"][::4]:
        sound = samples_of(data / "audio" / row["audio"])
        assert len(sound) == 16000, "one second"
        loudness = np.sqrt((sound.reshape(100, 160) ** 2).mean(1))  # of each hundredth of a second
        assert 0.25 < np.abs(sound).max() < 0.95 and loudness.max() > 5 * np.median(np.sort(loudness)[:10])
        (heard,) = np.nonzero(loudness > 0.1 * loudness.max())
        spans.setdefault(row["answer"], []).append((heard[-1] - heard[0]) / 100)
    lengths = {word: np.mean(seconds) for word, seconds in spans.items()}
    assert all(0.1 < length < 0.8 for length in lengths.values()), lengths
    assert min(lengths["seven"], lengths["nine"]) > max(lengths["two"], lengths["eight"]), lengths


def test_held_out_voices_speak_no_training_row_and_words_are_balanced(data: Path):
    rows = rows_of(data / "audio")
    speakers = {name: {row["voice"].split("+")[1] for row in part} for name, part in rows.items()}
    assert speakers["held-out"] == set(speech.HELD_OUT_SPEAKERS)
    assert speakers["train"] == speakers["labels"] == set(speech.SPEAKERS)
    assert not speakers["held-out"] & speakers["train"]
    assert set(Counter(row["answer"] for row in rows["held-out"]).values()) == {40}
    assert set(Counter(row["answer"] for row in rows["labels"] + rows["train"]).values()) == {120}


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.array_equal(one, other)


def test_every_voice_is_another_and_speaks_alike_again():
    pytest.importorskip("espeakng_loader")
    voices = [f"{accent}+{speaker}" for accent in speech.ACCENTS for speaker in speech.SPEAKERS]
    voices += [f"en-us+{speaker}" for speaker in speech.HELD_OUT_SPEAKERS]
    spoken = [Utterance("seven", voice, 150, 50) for voice in voices]
    sounds = speech.speak(spoken)
    digests = {hashlib.sha256(sound.tobytes()).hexdigest() for sound in sounds}
    assert len(digests) == len(voices), "an unknown voice would sound like the usual one"
    # Breath is noise, drawn by the clock unless it is seeded: across two processes, some time apart.
    assert all(same(*pair) for pair in zip(sounds, speech.speak(spoken), strict=True))


def test_speed_and_pitch_arrive():
    pytest.importorskip("espeakng_loader")
    usual, fast, high = speech.speak([Utterance("nine", "en-us+m3", *how) for how in ((130, 20), (190, 20), (130, 80))])
    assert len(fast) < 0.85 * len(usual) and abs(len(high) - len(usual)) < 0.1 * len(usual)

    def tone(sound: np.ndarray) -> float:
        """The most frequent distance between two peaks of the voice, as hertz."""
        middle = sound[len(sound) // 3 : len(sound) // 3 + 3200]
        alike = np.correlate(middle, middle, "full")[len(middle) :]
        return 16000 / (40 + np.argmax(alike[40:300]))

    assert tone(high) > 1.15 * tone(usual)


def test_an_unknown_voice_is_refused():
    pytest.importorskip("espeakng_loader")
    for voice in ("en-us+nobody", "xx-nowhere", "xx-nowhere+m1"):
        with pytest.raises(ConfigError, match=f'espeak-ng has no voice "{re.escape(voice)}" in .*espeak-ng-data'):
            speech.speak([Utterance("one", voice, 150, 50)])


def test_data_that_espeak_cannot_use_is_one_line(tmp_path: Path):
    loader = pytest.importorskip("espeakng_loader")
    command = [sys.executable, espeak.__file__, str(loader.get_library_path()), str(tmp_path / "espeak-ng-data")]
    done = subprocess.run(command, input=b"[]", capture_output=True)
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.decode().splitlines()[-1] == f"espeak-ng cannot use its data in {tmp_path / 'espeak-ng-data'}"


def without_loader(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)  # import raises ImportError
    monkeypatch.setenv("PATH", str(path))


def test_without_espeak_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    without_loader(monkeypatch, tmp_path)
    result = CliRunner().invoke(app, ["demo", "--modality", "audio", "--output", str(tmp_path / "x")])
    assert result.exit_code == 2 and result.stdout == ""
    assert " ".join(result.stderr.split()) == (
        "The audio demo's words are spoken by espeak-ng, which is not installed. "
        'Install it: pip install "vlm-grpo[audio]".'
    )


PROGRAM = """#!{python}
import struct, sys, wave
if "silent" in sys.argv:
    sys.exit("espeak-ng: no such voice")
sys.stderr.write(" ".join(sys.argv[1:]))
data = struct.pack("<11025h", *[8000 * (-1) ** (n // 25) for n in range(11025)])
# Like the real one: the length is not known when the header is written.
header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 0x7ffff024, b"WAVE", b"fmt ", 16, 1, 1, 22050, 44100, 2, 16,
                     b"data", 0x7ffff000)
sys.stdout.buffer.write(header + data)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the program is a script")
def test_without_the_package_the_program_speaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    program = tmp_path / "espeak-ng"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    without_loader(monkeypatch, tmp_path)
    (sound,) = speech.speak([Utterance("one", "en-us+m1", 150, 50)])
    assert sound.dtype == np.float32 and abs(len(sound) - 8000) < 50, "half a second, at 16 kHz"
    with pytest.raises(ConfigError, match="cannot be spoken: espeak-ng: no such voice. Install it anew"):
        speech.speak([Utterance("one", "silent", 150, 50)])


# ---- models and configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("modality", "placeholders"), [("image", 4), ("video", 8), ("audio", 25)])
def test_the_tiny_models_load_and_can_say_every_answer(models: Path, data: Path, modality: str, placeholders: int):
    model, processor = load_model(models / modality)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
    words = [processor.tokenizer(word, add_special_tokens=False)["input_ids"] for word in ANSWERS[modality]]
    assert all(len(ids) == 1 for ids in words) and len({ids[0] for ids in words}) == len(words)
    assert processor.tokenizer.unk_token_id not in [ids[0] for ids in words]

    rows = load_data(str(data / modality / "held-out.jsonl"), limit=2)
    encoded = [encode(processor, to_sample(row)) for row in rows]  # type: ignore[arg-type]
    token = processor.tokenizer.convert_tokens_to_ids(str(getattr(processor, f"{modality}_token")))
    assert encoded[0].input_ids.count(token) == placeholders
    assert processor.tokenizer.unk_token_id not in encoded[0].input_ids, "the tokenizer knows the whole prompt"
    with torch.no_grad():
        logits = [
            model(input_ids=torch.tensor([e.input_ids]), **e.media, **e.tokens).logits[0, -1].softmax(-1)
            for e in encoded
        ]
    assert (logits[0] - logits[1]).abs().sum() > 0.01, "another medium, another answer"


def test_video_positions_follow_the_clips_true_rate(models: Path, data: Path):
    _, processor = load_model(models / "video")
    (row,) = load_data(str(data / "video" / "held-out.jsonl"), limit=1)
    encoded = encode(processor, to_sample(row))  # type: ignore[arg-type]
    assert encoded.media["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert encoded.media["second_per_grid_ts"].tolist() == [2 / motion.FPS]


@pytest.mark.parametrize("modality", RECIPES)
def test_a_models_weights_are_its_seeds(models: Path, modality: str, tmp_path: Path):
    for seed in (0, 1):
        RECIPES[modality].save_model(tmp_path / str(seed), seed)
    saved, same, other = (
        torch.cat([p.flatten() for p in load_model(folder)[0].parameters()])
        for folder in (models / modality, tmp_path / "0", tmp_path / "1")
    )
    assert torch.equal(saved, same) and not torch.allclose(saved, other)


@pytest.mark.parametrize("modality", RECIPES)
def test_configs_chain_the_stages_and_hold_out_the_held_out_rows(tmp_path: Path, modality: str):
    recipe = RECIPES[modality]
    warm, grpo = demo.warm_config(recipe, tmp_path, 3), demo.grpo_config(recipe, tmp_path, 3, full=False)
    continued = demo.continued_config(recipe, tmp_path, 3, seconds=90)
    assert grpo.model == continued.model == warm.output and len({c.output for c in (warm, grpo, continued)}) == 3
    assert {config.data.eval for config in (warm, grpo, continued)} == {str(tmp_path / "data" / "held-out.jsonl")}
    assert warm.data.train == continued.data.train == str(tmp_path / "data" / "labels.jsonl")
    assert grpo.data.train == str(tmp_path / "data" / "train.jsonl")
    assert [config.train["seed"] for config in (warm, grpo, continued)] == [3, 3, 3]
    assert continued.max_minutes == 1.5
    full = demo.grpo_config(recipe, tmp_path, 3, full=True)
    assert grpo.lora is not None and full.lora is None
    assert full.train["learning_rate"] < grpo.train["learning_rate"]
    args: Any = build_args(VLMGRPOConfig, resolved(grpo)["train"], output_dir=str(tmp_path))
    assert args.generation_batch_size // args.num_generations <= 1150


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_a_film_strip_shows_the_frames_in_order():
    frames = np.stack([np.full((8, 6, 3), shade, np.uint8) for shade in (10, 90, 200)])
    strip = np.asarray(filmstrip(frames, gap=2))
    assert strip.shape == (8, 22, 3)
    assert [strip[4, x, 0] for x in (3, 11, 19)] == [10, 90, 200] and (strip[:, 6:8] == 255).all()


def test_a_spectrogram_shows_when_and_how_high():
    time = np.arange(16000) / 16000
    low, high = np.sin(2 * np.pi * 1000 * time), np.sin(2 * np.pi * 6000 * time)
    sound = np.concatenate([low[:8000], high[8000:]])
    light = np.asarray(spectrogram(sound, 16000, (300, 180)).convert("L"), float)
    assert light.shape == (180, 300)
    heights = light.argmax(0) / 180  # from the top, which is 8 kHz
    assert abs(np.median(heights[20:130]) - 7 / 8) < 0.03 and abs(np.median(heights[170:280]) - 2 / 8) < 0.03
    assert np.asarray(spectrogram(np.zeros(16000), 16000).convert("L")).max() < 20, "silence is dark"


# ---- from end to end -------------------------------------------------------------------------------------------------


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> Path:
    """A few steps of a few rows; everything else as it is."""

    def copied(modality: str):
        def write(folder: Path, seed: int) -> None:
            shutil.copytree(data / modality, folder, dirs_exist_ok=True)
            for name, count in (("held-out", 70), ("reversed", 30), ("train", 60)):
                if (folder / f"{name}.jsonl").exists():
                    lines = (folder / f"{name}.jsonl").read_text().splitlines()[:count]
                    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

        return write

    for modality, recipe in RECIPES.items():
        warm = {**recipe.warm, "max_steps": 2, "per_device_train_batch_size": 4}
        grpo = {**recipe.grpo, "max_steps": 3, "per_device_train_batch_size": 16}
        ppo = recipe.ppo and {**recipe.ppo, "max_steps": 4}
        own = {"write_data": copied(modality), "warm": warm, "grpo": grpo, "ppo": ppo}
        monkeypatch.setitem(RECIPES, modality, replace(recipe, **own))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "modality", ["image", *(pytest.param(modality, marks=pytest.mark.slow) for modality in ("video", "audio"))]
)
def test_the_demo_from_end_to_end(shrunk: Path, modality: str):
    arguments = ["demo", "--json", "--seed", "5", "--modality", modality]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    *above, last = result.stdout.strip().splitlines()
    assert above == [], "with --json, stdout holds the object alone"
    figures = json.loads(last)
    assert set(figures) == KEYS | ({"accuracy_reversed"} if modality == "video" else set())
    assert (figures["modality"], figures["algorithm"], figures["seed"]) == (modality, "grpo", 5)
    assert figures["steps"] == 3 and figures["seconds"] > 0
    for accuracy, interval in (("accuracy_before", "ci95_before"), ("accuracy_after", "ci95_after")):
        low, high = figures[interval]
        assert 0 <= low <= figures[accuracy] <= high <= 1 and high - low > 0.02
        assert round(70 * figures[accuracy], 6) % 1 == 0, "a share of the held-out rows"
    assert round(30 * figures.get("accuracy_reversed", 0), 6) % 1 == 0
    metrics = [json.loads(line) for line in (Path(figures["run_dir"]) / "metrics.jsonl").open()]
    assert [record["step"] for record in metrics] == [1, 2, 3]
    assert (figures["reward_first"], figures["reward_last"]) == (metrics[0]["reward"], metrics[-1]["reward"])

    folder = shrunk / "runs" / f"demo-{modality}-5" / "grpo"
    assert Path(figures["run_dir"]).resolve() == folder
    for name in ("curves.png", "held-out.png"):
        with Image.open(folder / name) as picture:
            picture.load()
            assert min(picture.size) > 200 and len(set(picture.convert("L").tobytes())) > 20, name
    assert "warm start continued as long" in result.stderr and "70 held-out" in result.stderr
    told = {figures[key] for key in figures if key.startswith("accuracy_")}
    shown = re.findall(r"(\d+\.\d)%", result.stderr)
    assert {f"{100 * value:.1f}" for value in told} <= set(shown)

    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0 and again.stdout.strip() == last, "nothing is trained twice"


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_ppos_demo_from_end_to_end(shrunk: Path, modality: str):  # covers A2, A8
    arguments = ["demo", "--json", "--seed", "5", "--algorithm", "ppo", "--modality", modality]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert set(figures) == KEYS and (figures["algorithm"], figures["steps"]) == ("ppo", 4)
    folder = shrunk / "runs" / f"demo-ppo-{modality}-5" / "ppo"
    assert Path(figures["run_dir"]).resolve() == folder and (folder / "held-out.png").is_file()
    rollouts = [m for m in map(json.loads, (folder / "metrics.jsonl").open()) if "values" in m]
    assert [rollout["step"] for rollout in rollouts] == [1, 3], "two epochs each"
    assert "after PPO" in result.stderr and "after GRPO" not in result.stderr


@pytest.mark.slow
def test_the_demo_of_rlhf_from_end_to_end(shrunk: Path, judged: Path, monkeypatch: pytest.MonkeyPatch):  # covers L5
    def write(folder: Path, seed: int, silent: bool) -> None:
        assert silent
        shutil.copytree(judged, folder, dirs_exist_ok=True)
        for name, count in (("held-out", 70), ("prompts", 60), ("pairs", 80), ("held-out-pairs", 40)):
            lines = (folder / f"{name}.jsonl").read_text().splitlines()[:count]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    monkeypatch.setattr(chain, "write_preferences", write)
    monkeypatch.setattr(chain, "JUDGE_STEPS", 2)
    monkeypatch.setattr(judging, "REWARD", {**judging.REWARD, "per_device_train_batch_size": 4})
    result = CliRunner().invoke(app, ["demo", "--json", "--seed", "5", "--algorithm", "rlhf"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    more = {f"{name}_with_captions" for name in ("score_before", "score_after", "accuracy_after", "ci95_after")}
    assert set(figures) == KEYS | JUDGE_KEYS | more | {"run_dir_with_captions"}
    for name in ("ppo", "ppo-captions"):
        folder = shrunk / "runs" / "demo-rlhf-5" / name
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["algorithm"] == "ppo" and ("captions" in config["rewards"][0]["kwargs"]) == (name != "ppo")
        assert (folder / "value" / "head.safetensors").is_file()
    shown = set(re.findall(r"(\d+\.\d)%", result.stderr))
    assert {f"{100 * figures[k]:.1f}" for k in figures if "accuracy" in k} <= shown


def test_silence_is_rejected_once_a_picture(tmp_path: Path, judged: Path):
    preferences.write_preferences(tmp_path, 0, silent=True)
    own = (tmp_path / preferences.PAIRS).read_text().splitlines()
    plain = (judged / preferences.PAIRS).read_text().splitlines()
    assert own[: len(plain)] == plain and len(own) == len(plain) + preferences.JUDGED
    for line in own[len(plain) :]:
        row = json.loads(line)
        rejected = row[f"output_{3 - row['preference']}"]["value"]
        assert rejected == "" and row[f"output_{row['preference']}"]["value"] in digits.DIGITS


@pytest.mark.slow
def test_the_reward_models_demo_from_end_to_end(shrunk: Path, judged: Path, monkeypatch: pytest.MonkeyPatch):
    def write(folder: Path, seed: int) -> None:
        shutil.copytree(judged, folder, dirs_exist_ok=True)
        for name, count in (("held-out", 70), ("prompts", 60), ("pairs", 80), ("held-out-pairs", 40)):
            lines = (folder / f"{name}.jsonl").read_text().splitlines()[:count]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    monkeypatch.setattr(judging, "write_preferences", write)
    monkeypatch.setattr(judging, "REWARD", {**judging.REWARD, "max_steps": 2, "per_device_train_batch_size": 4})
    arguments = ["demo", "--json", "--seed", "5", "--algorithm", "reward-model"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    *above, last = result.stdout.strip().splitlines()
    assert above == []
    figures = json.loads(last)
    assert set(figures) == KEYS | JUDGE_KEYS
    assert (figures["modality"], figures["algorithm"], figures["seed"], figures["steps"]) == (
        "image",
        "reward-model",
        5,
        3,
    )
    assert figures["reward_model_blanked_accuracy"] == 0.5, "twos of rows, whatever the judge"
    assert round(40 * figures["reward_model_pair_accuracy"], 6) % 0.5 == 0
    folder = shrunk / "runs" / "demo-reward-model-5"
    assert Path(figures["run_dir"]).resolve() == folder / "grpo" and (folder / "grpo" / "held-out.png").is_file()
    metrics = [json.loads(line) for line in (folder / "grpo" / "metrics.jsonl").open()]
    for record in metrics:  # the score alone is the reward; the truth is measured
        (score,) = [record[k] for k in record if k.startswith("rewards/model") and k.endswith("/mean")]
        assert record["reward"] == pytest.approx(score) and "rewards/accuracy/mean" in record
    shown = set(re.findall(r"(\d+\.\d)%", result.stderr))
    assert {f"{100 * figures[k]:.1f}" for k in figures if "accuracy" in k} <= shown
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0 and again.stdout.strip() == last, "nothing is trained twice"


@pytest.mark.slow
def test_the_reward_models_demo_for_real(tmp_path: Path):
    figures = demo.demo(algorithm="reward-model", output=str(tmp_path))
    assert figures["reward_model_pair_accuracy"] >= 0.95, figures
    assert figures["reward_model_pair_accuracy_with_captions"] >= 0.95, figures
    assert 0.45 <= figures["reward_model_blanked_accuracy"] <= 0.55, figures
    assert figures["accuracy_after"] >= figures["accuracy_before"] + 0.1, figures
    assert figures["score_after"] > figures["score_before"], figures


@pytest.mark.slow
@pytest.mark.parametrize(("modality", "bar"), [("image", 0.9), ("audio", 0.8)])
def test_ppos_demo_for_real(modality: str, bar: float, tmp_path: Path):
    figures = demo.demo(modality, algorithm="ppo", output=str(tmp_path))
    assert figures["accuracy_after"] >= bar and figures["ci95_before"][1] < figures["ci95_after"][0], figures
    assert abs(figures["accuracy_control"] - 0.1) < 0.06, figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modality", "bar", "chance"), [("image", 0.9, 0.1), ("video", 0.9, 0.25), ("audio", 0.8, 0.1)]
)
def test_the_demo_for_real(modality: str, bar: float, chance: float, tmp_path: Path):
    figures = demo.demo(modality, seed=0, output=str(tmp_path))
    assert figures["accuracy_after"] >= bar, figures
    assert figures["ci95_before"][1] < figures["ci95_after"][0], figures
    assert figures["accuracy_after"] > figures["accuracy_before"] and figures["reward_last"] > figures["reward_first"]
    assert abs(figures["accuracy_control"] - chance) < 0.06, figures
    assert figures.get("accuracy_reversed", 1) >= 0.85, figures


def test_what_the_demo_does_not_have_is_refused(tmp_path: Path):
    result = CliRunner().invoke(app, ["demo", "--modality", "smell", "--output", str(tmp_path / "x")])
    assert result.exit_code == 2 and "smell" in result.output and "image" in result.output
    with pytest.raises(ConfigError, match='there is no modality "smell". Use image, video, audio'):
        demo.demo(modality="smell", output=str(tmp_path / "x"))
    with pytest.raises(ConfigError, match='there is no algorithm "sarsa". Use grpo, ppo, reward-model, rlhf'):
        demo.demo(algorithm="sarsa", output=str(tmp_path / "x"))
    result = CliRunner().invoke(app, ["demo", "--modality", "audio", "--algorithm", "reward-model"])
    assert result.exit_code == 2 and "reward-model is shown with image, not with audio" in " ".join(
        result.output.split()
    )
    with pytest.raises(ConfigError, match="ppo is shown with image and audio, not with video. Choose one of these"):
        demo.demo("video", algorithm="ppo", output=str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_an_interrupted_stage_is_the_last_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    begun: list[str] = []

    def stage(stopped: str | None):
        def function(config: Any) -> run.RunResult:
            begun.append(Path(config.output).name)
            return run.RunResult(Path(config.output), 1, 1.0, {}, stopped=stopped)

        return function

    monkeypatch.setattr(run, "sft", stage(None))
    monkeypatch.setattr(run, "train", stage("Ctrl-C"))
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 130 and begun == ["warm", "grpo"]
    assert "The same command again continues" in result.stderr and "Traceback" not in result.stderr
