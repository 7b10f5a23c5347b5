"""Rows with videos, sounds, pictures and text through the command line: a run killed and continued, and bad media."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mediafiles
import numpy as np
import pytest
import tiny
from test_end_to_end import called, jsonl, started

from vlm_grpo.media import Medium

TRAIN = (
    *("train", "--model", "model", "--data", "train.jsonl", "--reward", "reward.py:brief", "--lora.r", "4"),
    *("--lora.vision", "true", "--beta", "0.1", "--seed", "1", "--learning_rate", "1e-3", "--max-steps", "6"),
    *("--per_device_train_batch_size", "8", "--num_generations", "2", "--max_completion_length", "5"),
    *("--save_steps", "2", "--max_frames", "6", "--max_pixels", "4000", "--lr_scheduler_type", "constant"),
)
REWARD = """
def brief(prompts, completions, completion_ids, kind, **columns):
    return [float((sum(ids) + len(name)) % 3) for ids, name in zip(completion_ids, kind)]
"""


def written(folder: Path, rows: list[dict], name: str = "train.jsonl") -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(kind: str, number: int, **columns) -> dict:
    """One row of a kind; ``text`` has no medium."""
    slots = [{"type": kind}] if kind != "text" else []
    return {
        "prompt": [{"role": "user", "content": [*slots, {"type": "text", "text": f"count {number}"}]}],
        "kind": kind,
        **columns,
    }


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that sees and hears, and three rows each of videos, sounds and text."""
    monkeypatch.chdir(tmp_path)
    tiny.save("qwen2_5_omni_thinker", tmp_path / "model", layers=1)
    rows = []
    for i in range(3):
        mediafiles.write_video(tmp_path / f"{i}.mp4", frames=20 + 5 * i, fps=10, size=(64, 48 + 8 * i))
        mediafiles.write_wav(tmp_path / f"{i}.wav", mediafiles.sine(16000, 0.4 + 0.2 * i, 300.0 * (i + 1)))
        rows += [row("video", i, video=f"{i}.mp4"), row("audio", i, audio=f"{i}.wav"), row("text", i)]
    written(tmp_path, rows)
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def without_time(folder: Path) -> list[dict]:
    clocks = ("seconds", "step_time")
    records = jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k.partition("/")[0] not in clocks} for r in records]


