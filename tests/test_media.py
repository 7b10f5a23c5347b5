"""One picture: upright RGB whatever the file holds, and one sentence for whatever cannot be one."""

import base64
import copy
import io
import os
import pickle
import random
import warnings

import numpy as np
import pytest
import tiny
import torch
from mediafiles import encoded, png_header
from PIL import Image, ImageFile

from vlm_grpo.config import MediaOptions
from vlm_grpo.errors import DataFormatError, MediaError
from vlm_grpo.media import Medium
from vlm_grpo.media.image import fit


def pixels(medium: Medium, **options) -> np.ndarray:
    return np.asarray(medium.open(MediaOptions(**options)))


def picture(source, where: str = "") -> Medium:
    return Medium("image", source, where)


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
    medium = picture(image)
    assert Medium.of(medium) is medium and copy.deepcopy(medium) is medium
    assert np.array_equal(pixels(pickle.loads(pickle.dumps(picture(encoded(image))))), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_photograph_is_turned_upright(kind):
    """Orientation 6: the camera was turned, so the stored rows are columns."""
    stored = Image.new("RGB", (64, 32), "red")
    stored.paste("blue", (32, 0, 64, 32))  # right half
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture(encoded(stored, kind, exif=exif)).open()
    assert upright.size == (32, 64)
    red, blue = upright.getpixel((16, 8)), upright.getpixel((16, 56))
    assert red[0] > 200 > red[2] and blue[2] > 200 > blue[0], "the right half came down"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "RGB"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    image = tiny.image(3).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels(picture(image)), expected)
    if mode not in ("YCbCr",):
        assert np.array_equal(pixels(picture(encoded(image, "TIFF"))), expected)
    assert picture(image).open().mode == "RGB"


def test_transparent_pixels_are_laid_on_white():
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, :4] = (200, 0, 0, 255)
    clear[:, 4:6, 3] = 128  # half of black
    image = Image.fromarray(clear)
    palette = image.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((7, 0))
    for source in (image, encoded(image), encoded(image, "WEBP", lossless=True)):
        row = pixels(picture(source))[0].tolist()
        assert row[0] == [200, 0, 0] and row[4] == [127, 127, 127] and row[7] == [255, 255, 255]
    grey = image.convert("LA")
    assert pixels(picture(grey))[0, 7].tolist() == [255, 255, 255]
    for source in (palette, encoded(palette), encoded(palette, "GIF")):
        assert pixels(picture(source))[0, 7].tolist() == [255, 255, 255]
        assert pixels(picture(source))[0, 0].tolist() == [200, 0, 0]


def test_wide_pixels_are_scaled_not_clipped():
    ramp = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)  # 0..65520
    scan = Image.fromarray(ramp)
    expected = np.rint(ramp / 257).astype(np.uint8)
    for source in (scan, encoded(scan), encoded(scan, "TIFF"), Image.fromarray(ramp.astype(">u2"))):
        assert np.array_equal(pixels(picture(source))[..., 1], expected)
    assert np.array_equal(pixels(picture(Image.fromarray(ramp.astype(np.int32))))[..., 0], np.rint(ramp / 257))
    for values, white in ((np.float32([[0, 0.5, 1]]), 1), (np.float32([[0, 100, 255]]), 255)):
        assert pixels(picture(Image.fromarray(values)))[0, :, 0].tolist() == np.rint(values[0] * 255 / white).tolist()
    assert pixels(picture(Image.fromarray(np.float32([[-1, 0, 1]]))))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(MediaError, match="it holds NaN or infinite pixels"):
        picture(Image.fromarray(np.float32([[np.nan, 1]]))).open()


