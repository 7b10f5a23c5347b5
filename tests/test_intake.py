"""Rows that cannot be used: refused, or left out and counted; and what one row may set for its own media."""

import random

import mediafiles
import numpy as np
import pytest
import recorder
import tiny
import torch
from datasets import Dataset

from vlm_grpo import MediaOptions, VLMGRPOTrainer, VLMSFTConfig, VLMSFTTrainer
from vlm_grpo.data import to_sample
from vlm_grpo.encode import encode
from vlm_grpo.errors import ConfigError, EncodingError, MediaError, OverlongError
from vlm_grpo.intake import Intake
from vlm_grpo.models.families import placeholder_ids_by_kind


def row(size: int, text: str = "count") -> dict:
    """A row of one picture; 56 pixels a side are 4 tokens, 112 are 16."""
    return {"prompt": tiny.prompt(text), "images": [tiny.image(size, (size, size))], "answer": text}


def intake(family: str = "qwen2_5_vl", media: dict | None = None, **options) -> Intake:
    model, processor = tiny.build(family)
    placeholders = placeholder_ids_by_kind(model.config, processor)
    return Intake(processor, placeholders, MediaOptions.of(media), **options)


def trained(rows: list[dict], path, media=None, reward=recorder.reward, **options) -> VLMGRPOTrainer:
    model, processor = tiny.build("qwen2_5_vl")
    data = Dataset.from_list(rows)
    trainer = recorder.Recorder(model, reward, recorder.config(path, **options), data, None, processor, media=media)
    trainer.train()
    return trainer


def test_an_overlong_row_is_left_out_whole_and_counted(tmp_path):
    # covers 5: media placeholders are never truncated
    rows = [row(56, "count one"), row(112, "count two"), row(56, "count three"), row(56, "count four")]
    lengths = [len(intake().read(r)[1].input_ids) for r in rows]
    assert lengths[1] == lengths[0] + 12
    seen = []

    def reward(completions, completion_ids, answer, images, **columns):
        seen.extend(answer)
        assert all(image.size == (56, 56) for pictures in images for image in pictures)
        return recorder.reward(completions, completion_ids)

    trainer = trained(rows, tmp_path, reward=reward, max_prompt_length=lengths[0] + 2)
    assert len(seen) == 8 and "count two" not in seen
    assert all(seen[i] == seen[i + 1] for i in range(0, 8, 2)), "the whole group was replaced"
    assert trainer.intake.left_out["too long"] >= 1
    assert trainer.state.log_history[0]["rows/left_out"] >= 1
    assert {len(r.prompt) for batch in trainer.rows for r in batch} <= set(lengths) - {lengths[1]}, "nothing was cut"


def test_an_overlong_row_is_refused_before_the_first_step(tmp_path):
    rows = [row(56)] * 4 + [row(112)] * 4
    with pytest.raises(OverlongError, match="has 27 tokens, media included, and max_prompt_length is 25 — row 5 of"):
        trained(rows, tmp_path, max_prompt_length=25, on_overlong="error")
    with pytest.raises(ConfigError, match='on_overlong="cut" is none of its 2 values'):
        recorder.config(tmp_path, on_overlong="cut")
    with pytest.raises(ConfigError, match="max_prompt_length=0: needs 1 or more"):
        recorder.config(tmp_path, max_prompt_length=0)


def test_when_no_row_can_be_used_the_run_stops(tmp_path):
    with pytest.raises(ConfigError, match="101 rows in turn cannot be used, the last because: The prompt has"):
        trained([row(112)] * 4, tmp_path, max_prompt_length=5)


def test_the_replacement_of_a_row_is_the_same_in_every_run(tmp_path):
    rows = [row(56, f"count {word}") for word in tiny.WORDS[:9]] + [row(112)] * 3
    options = {"max_prompt_length": 24, "max_steps": 2}
    first, second = (trained(rows, tmp_path / name, **options) for name in "ab")
    assert [[r.prompt for r in b] for b in first.rows] == [[r.prompt for r in b] for b in second.rows]


