"""PPO's rows and rules: LLaVA-RLHF's questions with a type and a bonus, transcripts, and what presets say of both."""

import json

import mediafiles
import pytest
import tiny
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_grpo import load_data, load_rewards
from vlm_grpo.config import RewardSpec
from vlm_grpo.data import as_canonical, canonical, detect, to_sample
from vlm_grpo.errors import DataFormatError, RewardError
from vlm_grpo.presets import PRESETS, preset_layer
from vlm_grpo.rewards import introduce
from vlm_grpo.rewards.caption_type import caption_type
from vlm_grpo.rewards.length import LengthBonus

ANSWERS = {2: "A", 3: "B", 4: "C", 5: "D", 6: "no", 7: "yes"}


def question(number: int = 0, said: str = "It is.", **columns) -> dict:
    """A row of LLaVA-RLHF; its picture has its number."""
    turns = [{"from": "human", "value": f"<image>\nquestion {number}"}, {"from": "gpt", "value": said}]
    return {"image": f"{number}.png", "conversations": turns, "caption_type": 1, "length_bonus": 1.0, **columns}


def untyped(number: int = 0) -> dict:
    return {name: value for name, value in question(number).items() if name != "caption_type"}


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pictures(tmp_path):
    for number in range(7):
        tiny.image(number).save(tmp_path / f"{number}.png")
    return tmp_path


# ---- L7 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", range(1, 8))
def test_the_type_gives_the_answer(kind):
    # covers L7
    row = canonical(question(caption_type=kind, length_bonus=0.5))
    assert row["answer"] == ANSWERS.get(kind, "It is."), "of a general question the turn that followed"
    assert (row["caption_type"], row["length_bonus"]) == (kind, 0.5) and row["completion"][0]["content"] == "It is."
    assert row["prompt"] == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nquestion 0"}]}]
    assert canonical(question(caption_type=kind, answer="mine"))["answer"] == "mine", "a row's own stays"


def test_a_file_keeps_each_question_with_its_picture_and_type(pictures):
    # covers L7; LLaVA-RLHF left questions out, and not their pictures
    later = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    rows = [question(number, caption_type=number + 1, length_bonus=number / 2) for number in range(7)]
    rows[2]["conversations"] += later
    rows[4]["conversations"][0]["value"] = "question 4"  # no placeholder: the picture comes first
    rows[5]["length_bonus"] = None
    Dataset.from_list(rows).to_parquet(pictures / "rows.parquet")
    (pictures / "rows.json").write_text(json.dumps(rows))
    for name in (jsonl(pictures / "rows.jsonl", rows), str(pictures / "rows.json"), str(pictures / "rows.parquet")):
        for data in (load_data(name), list(load_data(name, streaming=True))):
            assert [row["answer"] for row in data] == ["It is.", *ANSWERS.values()]
            assert [row["caption_type"] for row in data] == list(range(1, 8))
            assert [row["length_bonus"] for row in data] == [0, 0.5, 1, 1.5, 2, None, 3]
            for number, row in enumerate(data):
                sample = to_sample(row)
                assert [medium.label for medium in sample.media] == [str(pictures / f"{number}.png")]
                assert len(sample.prompt) == 1 and sample.prompt[0]["content"][0]["type"] == "image"
                assert sample.prompt[0]["content"][-1]["text"].strip() == f"question {number}"


def test_conversations_without_types_are_what_they_were():
    row = untyped()
    assert detect(row).name == "conversations" and detect({**row, "caption_type": 1}).name == "llava-rlhf"
    assert canonical(row)["answer"] == "It is." and canonical(row)["length_bonus"] == 1.0
    assert [row["answer"] for row in as_canonical([untyped(0), untyped(1)])] == ["It is.", "It is."]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"caption_type": 0}, r'"caption_type" is 0. Give 1 \(general\), 2 to 5 .*, 6 \(no\) or 7 \(yes\)'),
        ({"caption_type": 8}, '"caption_type" is 8'),
        ({"caption_type": 2.5}, '"caption_type" is 2.5'),
        ({"caption_type": True}, '"caption_type" is True'),
        ({"caption_type": "A"}, "\"caption_type\" is 'A'"),
        ({"length_bonus": "much"}, "\"length_bonus\" is 'much'. Give a number, or nothing, which counts as 1"),
        ({"length_bonus": True}, '"length_bonus" is True'),
        ({"length_bonus": float("inf")}, '"length_bonus" is inf'),
    ],
)
def test_a_wrong_type_or_bonus_is_named_with_its_row(wrong, message, pictures):
    # covers L7
    with pytest.raises(DataFormatError, match=f"^rows row 1: {message}"):
        as_canonical(Dataset.from_list([question(**wrong)]), "rows")
    with pytest.raises(DataFormatError, match=f"rows.jsonl row 2: {message}"):
        load_data(jsonl(pictures / "rows.jsonl", [question(), question(1, **wrong)]))
    with pytest.raises(DataFormatError, match=f"rows.jsonl row 2: {message}"):
        list(load_data(str(pictures / "rows.jsonl"), streaming=True))