@pytest.mark.slow
def test_video_sound_and_text_killed_and_continued(workplace: Path):  # covers O1 A1 Q10 L10
    out, error = called(0, *TRAIN, "--output", "whole")
    assert "6 steps in" in out
    for kind in ("video", "audio"):
        assert f"Flow check: {kind} reaches the loss" in error, error
    cut = workplace / "cut"
    process = started(workplace, *TRAIN, "--output", "cut")
    while process.poll() is None and not (cut / "checkpoint-2" / "manifest.json").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (cut / "result.json").exists()
    _, error = called(0, *TRAIN, "--output", "cut")
    assert "Continuing from" in error

    whole = workplace / "whole"
    assert without_time(cut) == without_time(whole), "the same numbers as if nothing had happened"
    assert (cut / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    name = "adapter_model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    first = without_time(whole)[0]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and first["grad_norm"] > 0
    chat = ("chat", "whole", "--video", "0.mp4", "--audio", "0.wav", "--prompt", "count", "--max-new-tokens", "3")
    assert called(0, *chat)[0].strip(), "the trained model answers about a video and a sound"
    seen = {Path(label).suffix for sample in jsonl(whole / "samples.jsonl") for label in sample["media"]}
    assert seen == {".mp4", ".wav"}


@pytest.mark.slow
def test_shared_groups_with_videos_killed_and_continued_between_two_uses(workplace: Path):  # covers O1 Q10
    """Sharing demanded, media encoded once, a rollout used twice and taken up again in the middle."""
    options = (
        *("--group_sharing", "true", "--num_iterations", "2", "--max-steps", "3", "--save_steps", "1"),
        *("--lora.vision", "false", "--num_generations", "4"),
    )
    called(0, *TRAIN, *options, "--output", "whole")
    cut = workplace / "cut"
    process = started(workplace, *TRAIN, *options, "--output", "cut")
    while process.poll() is None and not (cut / "checkpoint-1" / "manifest.json").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (cut / "result.json").exists()
    _, error = called(0, *TRAIN, *options, "--output", "cut")
    assert "Continuing from" in error

    def same(folder: Path) -> list[dict]:
        """What was encoded before the interruption is encoded again after it; nothing else differs."""
        return [{k: v for k, v in r.items() if k != "group/encodes_saved"} for r in without_time(folder)]

    assert same(cut) == same(workplace / "whole")
    name = "adapter_model.safetensors"
    assert (cut / name).read_bytes() == (workplace / "whole" / name).read_bytes()
    plain = (*options, "--group_sharing", "false", "--output", "plain")
    called(0, *TRAIN, *plain)
    for shared, alone in zip(
        jsonl(workplace / "whole" / "metrics.jsonl"), jsonl(workplace / "plain" / "metrics.jsonl"), strict=True
    ):
        assert shared.get("reward") == alone.get("reward"), "the same samples"
        for figure in ("loss", "kl", "grad_norm"):
            assert shared[figure] == pytest.approx(alone[figure], rel=1e-3, abs=1e-5), figure
        assert shared["group/prompt_tokens_saved"] > 100 and alone["group/prompt_tokens_saved"] == 0
        assert shared["seconds/update"] > 0


def bad_media(folder: Path) -> dict[str, tuple[dict, str]]:
    """Eight kinds: the row, and what is said of it."""
    whole = mediafiles.encoded(tiny.image(1, (200, 200)), "JPEG")
    (folder / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.mp4").touch()
    mediafiles.write_audio(folder / "sound.mp4", mediafiles.sine(16000))
    mediafiles.write_float_wav(folder / "nan.wav", np.full(1000, np.nan, np.float32))
    (folder / "flat.png").write_bytes(mediafiles.png_header(0, 5))
    (folder / "bomb.png").write_bytes(mediafiles.png_header(60_000, 60_000))
    (folder / "text.png").write_text("not a picture")
    return {
        "missing": (row("image", 10, image="gone.png"), '"{}/gone.png" does not exist'),
        "torn": (row("image", 11, image="torn.jpg"), '"{}/torn.jpg" cannot be read'),
        "zero": (row("video", 12, video="zero.mp4"), '"{}/zero.mp4" is empty (0 bytes)'),
        "no frames": (row("video", 13, video="sound.mp4"), '"{}/sound.mp4" has no'),
        "NaN": (row("audio", 14, audio="nan.wav"), '"{}/nan.wav" '),
        "0 pixels": (row("image", 15, image="flat.png"), '"{}/flat.png" '),
        "bomb": (row("image", 16, image="bomb.png"), "3600000000 pixels"),
        "text": (row("image", 17, image="text.png"), '"{}/text.png" cannot be read'),
    }


def test_bad_media_are_listed_before_a_model_is_loaded_or_left_out(workplace: Path):
    bad = bad_media(workplace)
    rows = [*jsonl(workplace / "train.jsonl"), *(given for given, _ in bad.values())]
    written(workplace, rows)
    listed = ("--scan", "full", "--output", "listed")
    _, error = called(2, *TRAIN, *listed, "--model", "there-is-no-model")
    for number, (_, said) in enumerate(bad.values(), 10):
        line = next(line for line in error.splitlines() if f"row {number}:" in line)
        assert said.format(workplace) in line, line
    assert "train.jsonl has 8 rows with bad media" in error and "--on-bad-media drop" in error
    assert not (workplace / "listed").exists()

    out, error = called(0, *TRAIN, "--scan", "full", "--on-bad-media", "drop", "--output", "kept", "--max-steps", "2")
    assert "8 rows with bad media" in error and "They are left out" in error
    assert "Left out: 8 (train.jsonl)" in out
    result = json.loads((workplace / "kept" / "result.json").read_text())
    assert result["left_out"] == {"train.jsonl": 8} and result["steps"] == 2
    (workplace / "torn.jpg").write_bytes(mediafiles.encoded(tiny.image(1), "JPEG"))
    again = ("--scan", "full", "--on-bad-media", "drop", "--output", "kept", "--max-steps", "2")
    _, error = called(2, *TRAIN, *again)
    assert "the rows left out of train.jsonl" in error, "another choice would shift the order of the rows"


def test_what_breaks_later_is_replaced_and_counted(workplace: Path):
    rows = [row("image", i, image=f"{i}.png") for i in range(4)]
    for i in range(4):
        (workplace / f"{i}.png").write_text("no picture") if i == 0 else tiny.image(i).save(workplace / f"{i}.png")
    written(workplace, rows)
    late = ("--scan", "off", "--max-steps", "2", "--output")
    _, error = called(2, *TRAIN, *late, "stopped")
    assert "0.png" in error and "cannot be read" in error and "Traceback" not in error
    out, error = called(0, *TRAIN, *late, "went-on", "--on-bad-media", "drop")
    counted = json.loads((workplace / "went-on" / "result.json").read_text())["left_out"]["bad media"]
    assert counted >= 1 and f"{counted} (bad media)" in out and "Left out: The image" in error
    metrics = jsonl(workplace / "went-on" / "metrics.jsonl")
    assert max(record.get("rows/left_out", 0) for record in metrics) >= 1
    assert all("0.png" not in sample["media"][0] for sample in jsonl(workplace / "went-on" / "samples.jsonl"))
    written(workplace, rows[:1] * 4)
    _, error = called(2, *TRAIN, *late, "nothing", "--on-bad-media", "drop")
    assert "rows in turn cannot be used" in error and "Mend the data" in error


MEMORY = """
import resource, sys
from pathlib import Path
import tiny, recorder
from vlm_grpo import VLMGRPOTrainer, load_data, scan_media
folder, name = Path(sys.argv[1]), sys.argv[2]
rows = load_data(str(folder / name))
assert not scan_media(rows, name).bad
model, processor = tiny.build("llava")
trainer = VLMGRPOTrainer(model, recorder.reward, recorder.config(folder / "out"), rows, None, processor)
trainer.train()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_a_hundred_thousand_paths_fit_into_little_memory(tmp_path: Path):
    tiny.image().save(tmp_path / "picture.png")
    (tmp_path / "pictures").mkdir()
    for i in range(100_000):
        os.symlink(tmp_path / "picture.png", tmp_path / "pictures" / f"{i:06d}.png")
    line = (
        '{{"prompt": [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "count {0}"}}]}}], '
    )
    line += '"image": "pictures/{0:06d}.png", "answer": "{0}"}}\n'
    peaks = []
    for count in (1_000, 100_000):
        with (tmp_path / f"{count}.jsonl").open("w") as file:
            file.writelines(line.format(i) for i in range(count))
        command = [sys.executable, "-c", MEMORY, str(tmp_path), f"{count}.jsonl"]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "VLM_GRPO_CACHE": str(tmp_path / str(count))}
        out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        peaks.append(float(out.splitlines()[-1]))
    print(f"\npeak memory: {peaks[0]:.0f} MiB with 1,000 rows, {peaks[1]:.0f} MiB with 100,000")
    assert peaks[1] - peaks[0] < 300


def test_a_medium_stays_a_path_until_it_is_opened(tmp_path: Path):
    medium = Medium.of("gone.png", root=tmp_path)
    assert medium.source == tmp_path / "gone.png", "nothing was read"
