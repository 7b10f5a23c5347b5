"""Row formats of the predecessors: what each becomes, how they are told apart, and what is said of a broken row."""

import copy
import json

import datasets
import pyarrow as pa
import pytest
import tiny
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_grpo import load_data
from vlm_grpo.data import FORMATS, as_canonical, canonical, decoded, detect, raw_rows, to_sample, undecoded
from vlm_grpo.errors import ConfigError, DataFormatError, MediaError
from vlm_grpo.options import DataOptions

Q1 = {
    "id": "clip-1",
    "conversations": [
        {"from": "human", "value": "<video>\nWhich actions are shown?"},
        {"from": "gpt", "value": "<answer>(1) open (3) close</answer> and <answer>(9)</answer>"},
    ],
    "video": "a.mp4",
    "meta": {"frame_cnts": [15, 11], "min_frames": 4, "max_frames": 8, "dynamic_sample": True},
}
A7 = {
    "messages": [{"role": "user", "content": "<audio>Transcribe."}, {"role": "assistant", "content": "salam"}],
    "audios": ["a.wav"],
    "language_id": "ug",
}
L7 = {
    "image": "1.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nIs there a dog?"},
        {"from": "gpt", "value": "Yes, there is."},
        {"from": "human", "value": "And a cat?"},
        {"from": "gpt", "value": "No."},
    ],
    "caption_type": 7,
    "length_bonus": 0.5,
}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def said(value: str) -> list[dict]:
    return [{"role": "assistant", "content": value}]


