"""One picture: upright RGB whatever the file holds, and one sentence for whatever cannot be one."""

import copy
import io
import pickle
import random
import warnings

import numpy as np
import pytest
import tiny
from PIL import Image

from vlm_grpo.errors import MediaError
from vlm_grpo.media import Medium


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(medium: Medium) -> np.ndarray:
    return np.asarray(medium.open())


def test_path_bytes_and_image_are_the_same_picture(tmp_path, monkeypatch):
    image = tiny.image(1, (84, 56))
    image.save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    sources = [image, encoded(image), bytearray(encoded(image)), tmp_path / "a.png", str(tmp_path / "a.png"), "a.png"]
    sources += [{"bytes": encoded(image), "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}]
    for source in sources:
        assert np.array_equal(pixels(Medium.of(source)), np.asarray(image))
    assert np.array_equal(pixels(Medium.of("a.png", root=tmp_path)), np.asarray(image))
    absolute = Medium.of(str(tmp_path / "a.png"), root=tmp_path / "elsewhere")
    assert np.array_equal(pixels(absolute), np.asarray(image)), "a root is for relative paths"
    medium = Medium(image)
    assert Medium.of(medium) is medium and copy.deepcopy(medium) is medium
    assert np.array_equal(pixels(pickle.loads(pickle.dumps(Medium(encoded(image))))), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_photograph_is_turned_upright(kind):
    """Orientation 6: the camera was turned, so the stored rows are columns."""
    stored = Image.new("RGB", (64, 32), "red")
    stored.paste("blue", (32, 0, 64, 32))  # right half
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Medium(encoded(stored, kind, exif=exif)).open()
    assert upright.size == (32, 64)
    red, blue = upright.getpixel((16, 8)), upright.getpixel((16, 56))
    assert red[0] > 200 > red[2] and blue[2] > 200 > blue[0], "the right half came down"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "RGB"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    image = tiny.image(3).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels(Medium(image)), expected)
    if mode not in ("YCbCr",):
        assert np.array_equal(pixels(Medium(encoded(image, "TIFF"))), expected)
    assert Medium(image).open().mode == "RGB"


def test_wide_pixels_are_refused_rather_than_clipped_to_white():
    scan = Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16))
    for source in (scan, encoded(scan), Image.fromarray(np.ones((4, 4), np.float32))):
        with pytest.raises(MediaError, match="wider than 8 bits"):
            Medium(source).open()


def test_what_is_no_picture_is_one_sentence_with_its_row(tmp_path):
    whole = encoded(tiny.image(1))
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    for name, reason in (("text.png", "cannot be read"), ("empty.png", "cannot be read"), ("torn.png", "truncated")):
        with pytest.raises(MediaError, match=reason) as caught:
            Medium(tmp_path / name, "train.jsonl row 17").open()
        message = str(caught.value)
        assert str(tmp_path / name) in message and "train.jsonl row 17" in message and "\n" not in message
    with pytest.raises(MediaError, match=r'"/no/such.png" does not exist — row 3. Correct the path'):
        Medium.of("/no/such.png", where="row 3").open()
    with pytest.raises(MediaError, match="cannot be read"):
        Medium(tmp_path).open()  # a folder
    for value in (5, None, [], {}, {"bytes": None, "path": None}, np.zeros((2, 2))):
        with pytest.raises(MediaError, match="must be a path, bytes or a PIL image.* — row 4"):
            Medium.of(value, where="row 4")


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(MediaError, match="decompression bomb"):
        Medium(encoded(Image.new("RGB", (64, 64)))).open()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_no_damage_raises_anything_else(kind):
    whole = encoded(tiny.image(3, (40, 40)), kind)
    chance = random.Random(0)
    damaged = [whole[:length] for length in range(0, len(whole), max(1, len(whole) // 60))]
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(3):
            data[chance.randrange(len(data))] = chance.randrange(256)
        damaged.append(bytes(data))
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in damaged:
            try:
                Medium(data).open()
            except MediaError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 20


def test_labels_are_short():
    assert Medium(b"12345").label == "<5 bytes>"
    assert Medium(Image.new("RGB", (3, 2))).label == "<image 3x2>"
    assert repr(Medium.of("a/b.png")) == "Medium(a/b.png)"
