"""The speech and text-reading rewards: worked examples by hand, every script, and completions made to cheat."""

import logging
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tokenizer as tiny_tokenizer

from vlm_grpo.errors import RewardError
from vlm_grpo.rewards.asr import Asr, cer, wer
from vlm_grpo.rewards.ocr import Ocr
from vlm_grpo.rewards.words import prepared, split_words

TEXTS = st.text(max_size=30) | st.sampled_from(["", " ", "...", "a b", "A  B", "ß", "İI", "你好", "\ud800", "\ufeff"])


def thirds(texts, add_special_tokens=True):
    """A tokenizer by hand: every three characters are a token."""
    assert not add_special_tokens  # an end token on both sides would make strangers alike
    return {"input_ids": [[hash(text[i : i + 3]) for i in range(0, len(text), 3)] for text in texts]}


def score(completion, reference, language=None, **options) -> float | None:
    options = {"tokenizer": thirds} | options
    return Asr(**options)([completion], answer=[reference], language_id=[language])[0]


# covers A8
@pytest.mark.parametrize(
    ("completion", "reference", "grpo", "ppo"),
    [
        # words 1 of 3 wrong, characters 1 of 11, tokens the| ca|t s|at against the| ba|t s|at: 1 of 4
        ("the bat sat", "The cat sat", 0.3 * 2 / 3 + 0.3 * 10 / 11 + 0.4 * 3 / 4, 3 * (2 / 3 + 10 / 11 + 3 / 4)),
        # one word of 3, two characters of 5, and one token of 2 added
        ("a b c", "a b", 0.3 * 2 / 3 + 0.3 * 3 / 5 + 0.4 / 2, 3 * (2 / 3 + 3 / 5 + 1 / 2)),
        ("  THE CAT\n sat ", "the cat sat", 1.5, 9.0),
        # kitten -> sitting: 3 of 7 characters, tokens kit|ten against sit|tin|g: none alike
        ("sitting", "kitten", 0.3 * 4 / 7, 3 * 4 / 7),
        # 8 characters for 2: 2 of 3 words, 6 of 8 characters, "hi |hi |hi": 2 of 3 tokens; longer than twice: -2
        ("hi hi hi", "hi", 0.3 / 3 + 0.3 / 4 + 0.4 / 3, 3 * (1 / 3 + 1 / 4 + 1 / 3) - 2),
        ("abab", "ab", 0.3 / 2, 3 / 2),  # twice is not longer than twice
        ("abc", "abcdefghij", 0.3 * 0.3 + 0.4 / 4, 3 * (0.3 + 1 / 4)),  # 0.3 times is not shorter than 0.3 times
        ("ab", "abcdefghij", 0.3 * 0.2, 3 * 0.2 - 2),
        ("", "hello", 0.0, -10.0),
        (" \n\t\u200b\ufeff", "hello", 0.0, -10.0),
        ("<answer></answer>hello", "hello", 0.0, -10.0),
        ("...", "hello", 0.0, 0.0),  # 3 characters of 5
        (".", "hello", 0.0, -2.0),
        ("", "", 1.5, 9.0),  # silence
        ("thank you", " ", 0.0, -2.0),  # what models say into silence
    ],
)
def test_both_variants_by_hand(completion, reference, grpo, ppo):
    assert score(completion, reference) == pytest.approx(grpo)
    assert score(completion, reference, variant="ppo") == pytest.approx(ppo)


def test_repeating_the_reference_is_no_transcript():
    reference = "the cat sat on the mat"
    assert score(" ".join([reference] * 50), reference) < 0.03
    assert score(" ".join([reference] * 50), reference, variant="ppo") < -1.7
    assert score(f"{reference} {reference}", reference) == pytest.approx(0.3 / 2 + 0.3 * 22 / 45 + 0.4 * 7 / 15)


def test_another_language_is_worth_nothing():
    assert score("你好世界", "hello world") == 0.0
    assert score("hello world", "你好世界") == 0.0


