"""Pairs of answers out of every shape that files give them in, each beside its own prompt and media."""

import json
from pathlib import Path

import pytest
import tiny
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from mediafiles import sine, write_wav
from PIL import Image

from vlm_grpo import load_data
from vlm_grpo.data import to_sample
from vlm_grpo.data.pairs import as_pairs
from vlm_grpo.errors import DataFormatError

ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit?"}]}]
PAIR = {"prompt": ASKED, "image": "7.png", "chosen": "seven", "rejected": "six"}


def l1(preference=1, *turns, **columns) -> dict:
    values = turns or ("<image>\nWhich digit?",)
    return {
        "image": "7.png",
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)],
        "output_1": {"from": "llava", "value": "A six."},
        "output_2": {"from": "llava", "value": "A seven."},
        "preference": preference,
        **columns,
    }


def written(folder: Path, *rows: dict) -> str:
    for name in ("7.png", "8.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "pairs.json").write_text(json.dumps(list(rows)))
    return str(folder / "pairs.json")


def pairs(folder: Path, *rows: dict):
    return as_pairs(load_data(written(folder, *rows)), "pairs.json")


def texts(row: dict) -> list[tuple[str, str]]:
    sample = to_sample(row)
    return [(m["role"], "".join(p.get("text", f"[{p['type']}]") for p in m["content"])) for m in sample.prompt]


# ---- the shapes -------------------------------------------------------------------------------------------------


def test_llava_human_preference(tmp_path):  # covers L1
    first, second = pairs(tmp_path, l1(1, hallucination=True), l1(2, id="b"))
    assert (first["chosen"], first["rejected"]) == ("A six.", "A seven.")
    assert (second["chosen"], second["rejected"]) == ("A seven.", "A six.")
    assert texts(first) == [("user", "[image]\nWhich digit?")]
    assert (first["hallucination"], first["preference"], second["id"], second["preference"]) == (True, 1, "b", 2)
    assert not {"output_1", "output_2", "conversations"} & set(first)
    (medium,) = to_sample(first).media
    assert medium.source == (tmp_path / "7.png").resolve()


def test_the_last_turn_is_the_one_judged(tmp_path):  # covers L1
    asked = ("<image>\nHello.", "Hi.", "Which digit?")
    (open_end,) = pairs(tmp_path, l1(2, *asked))
    (replaced,) = pairs(tmp_path, l1(2, *asked, "An eight."))
    before = [("user", "[image]\nHello."), ("assistant", "Hi."), ("user", "Which digit?")]
    assert texts(open_end) == texts(replaced) == before
    assert open_end["chosen"] == replaced["chosen"] == "A seven."
    assert replaced["answer"] == "An eight.", "a column like any other"


def test_outputs_may_be_texts_and_media_sounds_or_clips(tmp_path):  # covers L1
    plain = {**l1(2, "<audio>\nWhat is heard?"), "output_1": "a dog", "output_2": "a cat", "image": None}
    write_wav(tmp_path / "a.wav", sine(16000, 0.1))
    (row,) = pairs(tmp_path, {**plain, "audio": "a.wav"})
    assert (row["chosen"], row["rejected"]) == ("a cat", "a dog")
    assert [medium.kind for medium in to_sample(row).media] == ["audio"]


def said(text) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "answers",
    [
        ("seven", "six"),
        (said("seven"), said("six")),
        (
            said([{"type": "text", "text": "sev"}, {"type": "text", "text": "en"}]),
            said([{"type": "text", "text": "six"}]),
        ),
        ({"from": "gpt", "value": "seven"}, {"from": "gpt", "value": "six"}),
        ([*ASKED, *said([{"type": "text", "text": "seven"}])], [*ASKED, *said([{"type": "text", "text": "six"}])]),
    ],
    ids=["texts", "messages", "parts", "LLaMA-Factory", "whole conversations"],
)
@pytest.mark.parametrize("through", ["json", "table", "stream", "rows"])
def test_an_explicit_prompt(tmp_path, answers, through):
    row = {**PAIR, "chosen": answers[0], "rejected": answers[1], "id": 3}
    if through == "json":
        (read,) = pairs(tmp_path, row)
    else:
        data = [row] if through == "rows" else Dataset.from_list([row])
        (read,) = as_pairs(data.to_iterable_dataset() if through == "stream" else data)
    assert (read["chosen"], read["rejected"], read["id"]) == ("seven", "six", 3)
    assert texts(read) == [("user", "[image]Which digit?")]