def test_bad_media_stop_a_supervised_run_or_are_left_out(tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    good = tmp_path / "good.png"
    tiny.image().save(good)
    names = [str(tmp_path / "bad.png")] + [str(good)] * 7
    data = Dataset.from_list([{"prompt": tiny.prompt(), "image": n, "completion": "red"} for n in names])
    args = VLMSFTConfig(str(tmp_path / "out"), max_steps=1, report_to="none", disable_tqdm=True)
    for media in (None, {"on_bad": "drop"}):
        model, processor = tiny.build("qwen2_5_vl")
        trainer = VLMSFTTrainer(model, args, data, None, processor, media=media)
        if media is None:
            with pytest.raises(MediaError, match="bad.png"):
                trainer.train()
        else:
            trainer.train()
            assert trainer.intake.left_out == {"bad media": 1}


def test_frames_are_drawn_anew_each_epoch_and_alike_in_each_run(tmp_path):
    # covers Q2
    clip = mediafiles.write_video(tmp_path / "clip.mp4", frames=40, fps=10)
    given = {"prompt": tiny.prompt(images=0, videos=1), "video": str(clip), "frame_cnts": [1, 3]}
    own = intake(media={"min_frames": 2, "max_frames": 12, "dynamic_sample": True}, seed=5)
    counts = [own.read(given, epoch=epoch)[1].media["video_grid_thw"][0, 0].item() for epoch in range(8)]
    assert len(set(counts)) > 2, "grids of two frames each"
    again = intake(media={"min_frames": 2, "max_frames": 12, "dynamic_sample": True}, seed=5)
    assert counts == [again.read(given, epoch=e)[1].media["video_grid_thw"][0, 0].item() for e in range(8)]
    fixed = {own.read(given)[1].media["video_grid_thw"][0, 0].item() for _ in range(2)}
    assert fixed == {2}, "an evaluation takes the fixed rule: 4 frames of 4 seconds"


def test_true_rates_reach_the_positions(tmp_path):
    # covers O2: second_per_grid_ts was missing; without it temporal positions collapse
    for fps, seconds in ((5, 8.0), (20, 2.0)):
        clip = mediafiles.write_video(tmp_path / f"{fps}.mp4", frames=40, fps=fps)
        given = {"prompt": tiny.prompt(images=0, videos=1), "video": str(clip)}
        encoded = intake(media={"min_frames": 4, "max_frames": 4}).read(given)[1]
        per_grid = encoded.media["second_per_grid_ts"]
        assert per_grid.tolist() == pytest.approx([2 * seconds / 4]), "two frames a grid, four frames a clip"


def test_pixel_bounds_of_the_run_and_of_the_row():
    # covers O5
    def tokens(given, **media):
        return intake(media=media).read(given)[1].media["image_grid_thw"].prod(1).tolist()

    plain = row(112)
    assert tokens(plain) == [64] and tokens(plain, max_pixels=56 * 56) == [16]
    assert tokens({**plain, "max_pixels": 56 * 56}) == [16]
    assert tokens(row(56), min_pixels=112 * 112) == [64], "a processor's own limits are widened"
    assert tokens(row(200), max_pixels=10**6) == [196], "also upwards: 200 pixels are 14 patches"
    small = {"type": "image", "image": tiny.image(1, (112, 112)), "max_pixels": 56 * 56}
    large = {"type": "image", "image": tiny.image(2, (112, 112))}
    two = {"prompt": [{"role": "user", "content": [small, large, {"type": "text", "text": "x"}]}]}
    assert tokens(two) == [16, 64], "each part its own"
    for family in ("llava", "gemma3"):  # whose processors have no such limits: the picture itself is resized
        given = to_sample({**plain, "max_pixels": 100})
        assert max(given.media[0].open().size) <= 10
        assert intake(family).encode(given).media


def test_a_sound_longer_than_the_model_hears_is_refused_or_cut():
    long = {"prompt": tiny.prompt(images=0, audios=1), "audio": tiny.audio(0, 3.0)}
    with pytest.raises(MediaError, match=r"sounds for 3.0 s but Qwen2AudioProcessor hears 2.0 s.*max_audio_seconds=2"):
        intake("qwen2_audio").read(long, "row 1")
    assert intake("qwen2_audio", media={"max_audio_seconds": 2}).read(long)[1].media
    assert intake("qwen2_audio").read({**long, "max_audio_seconds": 1.0})[1].media


@pytest.mark.parametrize(
    ("family", "kind"), [("llava", "video"), ("llava", "audio"), ("qwen2_5_vl", "audio"), ("qwen2_audio", "image")]
)
def test_a_kind_that_a_family_cannot_take_is_named(family, kind):
    media = {"image": tiny.image(), "video": tiny.video(), "audio": tiny.audio()}
    given = {"prompt": [{"role": "user", "content": [{"type": kind}]}], kind: media[kind]}
    with pytest.raises(EncodingError, match=rf"Processor cannot take an? {kind} part: .* — row 7\. Remove the part"):
        intake(family).read(given, "row 7")


def test_heard_videos_of_one_row_share_a_rate(tmp_path):
    clips = [
        mediafiles.write_video(tmp_path / f"{fps}.mp4", 40, fps, audio=mediafiles.sine(16_000, 40 / fps))
        for fps in (10, 20)
    ]
    given = {"prompt": tiny.prompt(images=0, videos=2), "videos": [str(clip) for clip in clips]}
    own = intake("qwen2_5_omni_thinker", media={"audio_in_video": True, "max_audio_seconds": 1.5})
    with pytest.raises(EncodingError, match=r"cannot hear videos of different frame rates in one row \(1, 2 frames"):
        own.read(given, "row 1")
    assert own.read({**given, "videos": [str(clips[0])] * 2})[1].options == {"use_audio_in_video": True}


def test_a_template_that_drops_a_kind_is_named():
    own = intake("qwen2_5_vl")
    own.processor.chat_template = own.processor.chat_template.replace("video", "film")
    given = {"prompt": tiny.prompt(images=0, videos=1), "video": tiny.video()}
    with pytest.raises(EncodingError, match="Qwen2_5_VLProcessor renders nothing for a video part — row 2. Use a chat"):
        own.read(given, "row 2")


def test_sound_without_numbers_of_its_own_length_is_never_taken_for_tokens():
    """A prompt with as many tokens as a sound has mel bands or frames: shapes alone could not tell them apart."""
    _, processor = tiny.build("qwen2_audio")
    bands = processor.feature_extractor.feature_size
    frames = processor.feature_extractor.nb_max_frames
    found = set()
    for words in range(0, 260):
        given = {"prompt": tiny.prompt(" ".join(["red"] * words), images=0, audios=1), "audio": tiny.audio(0, 0.2)}
        if words not in (0, 1, 2, 3) and words < bands - 20 or bands + 20 < words < frames - 60:
            continue
        encoded = encode(processor, to_sample(given))
        found.add(len(encoded.input_ids))
        assert set(encoded.media) == {"input_features", "feature_attention_mask"} and not encoded.tokens
        if {bands, frames} <= found:
            break
    assert {bands, frames} <= found


def test_draws_do_not_touch_anybody_elses_random_state(tmp_path):
    clip = mediafiles.write_video(tmp_path / "clip.mp4", frames=20, fps=10)
    before = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist())
    given = {"prompt": tiny.prompt(images=0, videos=1), "video": str(clip)}
    own = intake(media={"dynamic_sample": True})
    state = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist())
    own.read(given, epoch=3)
    after = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist())
    assert state[0] == after[0] and torch.equal(state[1], after[1]) and state[2] == after[2] and before[0] == after[0]