def test_a_row_without_a_type_among_typed_ones_is_named(pictures):
    # covers L7
    cases = [
        ([question(), untyped(1)], 2),
        ([untyped(), question(1)], 1),
        ([question(), question(1, caption_type=None)], 2),
    ]
    for rows, named in cases:
        message = f'row {named}: the row has no "caption_type", and .* has one. Give 1 .*; or remove it from every row'
        file = jsonl(pictures / "rows.jsonl", rows)
        table = Dataset.from_list([{**row, "caption_type": row.get("caption_type")} for row in rows])
        with pytest.raises(DataFormatError, match=message):
            load_data(file)
        with pytest.raises(DataFormatError, match=message):
            list(load_data(file, streaming=True))
        with pytest.raises(DataFormatError, match=message):
            as_canonical(table, "t")
        with pytest.raises(DataFormatError, match=message):
            list(as_canonical(table.to_iterable_dataset(), "t"))
        with pytest.raises(DataFormatError, match=message):
            as_canonical(rows, "t")
    mixed = [question(), {"prompt": "p"}, {"question": "q", "answer": "a"}]
    assert len(as_canonical(mixed)) == 3, "other formats may stand beside"
    assert len(as_canonical([question(), untyped()], format="conversations")) == 2, "what is given is not detected"


def test_a_type_under_another_name(pictures):
    rows = [{**untyped(number), "kind": 6} for number in range(2)]
    file = jsonl(pictures / "rows.jsonl", rows)
    assert load_data(file, columns={"caption_type": "kind"})["answer"] == ["no", "no"]
    file = jsonl(pictures / "rows.jsonl", [*rows, untyped(2)])
    with pytest.raises(DataFormatError, match='row 3: the row has no "caption_type"'):
        load_data(file, columns={"caption_type": "kind"})


# ---- L6: correctness --------------------------------------------------------------------------------------------


def correctness(completion, kind, **options) -> float:
    return caption_type([completion], caption_type=[kind], **options)[0]


@pytest.mark.parametrize(
    ("completion", "kind", "expected"),
    [
        ("B. a cat", 3, 2.0),
        ("  B.", 3, 2.0),
        ("B. a cat", 2, 0.0),
        ("The correct option is C.", 4, 2.0),
        ("It barks, so the correct option is D. A dog.", 5, 2.0),
        ("The correct option is A", 2, 2.0),
        ("The correct option is: (B)", 3, 2.0),
        ("A. a dog. The correct option is A.", 2, 2.0),
        ("B", 3, 0.0),  # neither of the two ways
        ("B) a cat", 3, 0.0),
        ("b. a cat", 3, 0.0),
        ("The answer is B.", 3, 0.0),
        ("The correct option is Both.", 3, 0.0),
        ("", 3, 0.0),
        ("No, there is none.", 6, 1.0),
        ("no", 6, 1.0),
        (" **No**, it is empty.", 6, 1.0),
        ("Not that I can see.", 6, 1.0),
        ("None of them.", 6, 1.0),
        ("Yes, there is.", 6, -1.0),
        ("yes.", 6, -1.0),
        ("Note that there is a dog.", 6, 0.0),
        ("Notice the dog!", 6, 0.0),
        ("Yesterday there was.", 6, 0.0),
        ("I cannot tell.", 6, 0.0),
        ("", 6, 0.0),
        ("Yes, there is.", 7, 0.0),
        ("No.", 7, 0.0),
        ("A. No. Yes.", 1, 0.0),
        ([{"role": "assistant", "content": "No."}], 6, 1.0),
        ("<think>A. or B.</think>\nB. a cat", 3, 2.0),
        ("<think>yes?</think><answer>No.</answer>", 6, 1.0),
        ("No.", 6.0, 1.0),  # as a table has it beside an empty cell
    ],
)
def test_correctness_by_hand(completion, kind, expected):
    # covers L6
    assert correctness(completion, kind) == expected
    assert correctness(completion, kind, score=1.0) == expected / 2


