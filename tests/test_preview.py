"""Small copies of media for pages: as the model gets them, in types that every browser shows."""

import base64
import io
import wave

import numpy as np
import pytest
import tiny
from mediafiles import encoded, number_of, numbered_frame, sine, write_audio, write_video, write_wav
from PIL import Image

from vlm_grpo.config import MediaOptions
from vlm_grpo.errors import MediaError
from vlm_grpo.media import Medium
from vlm_grpo.media.preview import playable, preview_image, preview_sound, preview_video


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_pictures_are_reduced_and_never_enlarged():
    drawing = preview_image(Medium("image", tiny.image(1, (64, 48))))
    assert drawing.mime == "image/png" and drawing.suffix == ".png" and opened(drawing.data).size == (64, 48)
    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8)
    photo = preview_image(Medium("image", Image.fromarray(noise)), max_side=480)
    assert photo.mime == "image/jpeg" and opened(photo.data).size == (480, 360)
    assert preview_image(Medium("image", Image.fromarray(noise)), 480).uri.startswith("data:image/jpeg;base64,")
    clear = encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    assert opened(preview_image(Medium("image", clear)).data).convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_a_video_is_the_frames_that_are_taken_in_their_order(tmp_path):
    clip = Medium("video", write_video(tmp_path / "clip.mp4", 100, 10))
    strip = opened(preview_video(clip, height=48, columns=4, options=MediaOptions(max_frames=6)).data).convert("RGB")
    assert strip.size == (4 * 66 - 2, 2 * 50 - 2)  # six frames of 64x48, four a line, 2 pixels between
    places = [(66 * (number % 4), 50 * (number // 4)) for number in range(6)]
    shown = [number_of(np.asarray(strip.crop((x, y, x + 64, y + 48)))) for x, y in places]
    assert shown == clip.open_video(MediaOptions(max_frames=6)).indices


def test_a_sound_is_what_the_model_hears_as_a_wave_file(tmp_path):
    both = np.stack([sine(8000, 2), np.zeros(16000, np.float32)])
    preview = preview_sound(Medium("audio", write_wav(tmp_path / "both.wav", both, 8000)), max_seconds=1.5)
    assert preview.mime == "audio/wav" and base64.b64decode(preview.uri.partition(",")[2]) == preview.data
    with wave.open(io.BytesIO(preview.data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (16000, 1, 24000)
        samples = np.frombuffer(file.readframes(24000), "<i2") / 32767
    assert np.abs(samples).max() == pytest.approx(0.25, abs=0.01)  # half of half of full scale


def test_only_what_every_browser_plays_is_played(tmp_path):
    mp4 = write_video(tmp_path / "a.mp4", 10, audio=sine(16000, 1))
    assert playable(Medium("video", mp4)) == (mp4.read_bytes(), "video/mp4")
    assert playable(Medium("video", mp4.read_bytes())) is not None
    webm = playable(Medium("video", write_video(tmp_path / "b.webm", 10, codec="libvpx-vp9")))
    assert webm is not None and webm.mime == "video/webm" and webm.suffix == ".webm"
    assert playable(Medium("video", mp4), max_bytes=1000) is None
    assert playable(Medium("video", write_video(tmp_path / "c.avi", 10, codec="mpeg4"))) is None
    assert playable(Medium("video", write_video(tmp_path / "d.mp4", 10, codec="mpeg4"))) is None
    assert playable(Medium("video", write_audio(tmp_path / "e.mp4", sine(16000, 1)))) is None
    assert playable(Medium("video", [numbered_frame(1)])) is None
    (tmp_path / "text.mp4").write_text("no video")
    assert playable(Medium("video", tmp_path / "text.mp4")) is None
    assert playable(Medium("video", tmp_path / "gone.mp4")) is None


def test_what_cannot_be_opened_raises(tmp_path):
    for show, kind in ((preview_image, "image"), (preview_video, "video"), (preview_sound, "audio")):
        with pytest.raises(MediaError, match="does not exist"):
            show(Medium(kind, tmp_path / "gone"))
