"""Image, Video and Audio columns of `datasets`: decoded or not, in a table or streamed, they stay lazy and arrive."""

from pathlib import Path

import datasets
import mediafiles
import pytest
import recorder
import tiny
from datasets import Dataset
from PIL import Image

from vlm_grpo.data import decoded, load_data, undecoded
from vlm_grpo.errors import MediaError

FEATURES = {"image": datasets.Image, "video": datasets.Video, "audio": datasets.Audio}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, list[str]]:
    """Four files of each kind."""
    out: dict[str, list[str]] = {kind: [] for kind in FEATURES}
    for i in range(4):
        tiny.image(i).save(tmp_path / f"{i}.png")
        mediafiles.write_video(tmp_path / f"{i}.mp4", frames=10 + i, fps=5, size=(56, 56))
        mediafiles.write_wav(tmp_path / f"{i}.wav", tiny.audio(i, 0.3 + 0.1 * i))
        for kind, suffix in (("image", "png"), ("video", "mp4"), ("audio", "wav")):
            out[kind].append(str(tmp_path / f"{i}.{suffix}"))
    return out


def table(files: dict[str, list[str]], kind: str, decode: bool, listed: bool = False, packed: bool = False) -> Dataset:
    """Rows whose media column has the library's own feature; ``packed`` holds the bytes of the files."""
    cells: list = [{"bytes": Path(name).read_bytes(), "path": None} for name in files[kind]] if packed else files[kind]
    column = f"{kind}s" if listed else kind
    prompts = [tiny.prompt(f"count {i}", **{"images": 0, f"{kind}s": 1}) for i in range(4)]
    data = Dataset.from_dict({"prompt": prompts, column: [[cell] for cell in cells] if listed else cells})
    feature = FEATURES[kind](decode=decode)
    return data.cast_column(column, datasets.List(feature) if listed else feature)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("form", ["one", "listed", "packed", "streamed"])
def test_a_column_of_the_library_reaches_the_loss(files, kind, form, decode, tmp_path):
    # covers O1 A1: without torchcodec, which the library itself needs for sound and video
    model, processor = tiny.build("qwen2_5_omni_thinker", layers=1)
    data: object = table(files, kind, decode, form == "listed", form == "packed")
    if form == "streamed":
        data = data.to_iterable_dataset()  # type: ignore[attr-defined]
    seen = []

    def reward(completions, completion_ids, **columns):
        name = f"{kind}s" if form == "listed" else kind
        seen.extend(columns[name])
        return recorder.reward(completions, completion_ids)

    trainer = recorder.Recorder(model, reward, recorder.config(tmp_path / "out"), data, None, processor)
    trainer.train()
    senses = {"audio" if kind == "audio" else "vision"}
    assert all(set(row.encoding.senses) == senses for row in trainer.seen_rows) and len(seen) == 8
    cells = [cell for value in seen for cell in (value if isinstance(value, list) else [value])]
    if kind == "image" and decode:
        assert all(isinstance(cell, Image.Image) for cell in cells), "rewards get what the library would give"
    else:
        assert all(set(cell) == {"bytes", "path"} for cell in cells)


def test_a_broken_picture_of_a_column_is_ours_to_report(files, tmp_path):
    Path(files["image"][2]).write_text("no picture")
    data, pictures = undecoded(table(files, "image", True))
    assert [set(row["image"]) for row in data] == [{"bytes", "path"}] * 4, "reading a row decodes nothing"
    assert isinstance(decoded(data[0], pictures)["image"], Image.Image)
    model, processor = tiny.build("qwen2_5_vl")
    for media in (None, {"on_bad": "drop"}):
        args = recorder.config(tmp_path / "out")
        trainer = recorder.Recorder(
            model, recorder.reward, args, table(files, "image", True), None, processor, media=media
        )
        if media is None:
            with pytest.raises(MediaError, match=r"2\.png"):
                trainer.train()
        else:
            trainer.train()
            assert trainer.intake.left_out["bad media"] >= 1 and len(trainer.rows) == 2


def test_a_dataset_with_a_transform_is_left_alone(files):
    data = table(files, "image", True).with_transform(lambda rows: {"prompt": rows["prompt"]})
    assert undecoded(data) == (data, {})
    assert undecoded(None) == (None, {})


def test_a_broken_picture_that_only_a_reward_sees_is_named(tmp_path):
    row = {"prompt": "p", "mask": [{"bytes": b"broken", "path": None}]}
    table, pictures = undecoded(Dataset.from_list([row]).cast_column("mask", datasets.List(datasets.Image())))
    with pytest.raises(MediaError, match="The image .* cannot be read .it is no picture that Pillow knows. — row 1."):
        decoded(table[0], pictures, "row 1")


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_of_another_projects_rows_are_opened_for_rewards(files, streaming, tmp_path):
    features = {"q": datasets.Value("string"), "a": datasets.Value("string"), "picture": datasets.Image()}
    rows = [{"q": f"<image>{n}", "a": str(n), "picture": file} for n, file in enumerate(files["image"])]
    Dataset.from_list(rows, datasets.Features(features)).to_parquet(tmp_path / "rows.parquet")
    ours = {"problem": "q", "answer": "a", "image": "picture"}
    table, pictures = undecoded(load_data(tmp_path / "rows.parquet", columns=ours, streaming=streaming))
    shown = [decoded(dict(row), pictures) for row in table]
    for file, row in zip(files["image"], shown, strict=True):
        assert isinstance(row["image"], Image.Image) and row["image"].tobytes() == Image.open(file).tobytes()
    assert [row["answer"] for row in shown] == ["0", "1", "2", "3"]