def test_arrays_and_tensors_are_pictures():
    rgb = np.asarray(tiny.image(2, (20, 12)))  # (12, 20, 3)
    sources = [rgb, rgb.astype(np.float32) / 255, torch.from_numpy(rgb.copy()), rgb.astype(np.uint16) * 257]
    sources += [torch.from_numpy(rgb.copy()).permute(2, 0, 1), np.dstack([rgb, np.full((12, 20), 255, np.uint8)])]
    for source in sources:
        assert np.array_equal(pixels(Medium.of(source)), rgb)
    for grey in (rgb[..., 0], rgb[..., :1], torch.from_numpy(rgb[..., 0].copy())):
        assert np.array_equal(pixels(Medium.of(grey))[..., 2], rgb[..., 0])
    half = torch.from_numpy(rgb.copy()).to(torch.bfloat16) / 255
    assert np.abs(pixels(Medium.of(half)).astype(int) - rgb).max() <= 1
    assert pixels(Medium.of(np.array([[True, False]])))[0, :, 0].tolist() == [255, 0]
    with pytest.raises(MediaError, match="it has 0 pixels"):
        Medium.of(np.zeros((0, 5, 3), np.uint8)).open()


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((100, 50), {}, (100, 50)),
        ((100, 50), {"max_pixels": 5000, "min_pixels": 5000}, (100, 50)),
        ((100, 50), {"max_pixels": 1250}, (50, 25)),
        ((100, 50), {"max_pixels": 1249}, (49, 24)),
        ((50, 100), {"max_pixels": 1}, (1, 1)),
        ((10000, 1), {"max_pixels": 100}, (100, 1)),
        ((1, 10000), {"max_pixels": 7}, (1, 7)),
        ((10, 5), {"min_pixels": 200}, (20, 10)),
        ((10, 5), {"min_pixels": 201}, (21, 11)),
        ((3, 2), {"min_pixels": 1000, "max_pixels": 1000}, (38, 25)),  # 38.7 x 25.8: the upper bound holds
    ],
)
def test_pixel_bounds(size, options, expected):
    # covers O5
    assert fit(*size, MediaOptions(**options)) == expected
    assert (
        Image.new("RGB", size).size == size
        and picture(Image.new("RGB", size)).open(MediaOptions(**options)).size == expected
    )


def test_pixel_bounds_hold_for_all_sizes():
    # covers O5
    chance = random.Random(1)
    for _ in range(3000):
        size = chance.randint(1, 5000), chance.randint(1, 5000)
        least, most = sorted(chance.randint(1, 10**6) for _ in range(2))
        width, height = fit(*size, MediaOptions(min_pixels=least, max_pixels=most))
        assert 0 < width * height <= most
        assert width * height >= least or most < 1.3 * least or min(width, height) < 100, "no such rectangle"
        width, height = fit(*size, MediaOptions(min_pixels=least))
        assert width * height >= least
        if min(size) > 500 and size[0] * size[1] < least:
            assert width / height == pytest.approx(size[0] / size[1], rel=0.01)


def test_the_row_overrides_the_run():
    # covers O5
    medium = Medium.of(Image.new("RGB", (100, 50)), overrides={"max_pixels": 200, "fps": None})
    assert medium.open(MediaOptions(max_pixels=1250)).size == (20, 10)
    assert medium.overrides == {"max_pixels": 200}
    with pytest.raises(DataFormatError, match="max_pixels"):
        Medium.of(Image.new("RGB", (4, 4)), where="row 4", overrides={"max_pixels": 0}).open()


def test_a_photograph_is_reduced_fast_and_well():
    """A JPEG is halved while it is decoded; the picture stays what a full decoding gives, within rounding."""
    x, y = np.meshgrid(np.arange(800), np.arange(600))
    smooth = np.stack([127 + 120 * np.sin(x / 40), 127 + 120 * np.cos(y / 30), (x + y) / 6], -1).astype(np.uint8)
    data = encoded(Image.fromarray(smooth), "JPEG", quality=95)
    reduced = pixels(picture(data), max_pixels=100 * 75).astype(int)
    full = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((100, 75), Image.Resampling.BICUBIC)).astype(
        int
    )
    assert reduced.shape == (75, 100, 3) and np.abs(reduced - full).max() <= 4