@pytest.mark.parametrize("kind", [2, 3, 4, 5])
def test_naming_every_letter_wins_nothing(kind):
    # covers L6
    everything = " ".join(f"The correct option is {letter}." for letter in "ABCD")
    assert correctness(everything, kind) == correctness(f"A. {everything[25:]}", kind) == 0.0
    assert correctness("B. The correct option is A.", kind) == 0.0


@pytest.mark.parametrize("kind", [None, 0, 8, 1.5, "A", True, float("nan"), [2]])
def test_a_row_without_a_known_type_is_no_zero(kind):
    # covers L6, L7
    row = 'for the completion "Yes" of the prompt "q2". Give 1'
    with pytest.raises(RewardError, match=f'column "caption_type" holds .* {row}'):
        caption_type(["No", "Yes"], prompts=["q1", "q2"], caption_type=[6, kind])
    with pytest.raises(RewardError, match='The reward "caption_type": the column'):
        load_rewards(["caption_type"])[0][0](completions=["No"], prompts=["q"], caption_type=[kind])


def test_misuses_of_the_correctness_rule_are_named():
    with pytest.raises(RewardError, match='there is no column "caption_type" .the rows have: kind.'):
        caption_type(["No"], kind=[6])
    with pytest.raises(RewardError, match="score=-1 is not a number of at least 0"):
        correctness("No", 6, score=-1)
    with pytest.raises(RewardError, match='has no option "weight"'):
        load_rewards([RewardSpec(name="caption_type", kwargs={"weight": 2})])
    assert caption_type(["No"], column="kind", kind=[6]) == [1.0]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.text(max_size=30) | st.sampled_from(["No", "Yes", "A.", "correct option is B"]), st.integers(1, 7))
def test_any_completion_has_one_of_the_values(completion, kind):
    assert correctness(completion, kind) in ({0.0, 2.0} if 1 < kind < 6 else {-1.0, 0.0, 1.0} if kind == 6 else {0.0})


# ---- L6: length -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "bonus", "expected"),
    [
        (0, 1.0, 0.0),
        (224, 1.0, -2.5),
        (224, 0.5, -1.25),
        (896, 1, -10.0),
        (900, 1.0, -10.0),
        (224, -1.0, 2.5),
        (224, 0, 0.0),
        (224, None, -2.5),  # none counts as 1
        (224, float("nan"), -2.5),
    ],
)
def test_length_by_hand(tokens, bonus, expected):
    # covers L6
    (reward,), weights = load_rewards(["length_bonus"])
    introduce([reward], processor=None, media=None, max_completion_length=896)
    columns = {"completion_ids": [list(range(tokens))], "length_bonus": [bonus]}
    assert reward(completions=[""], **columns) == [expected] and weights == [1.0]
    mine = LengthBonus(max_length=896, penalty=-1)
    mine.use_run(max_completion_length=7)
    assert mine([""], **columns) == [pytest.approx(expected / 10)]


def test_misuses_of_the_length_rule_are_named():
    ids = {"completion_ids": [[1], [1]]}
    with pytest.raises(RewardError, match="there is no max_length"):
        LengthBonus()(["", ""], **ids, length_bonus=[1, 1])
    with pytest.raises(RewardError, match='no column "length_bonus"'):
        LengthBonus(9)(["", ""], **ids)
    with pytest.raises(
        RewardError, match="holds 'much'. Put a number there, or nothing for the completion \"b\" of the"
    ):
        LengthBonus(9)(["a", "b"], prompts=["p", "q"], **ids, length_bonus=[1, "much"])
    with pytest.raises(RewardError, match="penalty is 1. Give a number of at most 0"):
        LengthBonus(9, penalty=1)
    with pytest.raises(RewardError, match="no completion_ids"):
        LengthBonus(9)([""], length_bonus=[1])


def test_both_rules_score_the_rows_of_a_file(pictures):
    # covers L6, L7
    rows = [question(number, caption_type=kind, length_bonus=number / 4) for number, kind in enumerate([3, 6, 6, 1])]
    data = load_data(jsonl(pictures / "rows.jsonl", rows))
    (right, length), _ = load_rewards(["caption_type", "length_bonus"])
    introduce([right, length], max_completion_length=10)
    said = ["B. a cat", "No.", "Yes.", "It is a cat."]
    columns = {name: list(data[name]) for name in ("caption_type", "length_bonus", "answer")}
    given = {"completions": said, "completion_ids": [[1] * 5] * 4, **columns}
    assert right(**given) == [2.0, 1.0, -1.0, 0.0] and length(**given) == [0.0, -1.25, -2.5, -3.75]