def conversation(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def jsonl(path, *rows) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


# ---- each format ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_a_format_knows_its_example_and_canonical_rows_stay(format_):
    row = copy.deepcopy(format_.example)
    once = canonical(row)
    assert detect(row) is format_ and row == format_.example
    assert canonical(once) == once and detect(once).name == "trl"
    assert canonical(row, format=format_.name) == once
    to_sample(once)
    assert set(row) - set(once) <= {"conversations", "messages"}, "every other column is still there"


def test_an_unsloth_row_is_canonical():  # covers U1
    pictures = [Image.new("RGB", (4, 4)), Image.new("RGB", (9, 5))]
    row = {"prompt": user({"type": "image"}, {"type": "image"}, text("Which is larger?")), "image": pictures}
    assert canonical({**row, "answer": "the second"}) == {**row, "answer": "the second"}
    assert [medium.source for medium in to_sample(canonical(row)).media] == pictures


def test_prompt_and_completion_of_trl():
    row = {"prompt": user(text("2+2?")), "completion": said("<think>so</think><answer>4</answer>")}
    assert canonical(row) == {**row, "answer": "4"}
    assert canonical({"prompt": "2+2?", "completion": "It is 4."})["answer"] == "It is 4."
    assert canonical({**row, "answer": "four"}) == {**row, "answer": "four"}, "its own answer comes first"


def test_conversations_of_a_video_with_its_frames():  # covers Q1
    before = copy.deepcopy(Q1)
    row = canonical(Q1)
    assert before == Q1
    assert row == {
        "prompt": user({"type": "video"}, text("\nWhich actions are shown?")),
        "completion": said(Q1["conversations"][1]["value"]),
        "answer": "(1) open (3) close",
        **{key: Q1[key] for key in ("id", "video", "meta")},
    }
    (medium,) = to_sample(row).media
    assert medium.overrides == Q1["meta"]


def test_the_answer_is_the_first_body_or_the_whole_turn_or_the_rows_own():  # covers Q1
    row = {"conversations": conversation("2+2?", " It is 4. ")}
    assert canonical(row)["answer"] == " It is 4. "
    assert canonical({**row, "solution": "<answer>\nfour\n</answer>"})["answer"] == "four"
    assert canonical({**row, "answer": 4})["answer"] == 4
    unanswered = canonical({"conversations": conversation("2+2?")})
    assert unanswered["answer"] is None and unanswered["completion"] is None


def test_a_conversation_keeps_its_turns_and_media_in_order():
    turns = conversation("<image>\n<image>Same?", "No.", "<audio>And this sound?", "A bell.")
    turns.insert(0, {"from": "system", "value": "Be short."})
    row = canonical({"conversations": turns, "image": ["1.png", "2.png"], "audio": "a.wav", "n": 3})
    slots = [{"type": "image"}, text("\n"), {"type": "image"}, text("Same?")]
    assert row["prompt"] == [
        {"role": "system", "content": [text("Be short.")]},
        *user(*slots),
        {"role": "assistant", "content": [text("No.")]},
        *user({"type": "audio"}, text("And this sound?")),
    ]
    assert (row["completion"], row["answer"], row["n"]) == (said("A bell."), "A bell.", 3)
    assert [medium.label for medium in to_sample(row).media] == ["1.png", "2.png", "a.wav"]
    bare = canonical({"conversations": conversation("Same?"), "images": ["1.png", "2.png"]})
    assert [part["type"] for part in to_sample(bare).prompt[0]["content"]] == ["image", "image", "text"]


def test_a_reward_row_of_llava_rlhf_asks_its_first_turn():  # covers L7
    row = canonical(L7)
    assert row["prompt"] == user({"type": "image"}, text("\nIs there a dog?"))
    assert (row["completion"], row["answer"]) == (said("Yes, there is."), "yes")
    assert (row["caption_type"], row["length_bonus"]) == (7, 0.5)
    assert row["conversations"] == L7["conversations"], "later turns are kept beside"


def test_a_video_that_is_heard_is_one_slot():  # covers O1; R1-Omni's row
    asked = "<video>\n<audio>\nWhich emotion is the most obvious?"
    row = {"video": "1.mp4", "conversations": conversation(asked, "<think>so</think>\n<answer>sad</answer>")}
    read = canonical(row)
    assert read["prompt"] == user({"type": "video"}, text("\nWhich emotion is the most obvious?"))
    assert (read["answer"], read["audio_in_video"]) == ("sad", True)
    with_sound = canonical({**row, "audio": "1.wav"})
    assert [part["type"] for part in with_sound["prompt"][0]["content"]] == ["video", "text", "audio", "text"]
    assert "audio_in_video" not in with_sound
    with pytest.raises(DataFormatError, match="2 <audio> placeholders but"):
        canonical({**row, "conversations": conversation("<video><audio><audio>?")})


def test_messages_with_several_sounds_a_row():  # covers A7; A assumed one sound a sample
    assert canonical(A7) == {
        "prompt": user({"type": "audio"}, text("Transcribe.")),
        "audios": ["a.wav"],
        "language_id": "ug",
        "completion": said("salam"),
        "answer": "salam",
    }
    two = [{"role": "user", "content": "<audio>or<audio>?"}]
    sample = to_sample(canonical({"messages": two, "audios": ["a.wav", "b.wav"]}))
    assert [medium.label for medium in sample.media] == ["a.wav", "b.wav"]
    for audios in (["a.wav"], ["a.wav"] * 3, [], None):
        with pytest.raises(DataFormatError, match=r"x.jsonl row 7: the prompt has 2 <audio> placeholders but .* holds"):
            canonical({"messages": two, "audios": audios}, "x.jsonl row 7")


def test_messages_of_ms_swift():
    media = [{"bytes": b"first", "path": None}, {"bytes": None, "path": "2.png"}]
    row = {"messages": [{"role": "user", "content": "<image><image>Same?", "loss": False}], "images": media}
    sample = to_sample(canonical({**row, "solution": "<answer>no</answer>"}))
    assert [medium.label for medium in sample.media] == ["<5 bytes>", "2.png"]
    assert sample.prompt[0]["loss"] is False and sample.columns["answer"] == "no"
    objects = {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}
    plain = {**row, "messages": [{"role": "user", "content": "<image><image>Box the dog."}], "objects": objects}
    assert canonical(plain)["objects"] == objects
    with pytest.raises(DataFormatError, match='row 1: a turn has <bbox>, which stands for something in .* "objects"'):
        canonical({**plain, "messages": [{"role": "user", "content": "<image><image>Where? <bbox>"}]}, "row 1")


def test_tables_of_llama_factory_by_their_own_description(tmp_path):
    tiny.image(1).save(tmp_path / "1.png")
    turns = [{"who": "H", "says": "<image>Animal?"}, {"who": "M", "says": "A cat."}]
    file = jsonl(tmp_path / "own.jsonl", {"dialogue": turns, "pics": ["1.png"], "sys": "Be short."})
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "H", "assistant_tag": "M"}
    (row,) = load_data(file, columns={"messages": "dialogue", "images": "pics", "system": "sys"}, tags=tags)
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["answer"] == "A cat." and row["images"] == [str(tmp_path / "1.png")]
    alpaca = {"ask": "Add", "more": "2 and 2", "say": "4", "old": [["1+1?", "2"]], "prompt": "unrelated"}
    columns = {"prompt": "ask", "query": "more", "response": "say", "history": "old"}
    row = canonical(alpaca, columns=columns)
    assert [message["content"] for message in row["prompt"]] == [[text("1+1?")], [text("2")], [text("Add\n2 and 2")]]
    assert row["answer"] == "4" and row["completion"] == said("4")


