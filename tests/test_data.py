"""Rows from files and tables: what comes out, where paths start, and what is said about which row."""

import json

import datasets
import numpy as np
import pytest
import tiny
from datasets import Dataset
from PIL import Image

from vlm_grpo import load_data
from vlm_grpo.data import to_sample
from vlm_grpo.errors import DataFormatError, MediaError

SLOT = {"type": "image"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    for name in ("a", "b"):
        tiny.image(ord(name)).save(folder / "pictures" / f"{name}.png")
    return folder


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def jsonl(path, *lines) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return str(path)


def opened(dataset, index=0) -> list:
    return [medium.open().getpixel((0, 0)) for medium in to_sample(dataset[index]).media]


A, B = (tiny.image(ord(name)).getpixel((0, 0)) for name in "ab")


# ---- files ------------------------------------------------------------------------------------------------------


def test_paths_start_at_the_files_folder(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    row = {"prompt": user(SLOT, text("hi")), "image": "pictures/a.png", "answer": "x"}
    both = {"prompt": user(SLOT, SLOT, text("hi")), "images": ["pictures/a.png", "pictures/b.png"], "answer": "y"}
    files = [jsonl(folder / "rows.jsonl", row, both)]
    (folder / "rows.json").write_text(json.dumps([row, both]))
    Dataset.from_list([both]).to_parquet(folder / "several.parquet")
    table = [{"prompt": "<|image_pad|>hi", "image": "pictures/a.png", "answer": "x"}]
    Dataset.from_list(table).to_parquet(folder / "one.parquet")
    Dataset.from_list(table).to_csv(folder / "one.csv")
    for file in [*files, str(folder / "rows.json")]:
        dataset = load_data(file)
        assert dataset["answer"] == ["x", "y"]
        assert dataset.column_names == ["prompt", "image", "answer", "images"], "as the rows name them"
        assert opened(dataset) == [A] and opened(dataset, 1) == [A, B]
    assert opened(load_data(str(folder / "several.parquet"))) == [A, B]
    for name in ("one.parquet", "one.csv"):
        dataset = load_data(str(folder / name))
        assert opened(dataset) == [A] and dataset[0]["prompt"] == "<|image_pad|>hi"


def test_one_canonical_form(folder):
    """String and list contents, slots and own images, columns that a row lacks: one table."""
    file = jsonl(
        folder / "mixed.jsonl",
        {"prompt": [{"role": "system", "content": "be short"}, {"role": "user", "content": "plain"}], "answer": "1"},
        {"prompt": user({"type": "image", "image": "pictures/b.png"}, SLOT, text("two")), "image": "pictures/a.png"},
        {"prompt": [{"role": "user", "content": "no slot"}], "images": ["pictures/a.png"], "extra": {"deep": [1]}},
    )
    dataset = load_data(file)
    assert [opened(dataset, i) for i in range(3)] == [[], [B, A], [A]]
    assert dataset["answer"] == ["1", None, None] and dataset["extra"] == [None, None, {"deep": [1]}]
    prompts = [to_sample(row).prompt for row in dataset]
    assert prompts[0][0] == {"role": "system", "content": [text("be short")]}
    assert [part["type"] for part in prompts[1][0]["content"]] == ["image", "image", "text"]
    assert [part["type"] for part in prompts[2][0]["content"]] == ["image", "text"], "media before the text"


def test_byte_order_mark_blank_lines_and_strange_separators(folder):
    first, second = {"prompt": "a", "answer": "line\u2028separator\x85"}, {"prompt": "b", "answer": "2"}
    path = folder / "bom.jsonl"
    lines = ["\ufeff" + json.dumps(first, ensure_ascii=False), "", "   ", json.dumps(second), ""]
    path.write_bytes("\r\n".join(lines).encode())
    assert load_data(str(path))["answer"] == ["line\u2028separator\x85", "2"]
    with pytest.raises(DataFormatError, match="bom.jsonl row 4: not valid JSON"):
        path.write_bytes("\r\n".join([*lines[:3], "{broken"]).encode())
        load_data(str(path))


def test_the_limit_reads_no_further(folder):
    file = jsonl(folder / "long.jsonl", {"prompt": "a"}, {"prompt": "b"}, "{broken")
    assert load_data(file, limit=2)["prompt"] == ["a", "b"]
    Dataset.from_list([{"prompt": str(i)} for i in range(9)]).to_parquet(folder / "nine.parquet")
    assert load_data(str(folder / "nine.parquet"), limit=4)["prompt"] == list("0123")


def test_embedded_pictures_and_saved_datasets(folder, monkeypatch):
    picture = tiny.image(1)
    rows = Dataset.from_list([{"prompt": user(SLOT, text("hi")), "image": picture, "images": None}] * 2)
    rows = rows.remove_columns("images")
    rows.to_parquet(folder / "embedded.parquet")
    rows.save_to_disk(str(folder / "disk"))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(folder / "dict"))
    listed = Dataset.from_list([{"prompt": user(SLOT, text("hi")), "images": [picture]}])
    listed.cast_column("images", datasets.List(datasets.Image())).to_parquet(folder / "listed.parquet")
    decoded = []
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args, **kwargs: decoded.append(1))
    for name, split in (
        ("embedded.parquet", "train"),
        ("listed.parquet", "train"),
        ("disk", "train"),
        ("dict", "test"),
    ):
        dataset = load_data(str(folder / name), split)
        assert len(dataset) >= 1 and not decoded, f"{name}: checking the rows decodes nothing"
    monkeypatch.undo()
    for name, split in (("embedded.parquet", "train"), ("listed.parquet", "train"), ("dict", "test")):
        (medium,) = to_sample(load_data(str(folder / name), split)[0]).media
        assert np.array_equal(np.asarray(medium.open()), np.asarray(picture)), name
    with pytest.raises(DataFormatError, match='has no split "dev". It has test'):
        load_data(str(folder / "dict"), "dev")