# ---- A7, A8 -----------------------------------------------------------------------------------------------------


def transcript(text: str, *audios: str, language: str = "ug") -> dict:
    asked = {"role": "user", "content": "<audio>" * len(audios) + "Transcribe."}
    messages = [asked, {"role": "assistant", "content": text}]
    return {"messages": messages, "audios": list(audios), "language_id": language}


@pytest.fixture
def sounds(tmp_path):
    for number in range(3):
        mediafiles.write_wav(tmp_path / f"{number}.wav", mediafiles.sine(16000, 0.1, 200 + 100 * number))
    return tmp_path


def test_transcripts_are_scored_by_the_ppo_reward(sounds):
    # covers A7, A8
    rows = [transcript("Salam", "0.wav"), transcript("IŞIK", "1.wav", language="tr")]
    rows.append(transcript("hello you", "2.wav", "0.wav"))
    file = jsonl(sounds / "rows.jsonl", rows)
    specs = [RewardSpec(name="asr", kwargs={"variant": "ppo"})]
    for data in (load_data(file), list(load_data(file, streaming=True))):
        samples = [to_sample(row) for row in data]
        assert [[str(medium.label) for medium in sample.media] for sample in samples] == [
            [str(sounds / name) for name in row["audios"]] for row in rows
        ]
        assert all(len(sample.prompt) == 1 for sample in samples), "the reference is no part of the prompt"
        columns = {name: [sample.columns[name] for sample in samples] for name in ("answer", "language_id")}
        (reward,), _ = load_rewards(specs)
        introduce([reward], processor=tiny.tokenizer((), {}), max_completion_length=8)
        assert reward(completions=["salam", "ışık", "hello you"], **columns) == pytest.approx([9.0, 9.0, 9.0])
        assert reward(completions=["", " ", "\n"], **columns) == [-10.0] * 3
        long = reward(completions=["salam " * 9, "x", "hello"], **columns)
        assert -2.0 < long[0] < 0 and long[1] == -2.0 and 0 < long[2] < 9
    again = load_data(Dataset.from_list(rows), media_root=sounds)
    assert list(again["answer"]) == ["Salam", "IŞIK", "hello you"] and list(again["language_id"]) == ["ug", "tr", "ug"]


@pytest.mark.parametrize("audios", [[], ["0.wav", "1.wav"]])
def test_placeholders_and_sounds_match_in_number(audios, sounds):
    # covers A7
    wrong = {**transcript("salam", "0.wav"), "audios": audios}
    with pytest.raises(DataFormatError, match='rows.jsonl row 2: the prompt has 1 <audio> placeholder but "audio.s."'):
        load_data(jsonl(sounds / "rows.jsonl", [transcript("salam", "0.wav"), wrong]))


# ---- presets ----------------------------------------------------------------------------------------------------


def test_presets_are_the_published_options():
    # covers L5, L6, L8
    layer = preset_layer("llava-rlhf")
    assert layer["algorithm"] == "ppo" and layer["load_in_4bit"] is True
    assert layer["rewards"] == [{"name": "caption_type"}, {"name": "length_bonus"}]
    switches = {"language": True, "vision": False, "attention": True, "mlp": True}
    assert layer["lora"] == {"r": 64, "alpha": 16, **switches}, "q, k, v, o, gate, up and down of the language model"
    published = {
        "kl_coef": 0.1,
        "kl_estimator": "k1_clamped",
        "gamma": 1.0,
        "lam": 1.0,
        "whiten_advantages": True,
        "epsilon": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "num_iterations": 2,
        "missing_eos_penalty": 8.0,
        "learning_rate": 3e-5,
        "lr_scheduler_type": "cosine",
    }
    assert published.items() <= layer["train"].items()
    assert "reward model" in PRESETS["llava-rlhf"].about, "it is the user's"


def test_the_audio_preset_is_the_published_one():
    # covers A8, A9
    published = {
        "kl_coef": 0.2,
        "kl_target": 6.0,
        "kl_horizon": 10000,
        "gamma": 1.0,
        "lam": 0.95,
        "epsilon": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "num_iterations": 4,
    }
    rewards = [{"name": "asr", "kwargs": {"variant": "ppo"}}]
    assert preset_layer("qwen2-audio-ppo") == {"algorithm": "ppo", "rewards": rewards, "train": published}
    assert load_rewards([RewardSpec(**spec) for spec in rewards])[1] == [1.0]