def test_a_mapped_prompt_is_an_instruction_and_a_displaced_column_stays():
    row = canonical({"q": "<image>Name it", "label": "cat", "answer": 3, "pic": "1.png"},
                    columns={"prompt": "q", "answer": "label", "image": "pic"})  # fmt: skip
    assert row["prompt"] == user({"type": "image"}, text("Name it"))
    assert (row["answer"], row["original_answer"], row["image"]) == ("cat", 3, "1.png")


def test_openai_parts():
    content = [
        {"type": "text", "text": "Read <image> aloud"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
        {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}},
        {"type": "audio", "audio_url": "a.wav"},
    ]
    reply = {"role": "assistant", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    row = canonical({"messages": [{"role": "developer", "content": "s"}, *user(*content), reply]})
    sample = to_sample(row)
    assert [medium.label for medium in sample.media] == ["<2 bytes>", "<2 bytes>", "a.wav"]
    assert sample.prompt[0]["role"] == "system" and sample.prompt[1]["content"][0] == text("Read <image> aloud")
    assert row["completion"] == said("hi") and row["answer"] == "hi"


def test_problems_of_easyr1_and_vlm_r1():
    row = {"problem": "<image>Find x.", "answer": "4", "images": ["1.png"]}
    assert canonical(row) == {
        **row, "prompt": user({"type": "image"}, text("Find x.")), "completion": said("4")
    }  # fmt: skip
    row = {"image": ["1.png", "2.png"], "problem": "Compare.", "solution": "<answer>\nleft\n</answer>", "id": 1}
    read = canonical(row)
    assert detect(row).name == "vlm-r1"
    assert (read["answer"], read["completion"], read["id"]) == ("left", said(row["solution"]), 1)
    assert [part["type"] for part in to_sample(read).prompt[0]["content"]] == ["image", "image", "text"]
    assert canonical({"problem": "p", "solution": [1, 2, 3, 4]})["answer"] == [1, 2, 3, 4], "a box is no text"


def test_questions_with_choices():
    row = {
        "id": 183,
        "question_text": "What happened in the video?",
        "multi_choice": ["motorboat", "Yacht consignment", "Sailboat set sail"],
        "answer": 1,
        "audio_path": "HG3.wav",
    }
    read = canonical(row)
    options = "['motorboat', 'Yacht consignment', 'Sailboat set sail']"
    asked = f"What happened in the video? Please choose the answer from the following options: {options}."
    assert read["prompt"] == user(text(asked))
    assert (read["answer"], read["answer_index"], read["id"]) == ("Yacht consignment", 1, 183)
    assert read["audio"] == read["audio_path"] == "HG3.wav" and len(to_sample(read).media) == 1
    mmau = {
        "audio_id": "1.wav",
        "question": "Which?",
        "choices": ["a bell", "a dog"],
        "answer": "a dog",
        "task": "sound",
    }
    assert canonical(mmau)["answer"] == "a dog" and canonical(mmau)["audio"] == "1.wav"
    prepared = canonical({**mmau, "audio": "other.wav"})
    assert prepared["audio"] == "other.wav", "a column of the right name comes first"
    with pytest.raises(DataFormatError, match='row 1: "answer" is 3, but "multi_choice" has 3 items'):
        canonical({**row, "answer": 3}, "row 1")


# ---- what does not fit ------------------------------------------------------------------------------------------

TURN = {"from": "human", "value": "hi"}
BROKEN = {
    "no format": ({"text": "x", "label": 1}, 'it has "text", "label". The nearest is "trl", which needs "prompt"'),
    "nearly": ({"question": "x", "image": "1.png"}, 'nearest is "vqa", which also needs "answer" or "solution"'),
    "misspelt": ({"conversation": [TURN]}, 'Did you mean "conversations" for "conversation"?'),
    "empty": ({"conversations": []}, '"conversations" is empty'),
    "no list": ({"messages": 5}, '"messages" is 5. Give a list of turns'),
    "no turn": ({"conversations": [TURN, "x"]}, "turn 2 of \"conversations\" is 'x'"),
    "no role": ({"conversations": [{"value": "x"}]}, 'turn 1 of "conversations" has "role": None'),
    "unknown role": ({"messages": [{"role": "usr", "content": "x"}]}, "'usr'. Did you mean \"user\"?"),
    "no value": ({"conversations": [{"from": "human"}]}, 'turn 1 of "conversations" has no "value"'),
    "odd value": ({"conversations": [{"from": "human", "value": 5}]}, '"value": 5. Give a text'),
    "two users": ({"conversations": [TURN, TURN]}, 'turns 1 and 2 of "conversations" are both from "human". Join'),
    "two models": ({"conversations": [TURN, *[{"from": "gpt", "value": "x"}] * 2]}, 'turns 2 and 3 .* from "gpt"'),
    "model first": ({"conversations": [{"from": "gpt", "value": "x"}]}, 'begins with a turn from "gpt"'),
    "system only": ({"conversations": [{"from": "system", "value": "x"}]}, "has no turn of the user"),
    "too few media": (
        {"conversations": conversation("<image><image>"), "image": "1.png"},
        r'the prompt has 2 <image> placeholders but "image\(s\)" holds 1. Give one image per placeholder',
    ),
    "wrong kind": ({"conversations": conversation("<video>"), "image": "1.png"}, "1 <video> placeholder .* holds 0"),
    "too many media": ({"problem": "<image>", "images": ["1.png"] * 2}, "1 <image> placeholder but .* holds 2"),
    "media answer": (
        {"messages": [*user(text("draw")), {"role": "assistant", "content": [{"type": "image"}]}]},
        "the assistant's last turn, holds media",
    ),
    "odd part": ({"messages": user({"type": "hologram"})}, "a part of type 'hologram'.*Use one of text, image"),
    "no address": ({"messages": user({"type": "image_url", "image_url": {"detail": "low"}})}, "has no address"),
    "odd question": ({"problem": ["x"], "answer": "1"}, "\"problem\" is \\['x'\\]. Give a text"),
    "odd choices": ({"question": "x", "choices": "ab"}, "\"choices\" is 'ab'. Give a list of texts"),
    "odd history": ({"instruction": "x", "history": [["a"]]}, "\"history\" has \\['a'\\]. Give pairs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_one_sentence_with_its_place(case):
    row, sentence = BROKEN[case]
    with pytest.raises(DataFormatError, match=sentence) as caught:
        canonical(row, "train.jsonl row 17")
    assert str(caught.value).startswith("train.jsonl row 17: ") and "\n" not in str(caught.value)
    with pytest.raises(DataFormatError, match=sentence):
        list(as_canonical([{"prompt": "fine"}, row], "train.jsonl"))
    if case != "no turn":  # a table holds no such mixture
        with pytest.raises(DataFormatError, match=sentence) as caught:
            as_canonical(Dataset.from_list([row]), "train.jsonl")
        assert "train.jsonl" in str(caught.value)


def test_misuse_of_the_options(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", {"problem": "p", "answer": "1"})
    with pytest.raises(ConfigError, match='There is no format "easy-r1". Did you mean "easyr1"?'):
        load_data(file, format="easy-r1")
    with pytest.raises(DataFormatError, match='row 1: the row is no "vqa" row: it lacks "question" or'):
        load_data(file, format="vqa")
    with pytest.raises(DataFormatError, match='row 1: .*option columns names "q" for "prompt", which it lacks'):
        load_data(file, columns={"prompt": "q"}, format="trl")
    with pytest.raises(
        ConfigError, match='columns reads "image" from the column "pic", but no row of .*a.jsonl has it'
    ):
        load_data(file, columns={"image": "pic"})
    with pytest.raises(ConfigError, match='reads "image" from the column "pic", but no row of the dataset has it'):
        load_data(Dataset.from_list([{"problem": "p", "answer": "1"}]), columns={"image": "pic"})
    with pytest.raises(ConfigError, match='unknown name "from_tag". Did you mean "role_tag"?'):
        load_data(file, tags={"from_tag": "H"})
    with pytest.raises(ValueError, match="min_pass_rate=0.9 is more than max_pass_rate=0.1; swap them"):
        DataOptions(min_pass_rate=0.9, max_pass_rate=0.1)


# ---- any JSON ---------------------------------------------------------------------------------------------------

KEYS = ["from", "value", "role", "content", "type", "text", "image", "path", "image_url"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text("<image>/ab1[{", max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
names = sorted({name for format_ in FORMATS for names in format_.needs for name in names})
columns_ = st.sampled_from(
    [*names, "image", "images", "audio", "video", "system", "history", "objects", "meta", "input"]
)


@settings(max_examples=250, derandomize=True, deadline=None)
@given(st.dictionaries(columns_, json_values, max_size=4))
def test_any_row_is_read_or_refused(row):
    before = copy.deepcopy(row)
    try:
        read = canonical(row, "row 1")
        to_sample(read, where="row 1")
    except (DataFormatError, MediaError) as error:
        assert "row 1" in str(error)
    else:
        assert set(row) - set(read) <= {"conversations", "messages"}
    assert repr(row) == repr(before)


texts = st.lists(st.text(max_size=20), min_size=1, max_size=5)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(texts, st.integers(0, 3))
def test_the_words_of_a_conversation_survive(values, images):
    values[0] = "<image>".join([values[0][i :: images + 1] for i in range(images + 1)])
    row = canonical({"conversations": conversation(*values), "images": ["1.png"] * values[0].count("<image>")})
    seen = ["".join(part.get("text", f"<{part['type']}>") for part in message["content"]) for message in row["prompt"]]
    seen += [message["content"] for message in row["completion"] or []]
    assert seen == values


# ---- files, folders, tables, streams ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    for name in "ab":
        tiny.image(ord(name)).save(folder / f"{name}.png")
    return folder


def mixed_rows() -> list[dict]:
    return [
        {"conversations": conversation("<image>\nWhat?", "one"), "image": "a.png", "id": 1},
        {"messages": [{"role": "user", "content": "<image><image>Same?"}], "images": ["a.png", "b.png"], "answer": "2"},
        {"problem": "p", "solution": "<answer>3</answer>"},
        {"prompt": user(text("canonical")), "answer": "4"},
    ]


def test_each_row_of_a_json_file_says_its_own_format(folder):
    file = jsonl(folder / "mixed.jsonl", *mixed_rows())
    data = load_data(file)
    assert data["answer"] == ["one", "2", "3", "4"] and data["id"] == [1, None, None, None]
    assert [len(to_sample(row).media) for row in data] == [1, 2, 0, 0]
    assert "conversations" not in data.column_names and "messages" not in data.column_names
    streamed = load_data(file, streaming=True)
    assert isinstance(streamed, datasets.IterableDataset)
    for given_, row in zip(streamed, data, strict=True):
        a, b = to_sample(given_), to_sample(row)
        assert (a.prompt, a.columns["answer"]) != (None, None) and a.columns["answer"] == b.columns["answer"]
        assert [m.source for m in a.media] == [m.source for m in b.media]
    assert [row["answer"] for row in load_data(file, streaming=True, limit=2)] == ["one", "2"]


def test_tables_of_texts(folder):
    row = {"id": 5, "image": "a.png", "question": "<image>Which?", "answer": "a"}
    Dataset.from_list([row]).to_parquet(folder / "vqa.parquet")
    Dataset.from_list([row]).to_csv(folder / "vqa.csv")
    turns = {"image": "a.png", "conversations": json.dumps(conversation("<image>Which?", "a"))}
    Dataset.from_list([turns]).to_csv(folder / "turns.csv")
    messages = {"image": "a.png", "prompt": json.dumps(user({"type": "image"}, text("Which?"))), "answer": "a"}
    Dataset.from_list([messages]).to_csv(folder / "messages.csv")
    assert to_sample(load_data(str(folder / "messages.csv"))[0]).prompt[0]["content"][1] == text("Which?")
    for name in ("vqa.parquet", "vqa.csv", "turns.csv"):
        for streaming in (False, True):
            (read,) = load_data(str(folder / name), streaming=streaming)
            sample = to_sample(read)
            assert sample.media[0].source == folder / "a.png", (name, streaming)
            assert [part["type"] for part in sample.prompt[0]["content"]] == ["image", "text"]
            assert sample.columns["answer"] == "a"
    assert load_data(str(folder / "vqa.csv"))[0]["question"] == "<image>Which?"


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_that_says_none_is_one(folder, streaming):
    words = ["None", "NA", "null", "n/a", "", "yes"]
    lines = [f"Which?,{word},{number}" for number, word in enumerate(words)]
    (folder / "none.csv").write_text("\n".join(["prompt,answer,width", *lines, "Which?,nan,"]))
    rows = list(load_data(str(folder / "none.csv"), streaming=streaming))
    assert [row["answer"] for row in rows] == ["None", "NA", "null", "n/a", None, "yes", "nan"]
    assert [row["width"] for row in rows][4:] == [4, 5, None], "numbers stay numbers where a cell is empty"


def test_folders(folder, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "ab":
        tiny.image(ord(name)).save(pictures / f"{name}.png")
    jsonl(pictures / "metadata.jsonl", *({"file_name": f"{n}.png", "question": "Which?", "answer": n} for n in "ab"))
    data = load_data(str(pictures))
    assert data["answer"] == ["a", "b"] and isinstance(data.features["image"], datasets.Image)
    for row, name in zip(data, "ab", strict=True):
        assert to_sample(row).media[0].open().getpixel((0, 0)) == tiny.image(ord(name)).getpixel((0, 0))
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, row in enumerate(mixed_rows()[:2]):
        jsonl(shards / f"train-{number}.jsonl", row)
    jsonl(shards / "test.jsonl", {"prompt": "held out"})
    for name in "ab":
        tiny.image(ord(name)).save(shards / f"{name}.png")
    (shards / "README.md").write_text("about")
    data = load_data(str(shards))
    assert data["answer"] == ["one", "2"] and len(load_data(str(shards), "test")) == 1
    assert [number for number, _ in raw_rows(shards)] == [1, 2]
    jsonl(pictures / "rows.jsonl", *mixed_rows())
    (pictures / "metadata.jsonl").unlink()
    assert load_data(str(pictures))["answer"] == ["one", "2", "3", "4"], "rows beside their pictures"
    data.save_to_disk(str(tmp_path / "saved"))
    assert load_data(str(tmp_path / "saved"))["answer"] == ["one", "2"]
    assert [row["answer"] for row in load_data(str(tmp_path / "saved"), streaming=True)] == ["one", "2"]


def test_raw_rows_are_numbered_as_a_user_finds_them(folder):
    file = jsonl(folder / "raw.jsonl", {"a": 1}, "", "{broken", "[1]", {"b": 2})
    rows = dict(raw_rows(file))
    assert list(rows) == [1, 3, 4, 5] and rows[1] == {"a": 1} and rows[5] == {"b": 2}
    assert "raw.jsonl row 3: not valid JSON" in str(rows[3])
    assert "raw.jsonl row 4: the row is a list, not an object" in str(rows[4])
    (folder / "raw.json").write_text(json.dumps([{"a": 1}, 5]))
    rows = dict(raw_rows(folder / "raw.json"))
    assert rows[1] == {"a": 1} and "row 2: the row is a int" in str(rows[2])
    (folder / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert list(raw_rows(folder / "lines.json")) == [(1, {"a": 1}), (2, {"a": 2})], "lines under another name"
    Dataset.from_list([{"image": tiny.image(1), "n": 1}]).to_parquet(folder / "raw.parquet")
    ((number, row),) = raw_rows(folder / "raw.parquet")
    assert number == 1 and row["n"] == 1 and set(row["image"]) == {"bytes", "path"}
    with pytest.raises(DataFormatError, match="does not exist"):
        list(raw_rows(folder / "none.jsonl"))


def table(count: int) -> Dataset:
    rows = [{"image": {"bytes": bytes([i % 256]) * 5000, "path": None}, "problem": f"<image>{i}", "answer": str(i)}
            for i in range(count)]  # fmt: skip
    features = {"image": datasets.Image(decode=False), "problem": datasets.Value("string")}
    return Dataset.from_list(rows, datasets.Features({**features, "answer": datasets.Value("string")}))


def test_media_are_neither_copied_nor_parted_from_their_rows():  # L filtered queries but not their images
    data = table(2000)
    chosen = {
        "all": data,
        "shuffled": data.shuffle(seed=1),
        "filtered": data.filter(lambda answer: int(answer) % 7 == 3, input_columns=["answer"]),
        "repeated": data.select([5, 5, 1999]),
    }
    for name, rows in chosen.items():
        before = pa.total_allocated_bytes()
        read = as_canonical(rows, "rows")
        assert pa.total_allocated_bytes() - before < 2_000_000, f"{name}: of 10 MB of pictures none is copied"
        assert len(read) == len(rows) and read["answer"] == rows["answer"]
        for row in read.select(range(0, len(read), max(1, len(read) // 20))):
            assert row["prompt"] == user({"type": "image", "text": None}, {"type": "text", "text": row["answer"]})
            assert row["image"]["bytes"][:1] == bytes([int(row["answer"]) % 256])
        assert as_canonical(read, "rows") is read


def test_other_names_and_other_shapes_of_a_table():
    rows = [
        {"audio_path": f"{i}.wav", "ask": f"{i}?", "choices": ["a", "b"], "answer": i % 2, "n": i} for i in range(9)
    ]
    halves = datasets.concatenate_datasets([Dataset.from_list(rows[:5]), Dataset.from_list(rows[5:])]).shuffle(seed=0)
    read = as_canonical(datasets.DatasetDict(train=halves), columns={"question": "ask"})["train"]
    assert read["n"] == halves["n"] != sorted(halves["n"])
    for row in read:
        assert (row["audio"], row["question"]) == (f"{row['n']}.wav", f"{row['n']}?")
        assert (row["answer"], row["answer_index"]) == ("ab"[row["n"] % 2], row["n"] % 2)
    tensors = as_canonical(halves.with_format("torch"), columns={"question": "ask"})
    assert tensors.format["type"] == "torch" and tensors[0]["prompt"][0]["role"] == "user"
    made = Dataset.from_list([{"x": 1}]).with_transform(lambda batch: {"question": ["?"] * len(batch["x"])})
    with pytest.raises(DataFormatError, match='rows makes its rows by a transform, and they have no "prompt"'):
        as_canonical(made, "rows")


def without_none(value):
    """Without what a table adds to rows that lack a key."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def test_tables_streams_and_rows_agree():
    examples = [copy.deepcopy(format_.example) for format_ in FORMATS] + [Q1, A7, L7]
    rows = [without_none(canonical(row)) for row in examples]
    for example, row in zip(examples, rows, strict=True):
        table_ = Dataset.from_list([example])
        assert without_none(as_canonical(table_)[0]) == row
        assert without_none(next(iter(as_canonical(table_.to_iterable_dataset())))) == row
    # Each row on its own, though the columns of all are there.
    several = [row for row in examples if "prompt" not in row and "caption_type" not in row]
    several = [row for row in several if not isinstance(row.get("chosen"), list)]  # texts stand in that column already
    everything = dict.fromkeys(name for row in several for name in row)
    mixture = Dataset.from_list([{**everything, **row} for row in several])
    for read, row in zip(as_canonical(mixture), several, strict=True):
        left = {name: value for name, value in read.items() if name not in ("conversations", "messages", "audio")}
        assert without_none(left) == {k: v for k, v in without_none(canonical(row)).items() if k != "audio"}


def test_a_stream_is_read_as_it_comes():
    stream = as_canonical(table(3).to_iterable_dataset(), "rows")
    assert [row["answer"] for row in stream] == ["0", "1", "2"]
    assert [len(to_sample(row).media) for row in stream] == [1, 1, 1]
    broken = Dataset.from_list([{"problem": "ok"}, {"problem": "<image>"}]).to_iterable_dataset()
    with pytest.raises(DataFormatError, match="rows row 2: the prompt has 1 <image> placeholder but"):
        list(as_canonical(broken, "rows"))
    plain = Dataset.from_list([{"prompt": "p", "answer": "1"}])
    assert as_canonical(plain.to_iterable_dataset()).column_names == ["prompt", "answer"]
    parts = as_canonical({"a": plain, "b": [A7]})
    assert parts["a"] is plain and parts["b"][0]["answer"] == "salam" and as_canonical(None) is None


def test_a_table_says_which_row_is_wrong():
    rows = [{"conversations": conversation("<image>?", "a"), "images": ["1.png"] * n} for n in (1, 2)]
    with pytest.raises(DataFormatError, match="rows row 2: the prompt has 1 <image> placeholder but .* holds 2"):
        as_canonical(Dataset.from_list(rows), "rows")


def test_rows_are_chosen_by_their_pass_rate(folder, caplog):
    rows = [{"prompt": f"{i}", "pass_rate": rate} for i, rate in enumerate([0.0, 0.25, 0.5, 1.0, 0.75])]
    file = jsonl(folder / "rated.jsonl", *rows)
    Dataset.from_list(rows).to_parquet(folder / "rated.parquet")
    for name in (file, str(folder / "rated.parquet")):
        data = load_data(name, min_pass_rate=0.25, max_pass_rate=0.75)
        assert data["prompt"] == ["1", "2", "4"], "both bounds included"
        assert "rated" in caplog.text and "2 of 5 rows are left out" in caplog.text
        assert load_data(name, max_pass_rate=0.75, limit=2)["prompt"] == ["0", "1"]
        assert [row["prompt"] for row in load_data(name, streaming=True, min_pass_rate=0.75)] == ["3", "4"]
        with pytest.raises(DataFormatError, match="no row has a pass_rate from 0.8 to 0.9"):
            load_data(name, min_pass_rate=0.8, max_pass_rate=0.9)
    command = "vlm-grpo eval MODEL --data FILE --samples K --save-rows OUT"
    with pytest.raises(DataFormatError, match=f'row 1: the row has no "pass_rate".*{command}'):
        load_data(jsonl(folder / "unrated.jsonl", {"prompt": "p"}), min_pass_rate=0.1)
    with pytest.raises(DataFormatError, match=command):
        load_data(Dataset.from_list([{"prompt": "p"}]), min_pass_rate=0.1)


def test_media_that_no_format_reads_are_said(folder, caplog):
    rows = [{"question": "Which?", "answer": "a", "image_1": "a.png", "n": i} for i in range(2)]
    assert load_data(jsonl(folder / "unread.jsonl", *rows))["answer"] == ["a", "a"]
    assert caplog.text.count('row 1 has no medium that the model sees, though the column "image_1" holds one') == 1
    assert caplog.text.count("no medium") == 1
    caplog.clear()
    assert "image" in load_data(str(folder / "unread.jsonl"), columns={"image": "image_1"}).column_names
    assert not caplog.text


def test_a_stream_of_pictures_stays_decodable(folder):
    rows = [{"prompt": user({"type": "image"}, text("Which?")), "image": tiny.image(3), "answer": "a"}]
    Dataset.from_list(rows).to_parquet(folder / "pictures.parquet")
    stream, pictures = undecoded(load_data(str(folder / "pictures.parquet"), streaming=True))
    (row,) = stream
    assert row["image"]["bytes"] and to_sample(row).media[0].open().size == tiny.image(3).size
    assert isinstance(decoded(row, pictures)["image"], Image.Image), "as rewards see it"


def test_a_config_says_how_rows_are_read(folder):
    columns = {"problem": "ask", "answer": "say"}
    options = DataOptions(train="x", media_root=str(folder), columns=columns, format="easyr1")
    file = jsonl(folder / "own.jsonl", {"ask": "<image>?", "say": "a", "image": "a.png"})
    assert load_data(file, **options.reading())["answer"] == ["a"]


def test_a_forced_format_loses_no_column():
    row = {"prompt": "templated", "conversations": conversation("hi", "ho"), "completion": "x", "answer": "y"}
    read = canonical(row, format="conversations")
    assert (read["original_prompt"], read["original_completion"], read["answer"]) == ("templated", "x", "y")
    read = canonical({**row, "problem": "p"}, format="easyr1")
    assert (read["original_prompt"], read["completion"], read["prompt"]) == ("templated", "x", user(text("p")))


def test_a_tag_that_stays_a_text_is_said(folder, caplog):
    row = {"prompt": [{"role": "user", "content": "<image>Which?"}], "image": "a.png"}
    data = load_data(jsonl(folder / "tags.jsonl", row, row))
    assert to_sample(data[0]).prompt[0]["content"][1] == text("<image>Which?"), "in TRL's format it is text"
    assert caplog.text.count('"<image>" stands in the prompt as text') == 1


def test_turns_that_are_in_no_prompt_stay_where_some_rows_have_none():
    # covers L7
    turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}]
    longer = [*turns, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    rows = [{"conversations": own, "caption_type": 1, "length_bonus": 1.0} for own in (turns, longer)]
    for form in (rows, Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        read = list(as_canonical(form))
        assert read[1]["conversations"] == longer and [row["answer"] for row in read] == ["Yes.", "Yes."]


def test_a_folder_of_files_that_are_no_rows_is_one_sentence(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "b.csv").write_text("one\ntwo\n")
    with pytest.raises(DataFormatError, match="do not form one table|fits no format"):
        load_data(str(tmp_path))