def test_a_limit_of_ones_own_moves_the_other_limit_s_default():
    assert MediaOptions(max_frames=3).min_frames == 3 and MediaOptions(min_frames=20).max_frames == 20
    with pytest.raises(ConfigError, match="min_frames=9 is more than max_frames=8"):
        MediaOptions.of({"min_frames": 9, "max_frames": 8})
    few = to_sample({"prompt": tiny.prompt(images=0, videos=1), "video": "v.mp4", "max_frames": 2}).media[0]
    assert (few.options().min_frames, few.options().max_frames) == (2, 2)
    run = MediaOptions(min_frames=6, max_frames=8, fps=2.0)
    assert (few.options(run).max_frames, few.options(run).min_frames, few.options(run).fps) == (2, 2, 2.0)


def test_a_bad_row_of_an_evaluation_is_replaced_by_one_of_its_own(tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    tiny.image().save(tmp_path / "good.png")
    held_out = [{"prompt": tiny.prompt(), "image": str(tmp_path / f"{n}.png"), "answer": n} for n in ("bad", "good")]
    seen = []

    def reward(completions, completion_ids, answer, **columns):
        seen.extend(answer)
        return recorder.reward(completions, completion_ids)

    model, processor = tiny.build("qwen2_5_vl")
    config = recorder.config(tmp_path, per_device_eval_batch_size=2)
    data = [Dataset.from_list(rows) for rows in ([row(56, "train")] * 4, held_out)]
    trainer = VLMGRPOTrainer(model, reward, config, *data, processor, media={"on_bad": "drop"})
    trainer.evaluate()
    assert set(seen) == {"good"} and trainer.intake.left_out["bad media"] >= 1

    learned = [Dataset.from_list([{**r, "completion": "red"} for r in rows]) for rows in ([row(56)] * 4, held_out)]
    args = VLMSFTConfig(str(tmp_path / "sft"), report_to="none", disable_tqdm=True, per_device_eval_batch_size=1)
    supervised = VLMSFTTrainer(model, args, *learned, processor, media={"on_bad": "drop"})
    read = []
    encode_sample = supervised.intake.encode
    supervised.intake.encode = lambda sample, epoch=None: read.append(sample.media[0].label) or encode_sample(sample)
    assert supervised.evaluate()["eval_loss"] > 0
    assert {name.rpartition("/")[2] for name in read} == {"bad.png", "good.png"}, "no training row in an evaluation"