BROKEN = {
    "no prompt": ([{"question": "x"}], 'row 1: the row fits no format: it has "question". The nearest is "vqa"'),
    "empty prompt": ([{"prompt": "ok"}, {"prompt": []}], 'row 2: the row has no "prompt"'),
    "a number": ([{"prompt": 5}], 'row 1: "prompt" is 5'),
    "one message": ([{"prompt": {"role": "user", "content": "x"}}], "row 1: \"prompt\" is {'role'"),
    "no role": ([{"prompt": [{"content": "x"}]}], 'row 1: a message of "prompt" has no "role"'),
    "content number": ([{"prompt": [{"role": "user", "content": 5}]}], 'row 1: the "content" of a message is 5'),
    "content mapping": ([{"prompt": [{"role": "user", "content": {"a": 1}}]}], 'the "content" of a message is'),
    "unknown part": (
        [{"prompt": user({"type": "hologram", "hologram": "v.holo"})}],
        "a part of type 'hologram'.*Use one of text",
    ),
    "part without type": ([{"prompt": user({"text": "x"})}], "a part of type None"),
    "text without text": ([{"prompt": user({"type": "text"})}], 'a text part has no "text"'),
    "a list as type": ([{"prompt": user({"type": ["image"]})}], "a part of type .'image'."),
    "more slots": ([{"prompt": user(SLOT, SLOT), "image": "pictures/a.png"}], "2 image slots but .* holds 1"),
    "more images": ([{"prompt": user(SLOT), "images": ["pictures/a.png"] * 2}], "1 image slot but .* holds 2"),
    "two columns": ([{"prompt": "x", "image": "a", "images": ["a"]}], 'both "image" and "images"'),
    "no user": ([{"prompt": [{"role": "system", "content": "x"}], "image": "pictures/a.png"}], "no user message"),
    "mixed types": ([{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "x"}], '"answer" mixes int and str'),
    "mixed prompts": ([{"prompt": "a"}, {"prompt": user(text("b"))}], '"prompt" mixes list and str'),
    "mixed inside": ([{"prompt": "a", "n": [1]}, {"prompt": "b", "n": ["x"]}], "the rows do not fit one table"),
    "not an object": (["[1, 2]"], "row 1: the row is a list"),
    "nothing": ([""], "has no rows"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_named(case, folder, tmp_path):
    lines, sentence = BROKEN[case]
    file = jsonl(folder / f"{case}.jsonl", *lines)
    with pytest.raises(DataFormatError, match=sentence) as caught:
        load_data(file)
    assert str(caught.value).startswith(file) and "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_pictures_that_are_missing_or_no_pictures(folder):
    rows = [{"prompt": user(SLOT), "image": "pictures/a.png"}, {"prompt": user(SLOT), "image": "pictures/none.png"}]
    file = jsonl(folder / "missing.jsonl", *rows)
    with pytest.raises(MediaError, match=r'missing.jsonl row 2: the image ".*pictures/none.png" does not exist'):
        load_data(file)
    Dataset.from_list(rows).to_parquet(folder / "missing.parquet")
    with pytest.raises(MediaError, match="missing.parquet row 2: the image"):
        load_data(str(folder / "missing.parquet"))
    file = jsonl(folder / "number.jsonl", {"prompt": user(SLOT), "image": 5})
    with pytest.raises(MediaError, match="of type int — .*number.jsonl row 1"):
        load_data(file)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("latin.jsonl", '{"prompt": "é"}'.encode("latin-1"), "is not UTF-8 text"),
        ("deep.json", b"[" * 100_000, "not valid JSON"),
        ("object.json", b'{"prompt": "x"}', "holds one dict, not a list"),
        ("junk.parquet", b"junk", "cannot be read as parquet"),
        ("empty.csv", b"", "cannot be read as csv"),
        ("torn.csv", b'prompt,answer\n"a,1\n', "cannot be read as csv"),
        ("latin.csv", "prompt\né".encode("latin-1"), "cannot be read as csv"),
    ],
)
def test_a_broken_file_is_one_sentence(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFormatError, match=sentence) as caught:
        load_data(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.csv", "none.parquet", "nobody/nothing", "empty"])
def test_what_is_not_there_is_said(name, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.json").mkdir()
    where = name if "/" in name else str(tmp_path / name)
    with pytest.raises(DataFormatError, match="does not exist|cannot be loaded") as caught:
        load_data(where)
    assert where in str(caught.value) and "\n" not in str(caught.value)


# ---- one row ----------------------------------------------------------------------------------------------------


def test_a_row_is_read_and_not_changed():
    picture = Image.new("RGB", (4, 4))
    row = {
        "prompt": [
            {"role": "system", "content": "s", "name": None},
            {"role": "user", "content": [SLOT, text("first"), {"type": "image", "image": picture, "text": None}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            {"role": "tool", "name": "f", "content": "seen"},
        ],
        "image": b"bytes",
        "answer": [1],
    }
    before = repr(row)
    sample = to_sample(row)
    assert repr(row) == before and sample.columns == {"answer": [1]}
    assert [medium.source for medium in sample.media] == [b"bytes", picture]
    assert sample.prompt[0] == {"role": "system", "content": [text("s")]}, "Arrow's None is no key"
    assert sample.prompt[2]["content"] == [] and sample.prompt[2]["tool_calls"]
    assert [part.get("image") for part in sample.prompt[1]["content"]] == [sample.media[0], None, sample.media[1]]


def test_a_templated_prompt_keeps_its_media_beside_it(tmp_path):
    sample = to_sample({"prompt": "<image>hi", "images": ["a.png", b"x"]}, root=tmp_path)
    assert sample.prompt == "<image>hi"
    assert [medium.source for medium in sample.media] == [tmp_path / "a.png", b"x"]
    assert to_sample({"prompt": "hi", "images": []}).media == to_sample({"prompt": "hi", "image": None}).media == []