# covers A7
@pytest.mark.parametrize(
    ("completion", "reference", "language", "same"),
    [
        ("ياخشىمۇسىز", "ياخشىمۇسىز", "ug", True),
        ("\u200fياخشىمۇسىز\u200e", "ياخشىمۇسىز", "ug", True),  # direction marks are not heard
        ("IŞIK", "ışık", "tr", True),
        ("IŞIK", "ışık", "tr-TR", True),
        ("IŞIK", "ışık", "Turkish", True),
        ("İSTANBUL", "istanbul", "tr", True),
        ("I\u0307STANBUL", "istanbul", "az", True),
        ("IŞIK", "ışık", "en", False),
        ("ICE", "ice", None, True),
        ("ICE", "ice", "trv", True),  # Seediq is not Turkish
        ("STRASSE", "straße", "de", True),
        ("ΟΔΟΣ", "οδος", "el", True),  # the last sigma has a form of its own
        ("e\u0301te\u0301", "été", "fr", True),
        ("你 好", "你好", "zh", True),
        ("我用 iphone 手机", "我用iPhone手机", "zh", True),
        ("できる", "て\u3099きる", "ja", True),
        ("می\u200cروم", "میروم", "fa", False),  # the joiner changes the spelling
        ("hello", "hello.", "en", False),
    ],
)
def test_what_counts_as_the_same_text(completion, reference, language, same):
    assert (score(completion, reference, language) == 1.5) is same
    assert (Asr(tokenizer=thirds, language=language)([completion], answer=[reference])[0] == 1.5) is same


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("Hello, world!", "hello world"),
        ("don’t", "don't"),
        ("well-known", "well known"),
        ("ＡＢＣ１２３", "abc123"),  # wide forms
        ("你好，世界。", "你好世界"),
        ("¿qué?", "qué"),
    ],
)
def test_strict_leaves_punctuation_and_width_out(completion, reference):
    assert score(completion, reference, normalize="strict") == 1.5
    assert score(completion, reference) < 1.5


def test_words_of_scripts_without_spaces_are_characters():
    assert split_words("今天 天气") == ["今", "天", "天", "气"]
    assert split_words("我用iphone手机") == ["我", "用", "iphone", "手", "机"]
    assert split_words("สวัสดี") == list("สวัสดี")
    assert split_words("the cat's hat") == ["the", "cat's", "hat"]
    assert split_words("한국어 단어") == ["한국어", "단어"]
    # one of four characters wrong: words 3/4, characters 3/4, tokens 你好世|界 against 你好时|界: 1/2
    assert score("你好时界", "你好世界", "zh") == pytest.approx(0.3 * 3 / 4 + 0.3 * 3 / 4 + 0.4 / 2)


def test_read_is_the_answer_else_what_follows_the_thinking():
    assert score("<think>hm hm</think>hello", "hello") == 1.5
    assert score("<think>hm</think> <answer> Hello </answer> bye", "hello") == 1.5
    assert score("<answer>bye</answer><answer>hello</answer>", "hello") < 0.3
    assert score([{"role": "assistant", "content": "hello"}], "hello") == 1.5


def test_of_several_references_the_best_counts_and_without_one_there_is_no_score():
    assert score("colour", ["color", "colour"]) == 1.5
    assert score("colour", None) is None
    assert score("colour", []) is None
    assert score("7", 7.0) == 1.5


def test_without_a_tokenizer_words_and_characters_take_its_weight_and_it_is_said_once(caplog):
    reward = Asr(variant="ppo")
    with caplog.at_level(logging.WARNING):
        values = [reward([text], answer=["the cat sat"])[0] for text in ("the cat sat", "the bat sat")]
    assert values == pytest.approx([9.0, 4.5 * (2 / 3 + 10 / 11)])
    assert [record.message.count("no tokenizer") for record in caplog.records] == [1]
    assert Asr()(["the bat sat"], answer=["the cat sat"]) == pytest.approx([0.5 * 2 / 3 + 0.5 * 10 / 11])


def test_a_run_gives_its_own_tokenizer_unless_one_was_given(tmp_path):
    words = tiny_tokenizer((), {})
    reward = Asr()
    reward.use_run(processor=words, media=None, max_completion_length=8)
    assert reward(["the bat sat"], answer=["the cat sat"])[0] is not None
    assert reward.tokenizer is words
    mine = Asr(tokenizer=thirds)
    mine.use_run(processor=words)
    assert mine.tokenizer is thirds
    words.save_pretrained(tmp_path)
    assert Asr(tokenizer=str(tmp_path))(["a\ud800 b"], answer=["a b"]) == [1.5]


def test_weights_and_penalties_are_options():
    assert score("the bat sat", "the cat sat", word=1.0, char=0.0, token=0.0) == pytest.approx(2 / 3)
    assert score("the cat sat", "the cat sat", exact=0.0) == pytest.approx(1.0)
    assert score("", "the cat sat", empty=-1.0) == -1.0
    assert score("x" * 12, "the cat sat", off_length=-1.0, longest=1.0) == -1.0