def test_what_is_no_picture_is_one_sentence_with_its_row(tmp_path):
    whole = encoded(tiny.image(1))
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    for name, reason in (("text.png", "cannot be read"), ("empty.png", "cannot be read"), ("torn.png", "truncated")):
        with pytest.raises(MediaError, match=reason) as caught:
            picture(tmp_path / name, "train.jsonl row 17").open()
        message = str(caught.value)
        assert str(tmp_path / name) in message and "train.jsonl row 17" in message and "\n" not in message
    with pytest.raises(MediaError, match=r'"/no/such.png" does not exist — row 3. Correct the path'):
        Medium.of("/no/such.png", where="row 3").open()
    with pytest.raises(MediaError, match="cannot be read"):
        picture(tmp_path).open()  # a folder
    for value in (5, None, [], {}, {"bytes": None, "path": None}, np.zeros(2), np.zeros((2, 3, 5)), object()):
        with pytest.raises(MediaError, match="An image must be a path, bytes, a PIL image or an array.* — row 4"):
            Medium.of(value, where="row 4")
    for broken in (b"", b"\x89PNG\r\n\x1a\n", whole[:60]):
        with pytest.raises(MediaError, match="cannot be read .* — row 5"):
            Medium.of({"bytes": broken, "path": "a.png"}, where="row 5").open()


def test_addresses():
    image = tiny.image(1)
    data = base64.b64encode(encoded(image)).decode()
    assert np.array_equal(pixels(Medium.of(f"data:image/png;base64,{data}")), np.asarray(image))
    assert Medium.of("file:///a%20b/c.png").label == "/a b/c.png"
    assert Medium.of("~/a.png").label == os.path.expanduser("~/a.png") and Medium.of("~a.png").label == "~a.png"
    for address in ("http://x.org/a.png", "HTTPS://x.org/a.png", "s3://bucket/a.png"):
        with pytest.raises(MediaError, match=f'"{address}" is a network address, and .* not fetched — row 4. Download'):
            Medium.of(address, root=None, where="row 4")
    with pytest.raises(MediaError, match="is not base64 .* — row 4"):
        Medium.of("data:image/png;base64,%%%", where="row 4")
    with pytest.raises(MediaError, match="The path of an image is empty — row 4"):
        Medium.of("", root=None, where="row 4")


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_no_pixels(size):
    with pytest.raises(MediaError, match="0 pixels"):
        picture(Image.new("RGB", size)).open()
    with pytest.raises(MediaError, match="cannot be read"):
        picture(png_header(*size)).open()


def test_a_lazily_opened_image_is_turned_and_a_turned_one_is_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "a.jpg", exif=exif)
    lazy = Image.open(tmp_path / "a.jpg")
    assert isinstance(lazy, ImageFile.ImageFile) and picture(lazy).open().size == (32, 64)
    assert lazy.size == (64, 32), "the user's object stays as it is"
    by_hand = lazy.rotate(-90, expand=True)  # keeps the orientation tag
    assert picture(by_hand).open().size == (32, 64)


def test_a_decompression_bomb_is_refused(monkeypatch):
    for header in (png_header(20000, 20000), png_header(11000, 11000)):  # Pillow raises; Pillow only warns
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(MediaError, match="decompression bomb"):
                picture(header).open()
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
            with pytest.raises(MediaError, match="truncated"):
                picture(header).open()
            monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(MediaError, match="decompression bomb"):
        picture(encoded(Image.new("RGB", (64, 64)))).open()


def test_permissions_are_named(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(tiny.image(1)))
    path.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)  # nobody: the superuser reads everything
    try:
        with pytest.raises(MediaError, match=r"cannot be read \(Permission denied\)"):
            picture(path).open()
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


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
                picture(data).open()
            except MediaError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 20


def test_labels_are_short():
    assert picture(b"12345").label == "<5 bytes>"
    assert picture(Image.new("RGB", (3, 2))).label == "<image 3x2>"
    assert repr(Medium.of("a/b.png")) == "Medium(image, a/b.png)"