def conversation(answer: str, question: str = "<image>Which digit?") -> list[dict]:
    return [{"role": "user", "content": question}, *said(answer)]


@pytest.mark.parametrize("through", ["json", "table", "stream"])
@pytest.mark.parametrize("more", [{}, {"prompt": "Which digit?"}], ids=["implicit", "and given as a text"])
def test_an_implicit_prompt(tmp_path, through, more):
    row = {"image": "7.png", "chosen": conversation("seven"), "rejected": conversation("six"), **more}
    table = Dataset.from_list([row])
    if through == "json":
        (read,) = pairs(tmp_path, row)
    else:
        (read,) = as_pairs(table if through == "table" else table.to_iterable_dataset())
    assert texts(read) == [("user", "[image]Which digit?")]
    assert (read["chosen"], read["rejected"]) == ("seven", "six")
    assert len(to_sample(read).media) == 1


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_rlaif_v(tmp_path, suffix):
    rows = [
        {"idx": i, "image": f"{7 + i}.png", "question": f"What is {i}?", "chosen": "a", "rejected": "b"} for i in (0, 1)
    ]
    path = written(tmp_path, *rows)
    if suffix == "parquet":
        path = str(tmp_path / "pairs.parquet")
        Dataset.from_list(rows).to_parquet(path)
    read = as_pairs(load_data(path))
    assert [texts(row) for row in read] == [[("user", f"[image]What is {i}?")] for i in (0, 1)]
    assert [(row["chosen"], row["rejected"], row["idx"]) for row in read] == [("a", "b", 0), ("a", "b", 1)]
    assert [to_sample(row).media[0].source.name for row in read] == ["7.png", "8.png"]


def test_a_file_may_mix_the_shapes(tmp_path):
    implicit = {"image": "7.png", "chosen": conversation("seven"), "rejected": conversation("six")}
    rlaif = {"image": "8.png", "question": "Which digit?", "chosen": "eight", "rejected": "six"}
    read = pairs(tmp_path, l1(2), implicit, rlaif, PAIR)
    assert [row["chosen"] for row in read] == ["A seven.", "seven", "eight", "seven"]
    assert {texts(row)[-1][1].replace("\n", "") for row in read} == {"[image]Which digit?"}


def test_an_answer_that_looks_like_a_list_is_a_text():
    (read,) = as_pairs(Dataset.from_list([{**PAIR, "chosen": "[20, 40]", "rejected": '[{"box": [1, 2]}]'}]))
    assert (read["chosen"], read["rejected"]) == ("[20, 40]", '[{"box": [1, 2]}]')


def test_pairs_stay_pairs_and_several_datasets_are_each_read():
    once = as_pairs(Dataset.from_list([l1(2)]))
    assert list(as_pairs(once)) == list(once)
    assert as_pairs(None) is None
    both = as_pairs(DatasetDict({"train": Dataset.from_list([l1(1)]), "test": Dataset.from_list([l1(2)])}))
    assert [both[name][0]["chosen"] for name in ("train", "test")] == ["A six.", "A seven."]
    assert len(as_pairs(Dataset.from_list([l1(1)]).select([]))) == 0


# ---- media ------------------------------------------------------------------------------------------------------