@pytest.mark.parametrize(
    ("options", "columns", "message"),
    [
        ({"variant": "dpo"}, {}, "variant='dpo' is none of grpo, ppo"),
        ({"normalize": "nfc"}, {}, "normalize='nfc' is none of basic, strict"),
        ({"word": -1}, {}, "word=-1 is not a number of at least 0"),
        ({"empty": 1}, {}, "empty is 1. Give a number of at most 0"),
        ({"token": "0.4"}, {}, "token='0.4' is not a number"),
        ({"shortest": 3}, {}, "shortest is 3"),
        ({"tokenizer": 7}, {}, "the tokenizer is 7. Give a name"),
        ({"tokenizer": "./no-such-folder"}, {}, 'the tokenizer "./no-such-folder" cannot be loaded'),
        ({}, {"solution": ["a"]}, 'there is no column "answer" \\(the rows have: solution\\)'),
        ({"word": 0, "char": 0}, {"answer": ["a"]}, "only a token weight and no tokenizer"),
    ],
)
def test_what_users_get_wrong_is_named(options, columns, message):
    with pytest.raises(RewardError, match=message):
        Asr(**options)(["a"], **columns)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(TEXTS, TEXTS | st.lists(TEXTS, max_size=2), st.sampled_from(["grpo", "ppo"]), st.sampled_from(["tr", None]))
def test_any_text_stays_in_range(completion, reference, variant, language):
    low, high = {"grpo": (0.0, 1.5), "ppo": (-10.0, 9.0)}[variant]
    for normalize in ("basic", "strict"):
        for words in (thirds, None):
            options = {"variant": variant, "normalize": normalize, "tokenizer": words}
            value = score(completion, reference, language, **options)
            if reference == []:
                assert value is None
            else:
                assert low <= value <= high + 1e-9


@settings(max_examples=100, derandomize=True, deadline=None)
@given(TEXTS, st.sampled_from(["basic", "strict"]))
def test_preparing_twice_changes_nothing(text, normalize):
    once = prepared(text, None, normalize)
    assert prepared(once, None, normalize) == once


def test_error_rates_of_a_corpus():
    completions = ["the bat sat", "a b c d", "anything"]
    references = ["The cat sat", "a b", None]
    assert wer(completions, references) == pytest.approx((1 + 2) / (3 + 2))
    assert cer(completions, references) == pytest.approx((1 + 4) / (11 + 3))
    assert wer(["你好时界", "IŞIK"], ["你好世界", "ışık"], languages=["zh", "tr"]) == pytest.approx(1 / 5)
    assert wer(["colour"], [["color", "colour"]]) == 0.0
    assert wer(["Hello, you"], ["hello you"], normalize="strict") == 0.0
    assert wer(["a a a a"], ["a"]) == 3.0
    assert wer(["x"], [""]) is None and wer([], []) is None


@pytest.mark.parametrize(
    ("completion", "answer", "anls", "cer_value"),
    [
        ("STOP", "stop", 1.0, 1.0),
        ("<answer> Main  Street </answer>", "main street", 1.0, 1.0),
        ("stap", "stop", 3 / 4, 3 / 4),
        ("st", "stop", 0.0, 1 / 2),  # a distance of 0.5 is not below 0.5
        ("sto", "stop", 3 / 4, 3 / 4),
        ("go", "stop", 0.0, 1 / 4),
        ("stop", ["halt", "stop"], 1.0, 1.0),
        ("halt", ["halt", "stop"], 1.0, 1.0),
        ("halt stop", ["halt", "stop"], 0.0, 0.0),  # all of them at once
        ("halt stop", "halt", 0.0, 0.0),
        ("stop " * 50, "stop", 0.0, 0.0),
        ("the sign says stop", "stop", 0.0, 0.0),
        ("", "stop", 0.0, 0.0),
        (" \u200b", "stop", 0.0, 0.0),
        ("...", "stop", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("x", "", 0.0, 0.0),
        ("42", 42, 1.0, 1.0),
        ("x", None, None, None),
        ("x", [], None, None),
    ],
)
def test_ocr(completion, answer, anls, cer_value):
    assert Ocr()([completion], answer=[answer]) == [pytest.approx(anls)]
    assert Ocr(method="cer")([completion], answer=[answer]) == [pytest.approx(cer_value)]


def test_ocr_options_are_checked():
    assert Ocr(threshold=1)(["st"], answer=["stop"]) == [0.5]
    with pytest.raises(RewardError, match="threshold=0 is not a number above 0"):
        Ocr(threshold=0)
    with pytest.raises(RewardError, match="method='wer' is none of anls, cer"):
        Ocr(method="wer")
    with pytest.raises(RewardError, match='there is no column "answers"'):
        Ocr(column="answers")(["a"], answer=["a"])


@settings(max_examples=100, derandomize=True, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from(["anls", "cer"]))
def test_ocr_stays_in_range(completion, answer, method):
    (value,) = Ocr(method=method)([completion], answer=[answer])
    assert value is not None and 0 <= value <= 1 and math.isfinite(value)