def numbered(count: int) -> Dataset:
    """Rows whose picture, question and answers are of one number."""
    rows = [
        {
            "images": [Image.new("RGB", (4, 4 + i))],
            "conversations": [{"from": "human", "value": f"<image>question {i}"}],
            "output_1": f"good {i}",
            "output_2": f"bad {i}",
            "preference": 1,
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def numbers(row: dict) -> set[int]:
    (medium,) = to_sample(row).media
    said = [texts(row)[0][1].split()[-1], row["chosen"].split()[-1], row["rejected"].split()[-1]]
    return {medium.open().height - 4, *map(int, said)}


@settings(max_examples=8, derandomize=True, deadline=None)
@given(order=st.lists(st.integers(0, 5), min_size=1, max_size=8), first=st.booleans())
def test_pictures_stay_with_their_texts_however_rows_are_chosen(
    order, first
):  # covers L1: queries filtered, images not
    data = numbered(6)
    read = as_pairs(data.select(order)) if first else as_pairs(data).select(order)
    assert [numbers(row) for row in read] == [{i} for i in order]


def test_pictures_stay_with_their_texts_in_filters_shuffles_and_streams():  # covers L1
    kept = as_pairs(numbered(6).filter(lambda row: "2" not in row["output_1"]).shuffle(seed=0))
    assert sorted(map(list, map(numbers, kept))) == [[0], [1], [3], [4], [5]]
    again = as_pairs(numbered(6)).filter(lambda row: "2" not in row["chosen"]).shuffle(seed=1)
    assert sorted(map(list, map(numbers, again))) == [[0], [1], [3], [4], [5]]
    stream = as_pairs(numbered(6).to_iterable_dataset()).filter(lambda row: "2" not in row["chosen"])
    assert sorted(map(list, map(numbers, stream.shuffle(seed=0, buffer_size=3)))) == [[0], [1], [3], [4], [5]]


def test_pictures_of_a_table_are_not_copied():
    data = numbered(3)
    column = as_pairs(data).data.column("images").chunk(0).values.field("bytes")
    assert column.buffers()[2].address == data.data.column("images").chunk(0).values.field("bytes").buffers()[2].address
    assert as_pairs(data).features["images"] == data.features["images"]


def test_a_stream_is_read_as_it_comes():
    stream = as_pairs(Dataset.from_list([l1(1), l1(3)]).to_iterable_dataset(), "pairs")
    rows = iter(stream)
    assert set(next(rows)) >= {"prompt", "image", "chosen", "rejected", "preference"}
    with pytest.raises(DataFormatError, match='pairs row 2: "preference" is 3'):
        next(rows)


# ---- what is no pair --------------------------------------------------------------------------------------------

PICTURE = [{"type": "image", "image": "8.png"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ASKED, "answer": "7"}, 'the row holds no two answers. Give "chosen" and "rejected", or'),
        ({**PAIR, "rejected": None}, 'the row is no pair: it has "chosen" but no "rejected"'),
        ({**l1(1), "output_2": None}, 'the row is no pair: it has "output_1" but no "output_2"'),
        (l1(0), '"preference" is 0. Give 1 or 2, the number of the better output'),
        (l1(None), '"preference" is missing. Give 1 or 2'),
        (l1(1.5), '"preference" is 1.5'),
        (l1("3"), "\"preference\" is '3'"),
        ({**l1(1), "preference": True}, '"preference" is True'),
        ({**PAIR, "rejected": " seven\n"}, "both answers are 'seven', so neither is better. Remove the row"),
        ({**PAIR, "chosen": said(PICTURE)}, '"chosen" holds media. A judge reads answers: give texts'),
        ({**PAIR, "rejected": 7}, '"rejected" is 7. Give the text of an answer'),
        ({**PAIR, "chosen": said("a") + said("b")}, '"chosen" has 2 messages. Give one, the answer'),
        ({**PAIR, "chosen": said([{"type": "text"}])}, '"chosen" has a part without a text'),
        (
            {**PAIR, "chosen": conversation("a", "Which letter?"), "rejected": conversation("b", "Which letter?")},
            '"chosen" and "rejected" are whole conversations, and they begin otherwise than "prompt"',
        ),
        (
            {"chosen": conversation("a", "Which digit?"), "rejected": conversation("b", "Which letter?")},
            '"chosen" and "rejected" are conversations that differ before the last answer',
        ),
        (
            {"chosen": conversation("a", "?"), "rejected": conversation("b", "?")[:1]},
            '"rejected" does not end with the assistant\'s answer',
        ),
        ({"chosen": "Q: ? A: a", "rejected": "Q: ? A: b"}, '"chosen" is \'Q: . A: a\', and the row has no "prompt"'),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_a_row_that_is_no_pair_is_named(row, message, stream):  # covers L1
    with pytest.raises(DataFormatError, match=message.replace("?", ".")) as caught:
        if stream:
            list(as_pairs(IterableDataset.from_generator(lambda: iter([row])), "pairs.jsonl"))
        else:
            as_pairs([PAIR, row], "pairs.jsonl")
    assert str(caught.value).startswith(f"pairs.jsonl row {1 if stream else 2}: ") and "\n" not in str(caught.value)


def test_rows_with_equal_answers_are_named_together():  # covers L1: a run started anew for each of them
    equal = {**PAIR, "rejected": PAIR["chosen"]}
    with pytest.raises(DataFormatError, match=r"^p\.json rows 2, 3, 1503: both answers are the same, so neither is"):
        as_pairs(Dataset.from_list([PAIR, equal, equal, *[PAIR] * 1499, equal]), "p.json")
    with pytest.raises(DataFormatError, match=r"^p\.json rows 1, .* 20 and 5 more: "):
        as_pairs(Dataset.from_list([equal] * 25), "p.json")
    with pytest.raises(DataFormatError, match="^p.json row 2: both answers are"):
        as_pairs(Dataset.from_list([PAIR, equal]), "p.json")


def test_a_preference_may_be_a_text():  # covers L1
    for number in (1, 2):
        assert as_pairs([l1(f" {number}")])[0]["chosen"] == as_pairs([l1(number)])[0]["chosen"]
        assert as_pairs(Dataset.from_list([l1(f"{number}")]))[0]["chosen"] == as_pairs([l1(number)])[0]["chosen"]


def test_a_row_of_a_table_is_named():  # covers L1
    table = Dataset.from_list([*[l1(1)] * 1500, l1(3), l1(4)])
    with pytest.raises(DataFormatError, match='train.json row 1501: "preference" is 3'):
        as_pairs(table, "train.json")


def test_transforms_cannot_be_read_beforehand():
    table = Dataset.from_list([{**PAIR, "extra": 1}]).with_transform(lambda batch: batch)
    with pytest.raises(DataFormatError, match="train makes its rows by a transform"):
        as_pairs(table, "train")


def test_two_ways_of_giving_prompts_do_not_fit_one_column():
    rows = [{"prompt": "a text", "chosen": conversation("a", "?"), "rejected": conversation("b", "?")}]
    rows += [{"prompt": "a text", "chosen": said("a"), "rejected": said("b")}]
    with pytest.raises(DataFormatError, match='train: "prompt" would mix types'):
        as_pairs(Dataset.from_list(rows), "train")


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.recursive(
                st.none() | st.booleans() | st.integers(0, 3) | st.text("<>image[]{} \n", max_size=8),
                lambda inner: (
                    st.lists(inner, max_size=2)
                    | st.dictionaries(
                        st.sampled_from(["role", "from", "value", "content", "type", "text"]), inner, max_size=2
                    )
                ),
                max_leaves=5,
            )
            for name in ("chosen", "rejected", "output_1", "output_2", "preference")
        },
    )
)
def test_any_row_is_a_pair_or_one_sentence(columns):
    try:
        (row,) = as_pairs([{"prompt": tiny.prompt("which", 0), **columns}], "rows")
    except DataFormatError as error:
        assert str(error).startswith("rows row 1: ") and "\n" not in str(error)
    else:
        assert isinstance(row["chosen"], str) and isinstance(row["rejected"], str) and row["chosen"] != row["rejected"]
