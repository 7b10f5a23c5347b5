"""Accuracy by each method, on hostile completions and by hand; the readers of answers behind it."""

import functools
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_grpo import load_rewards
from vlm_grpo.config import RewardSpec
from vlm_grpo.errors import RewardError
from vlm_grpo.rewards.accuracy import accuracy
from vlm_grpo.rewards.answers import choice_letter, number_in, yes_or_no


def right(completion, answer, **options):
    return accuracy([completion], answer=[answer], **options)[0]


# ---- text and exact ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "text", "exact"),
    [
        (" Seven. ", "seven", 1.0, 0.0),
        ("<answer>\n  two\nlines \n</answer>", "two\nlines", 1.0, 1.0),  # multi-line bodies
        ("<think>a\nb</think>\n<answer>\ntwo\n</answer>", "<answer>two</answer>", 1.0, 1.0),
        ("long thought</think>\n\ntwo", "two", 1.0, 1.0),  # models whose prompt opens the thought
        ("<think>two</think>", "two", 0.0, 0.0),
        ("<answer>a</answer><answer>b</answer>", "b", 0.0, 0.0),
        ("cat dog bird", "dog", 0.0, 0.0),
        ("dog", ["cat", "dog"], 1.0, 1.0),  # any of several
        ("cat dog", ["cat", "dog"], 0.0, 0.0),
        ("dog", ["cat", None], 0.0, 0.0),
        ("", "", 0.0, 0.0),
        ("<answer> </answer>", " ", 0.0, 0.0),
        ("7", 7.0, 1.0, 1.0),
        ("a", [], None, None),
        ("a", [None], None, None),
        ("a", None, None, None),
    ],
)
def test_text_and_exact(completion, answer, text, exact):  # covers O6
    assert right(completion, answer) == text
    assert right(completion, answer, method="exact") == exact
    message = [{"role": "assistant", "content": [{"type": "text", "text": completion}]}]
    assert right(message, answer, method="text") == text


def test_its_own_values_for_right_and_wrong():  # covers L6
    rules = {"method": "yes_no", "right": 0.5, "wrong": -0.5}
    said = ["No, there is none.", "Yes.", "", "perhaps"]
    assert accuracy(said, answer=["no"] * 4, **rules) == [0.5, -0.5, -0.5, -0.5]
    letters = ["B. a dog", "The correct option is B.", "A. a cat", "A. B. C. D."]
    assert accuracy(letters, answer=["B"] * 4, method="choice", right=2.0) == [2.0, 2.0, 0.0, 0.0]


def test_by_name_with_options():
    specs = [RewardSpec(name="accuracy", kwargs={"method": "number", "column": "n", "relative": 0.05})]
    (reward,), _ = load_rewards(specs)
    assert reward(prompts=["p"] * 2, completions=["104 kg", "106"], completion_ids=[[1]] * 2, n=[100, 100]) == [
        1.0,
        0.0,
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"label": ["a"]}, 'there is no column "answer" .the rows have: label'),
        ({"answer": ["a"], "method": "maths"}, "method='maths' is none of text, exact, .* Did you mean \"math\""),
        ({"answer": ["a"], "method": ["a"]}, 'if it is the column "method" of the dataset, rename that'),
        ({"answer": ["a"], "tolerance": -1}, "tolerance=-1 is not a number of at least 0"),
        ({"answer": ["a"], "relative": "5%"}, "relative='5%' is not a number"),
        ({"answer": ["a"], "right": float("nan")}, "right=nan is not a number"),
        ({"answer": ["a"], "seconds": 0}, "seconds=0 is not a number above 0"),
        ({"answer": ["many"], "method": "number"}, "'many' is not a number, as method \"number\" needs it"),
        ({"answer": ["dog"], "method": "choice"}, "'dog' is not a letter from A to J"),
        ({"answer": ["cow"], "method": "choice", "choices": [["cat", "dog"]]}, "not one of the options cat, dog"),
        ({"answer": ["C"], "method": "choice", "choices": [["cat", "dog"]]}, "not one of the options cat, dog"),
        ({"answer": ["A"], "method": "choice", "choices_column": "opts"}, 'there is no column "opts"'),
        ({"answer": ["A"], "method": "choice", "options": [["a"] * 27]}, "27 options; a choice has at most 26"),
        ({"answer": ["maybe"], "method": "yes_no"}, "'maybe' is not yes or no"),
    ],
)
def test_what_is_wrong_is_named(arguments, sentence):
    with pytest.raises(RewardError, match=sentence):
        accuracy(["a"], **arguments)


# ---- yes or no --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "evaluated", "rewarded"),
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("No, there is a dog.", "no", "no"),  # commas removed
        ("There is not a dog.", "no", "no"),
        ("Yes, there is no dog.", "no", "no"),
        ("Yes. No.", "yes", "yes"),  # the first sentence
        ("yes no", "no", "no"),
        ("*No*\nYes", "no", "no"),
        ("... No!", "no", "no"),
        ("There is a dog.", "yes", None),  # else yes, but nobody is paid for it
        ("nothing is known", "yes", None),
        ("I know", "yes", None),
        ("True", "yes", "yes"),
        ("false", "yes", "no"),
        ("<think>no</think><answer>yes</answer>", "yes", "yes"),
        ("hm no</think>yes", "yes", "yes"),
        ("", None, None),
        (" .!\n", None, None),
    ],
)
def test_yes_or_no(text, evaluated, rewarded):  # covers L9
    assert (yes_or_no(text), yes_or_no(text, strict=True)) == (evaluated, rewarded)
    for answer in ("yes", "no"):
        assert right(text, answer, method="yes_no") == float(rewarded == answer)
    assert right(text, True, method="yes_no") == float(rewarded == "yes")


# ---- a choice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(
            (text, "B")
            for text in ("B", "b", "(b)", "B.", " **B** ", "$\\boxed{B}$", "[B]", '"B"', "option B", "B\n\nIt is.")
        ),
        *((text, "B") for text in ("B. a dog", "B) a dog", "(B) a dog", "B: a dog", "B.dog", "b) a dog", "B, a dog")),
        *(
            (text, "B")
            for text in ("The answer is B", "the correct option is (B).", "Answer: b", "**Answer:** B. a dog")
        ),
        *(
            (text, "B")
            for text in ("I choose B", "Option B is correct.", "A? No: the answer is B because (A) is a cat")
        ),
        *((text, "B") for text in ("<answer>B</answer><answer>A</answer>", "not A</think>B", "B. B is right")),
        *(
            (text, None)
            for text in ("A B C D", "A, B, C, D", "A. B. C. D.", "(A)(B)(C)(D)", "A/B/C/D", "A\nB\nC\nD", "ABCD")
        ),
        *(
            (text, None)
            for text in ("A or B", "A and B", "A. a cat B. a dog", "The answer is A. The answer is B.", "A; B")
        ),
        *(
            (text, None)
            for text in ("A. The answer is B", "The answer is A or B", "answer: A, answer: B", "B. It is not (A)")
        ),
        *((text, None) for text in ("The answer is (A), (B), (C) and (D)", "A is correct. B is correct.", "A B")),
        *(
            (text, None)
            for text in ("A cat", "a dog", "The answer is a dog", "B is wrong", "The answer is not B", "C'est")
        ),
        *((text, None) for text in ("", "E", "?", "dog", "<answer></answer>B", "А")),  # the last one is Cyrillic
    ],
)
def test_choice_letter(text, letter):  # covers L6 L9
    assert choice_letter(text) == letter
    for answer in "ABCD":
        assert right(text, answer, method="choice", choices=[list("wxyz")]) == float(letter == answer)


def test_no_listing_of_letters_wins_for_every_answer():
    """A text is right for one letter at most: the reader never looks at the right one."""
    for text in ("A B C D", "A. B. C. D.", "<answer>A</answer><answer>B</answer>", "The answer is A. The answer is B."):
        assert sum(right(text, answer, method="choice") for answer in "ABCD") <= 1.0


@pytest.mark.parametrize(
    ("completion", "answer", "choices", "expected"),
    [
        ("B", "a dog", ["a cat", "a dog"], 1.0),
        ("a dog", "B", ["a cat", "a dog"], 1.0),
        ("A dog.", "B", ["a cat", "a dog"], 1.0),
        ("a cat", "B", ["a cat", "a dog"], 0.0),
        ("a cat a dog", "B", ["a cat", "a dog"], 0.0),
        ("B) a cat", "B", ["a cat", "a dog"], 1.0),  # the letter is the answer
        ("B", 1, ["a cat", "a dog"], 1.0),  # an index, from 0
        ("A", 1, ["a cat", "a dog"], 0.0),
        ("B", 3, ["2", "3"], 1.0),  # the text of an option comes first
        ("3", "B", ["2", "3"], 1.0),
        ("C", "A", ["a cat", "a dog"], 0.0),  # no such option
        ("a dog", "B", ["A. a cat", "B. a dog"], 1.0),
        ("B", "a dog", {"A": "a cat", "B": "a dog", "C": None}, 1.0),
        ("B", "B", {"text": ["a cat", "a dog"], "label": ["A", "B"]}, 1.0),
        ("same", "A", ["same", "same"], 0.0),  # which of them?
        ("J", "J", None, 1.0),
        ("J", "J", "A. a cat, J. a dog", 1.0),  # options as a text are for the prompt
    ],
)
def test_options_of_a_row(completion, answer, choices, expected):
    assert accuracy([completion], answer=[answer], method="choice", choices=[choices]) == [expected]
    assert accuracy([completion], answer=[answer], method="choice", choices_column="o", o=[choices]) == [expected]


# ---- a number ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(
            (text, 7)
            for text in ("7", "7.0", "**7**", "$7$", "\\boxed{7}", "$7.", "€7", "+7", "7!", "٧", "seven", "= 7", "7 kg")
        ),
        *(
            (text, 7)
            for text in ("3 + 4 = 7", "Of 9 the answer is 7.", "Answer:7", "7 (that is 7.0)", "<answer>7</answer> 8")
        ),
        *((text, -7) for text in ("-7", "−7", "(-7)", "x = -7")),
        *((text, 1234.5) for text in ("1,234.5", "1234.5", "1.2345e3", "1,234.50 km")),
        *((text, 0.75) for text in ("3/4", "3 / 4", "\\frac{3}{4}", "75%", "75 percent", ".75", "75\\%")),
        *(
            (text, None)
            for text in ("1 2 3", "1, 2, 3", "1,2,3", "6-7", "6 or 7", "= 6 = 7", "the answer is 6. The answer is 7.")
        ),
        *(
            (text, None)
            for text in (
                "1,5",
                "12,34",
                "1.2.3",
                "10:30",
                "2020-01-01",
                "1/2/3",
                "1/0",
                "x2",
                "3*4",
                "1e999",
                "9" * 5000,
            )
        ),
        *((text, None) for text in ("", "?", "²", "one or two", "<answer></answer>7", "-", "/", "%", "e5", ",", ".")),
    ],
)
def test_number_in(text, number):
    assert number_in(text) == (None if number is None else pytest.approx(number))


@pytest.mark.parametrize(
    ("completion", "answer", "options", "expected"),
    [
        ("7 apples", 7, {}, 1.0),
        ("0.3", "3/10", {}, 1.0),
        ("45%", 0.45, {}, 1.0),
        ("45%", 45, {}, 0.0),
        ("6 7 8", 7, {"tolerance": 1}, 0.0),
        ("8", 7, {"tolerance": 1}, 1.0),
        ("8.01", 7, {"tolerance": 1}, 0.0),
        ("1.05", 1, {"relative": 0.05}, 1.0),
        ("0.95", "1", {"relative": 0.05}, 1.0),
        ("0.94", "1", {"relative": 0.05}, 0.0),
        ("-95", -100, {"relative": 0.05}, 1.0),
        ("1", 0, {"relative": 0.5}, 0.0),
        ("1e999", 7, {"tolerance": 1e300}, 0.0),
        ("7", [6, 7], {}, 1.0),
        ("", 0, {"tolerance": 9}, 0.0),
    ],
)
def test_numbers_with_tolerance(completion, answer, options, expected):
    assert right(completion, answer, method="number", **options) == expected


# ---- mathematics ------------------------------------------------------------------------------------------------

math = functools.partial(right, method="math")


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("0.5", "1/2", 1.0),
        ("$x^2+2x+1$", "(x+1)^2", 1.0),
        (
            "<think>\n$1$\n</think>\n<answer>\n$$\n\\frac{1}{2}\n$$\n</answer>",
            "<answer>0.5</answer>",
            1.0,
        ),  # multi-line
        ("so $x=3$ and \\boxed{\\sqrt{8}}", "$2\\sqrt{2}$", 1.0),
        ("<answer>a\ncat</answer>", "A cat.", 1.0),  # no mathematics: the bodies are compared
        ("no", "on", 0.0),  # n·o is o·n only to a parser
        ("red", "blue", 0.0),
        ("The answer is 3 apples.", 3, 1.0),
        ("45%", "0.45", 1.0),
        ("1e-3", "0.001", 1.0),
        ("[0,1)", "[0,1]", 0.0),
        ("-7", "7", 0.0),
        ("1, 2, 3", "2", 0.0),
        ("1, 2, 3", "3", 0.0),
        ("1 2 3", "3", 0.0),
        ("1 or 3", "3", 0.0),
        ("\\pm 2", "2", 0.0),
        ("$\\{1,2,3\\}$", "3", 0.0),
        ("\\boxed{1} \\boxed{3}", "3", 0.0),
        ("<answer>1</answer><answer>3</answer>", "3", 0.0),
        ("__import__('os').system('exit')", "3", 0.0),
        ("$\\operatorname{eval}(3)$", "3", 0.0),
        ("9**9**9**9", "9", 0.0),
        ("\\" * 100_000, "3", 0.0),
        ("$" * 5_000, "3", 0.0),
        ("\x00\ud800", "3", 0.0),
        ("", "3", 0.0),
        ("<answer></answer>", "3", 0.0),
    ],
)
def test_mathematics(completion, answer, expected):  # covers O6
    assert math(completion, answer) == expected


@pytest.mark.parametrize(
    "formula",
    ["$9^{9^{9^{9}}}$", "(" * 500 + "3" + ")" * 500],
    ids=["powers", "brackets"],
)
def test_a_hostile_formula_is_wrong_and_ends(formula):
    start = time.perf_counter()
    assert math(formula, "3", seconds=0.3) == 0.0
    assert time.perf_counter() - start < 30, "under a second on an idle machine"
    assert math("6/2", "3", seconds=0.3) == 1.0, "and what comes after it is compared"


def test_mathematics_needs_no_signal_and_no_main_thread():
    """math-verify's own limits take SIGALRM, which fails in a thread and disarms somebody else's alarm."""
    before, found = signal.getsignal(signal.SIGALRM), []
    thread = threading.Thread(target=lambda: found.append(math("$\\frac{9}{3}$", "3")))
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        thread.start()
        thread.join()
        assert found == [1.0]
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0 and signal.getsignal(signal.SIGALRM) is before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_a_process_that_somebody_killed_costs_no_answer():
    assert math("$\\frac{12}{3}$", "4") == 1.0
    (worker,) = [child for child in psutil.Process().children() if "vlm_grpo.rewards.math_worker" in child.cmdline()]
    worker.kill()
    assert math("$\\frac{16}{4}$", "4") == 1.0


def test_a_process_that_cannot_start_is_said(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RewardError, match='method "math": its process did not start .* Try: python -c'):
        math("$\\frac{15}{3}$", "5", seconds=7)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RewardError, match="math-verify, which is missing: pip install math-verify"):
        math("$\\frac{15}{3}$", "5", seconds=7)


def test_it_ends_with_the_interpreter():
    code = (
        "from vlm_grpo.rewards.accuracy import accuracy\n"
        "print(accuracy(['6/2'], answer=['3'], method='math'))\n"
        "import psutil; print(psutil.Process().children()[0].pid)"
    )
    done = subprocess.run([sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, check=True)
    value, pid = done.stdout.split("\n")[:2]
    assert value == "[1.0]" and not done.stderr and not psutil.pid_exists(int(pid))


# ---- auto, and any text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "choices", "expected"),
    [
        ("Yes, there is.", "yes", None, 1.0),
        ("No.", False, None, 1.0),
        ("B. a dog", "B", None, 1.0),
        ("a dog", "B", ["a cat", "a dog"], 1.0),
        ("B", "a dog", ["a cat", "a dog"], 1.0),
        ("The answer is 7.", 7, None, 1.0),
        ("1,234 kg", "1234", None, 1.0),
        ("$\\frac{2}{4}$", "\\frac{1}{2}", None, 1.0),
        ("A red car.", "a red car", None, 1.0),
        ("red", ["crimson", "red"], None, 1.0),
        ("two", ["2", "two"], None, 1.0),
        ("yes no A B 1 2", "red", None, 0.0),
        ("", "yes", None, 0.0),
    ],
)
def test_auto_decides_by_row(completion, answer, choices, expected):
    columns = {} if choices is None else {"choices": [choices]}
    assert accuracy([completion], answer=[answer], method="auto", **columns) == [expected]


PIECES = [
    "<answer>",
    "</answer>",
    "</think>",
    "A",
    "B.",
    "(b)",
    "answer is ",
    "yes",
    "no",
    "7",
    "1,0",
    "-",
    "/",
    ".",
    "e9",
]
PIECES += ["%", "=", " ", "\n", "\\frac", "{", "}", "$", "\\boxed{", "^", "or", "²", "\ud800"]
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(max_size=60)
ANSWERS = {"text": "7", "exact": "7", "number": "7", "choice": "B", "yes_no": "no", "auto": "B"}


@settings(max_examples=300, derandomize=True, deadline=None)
@given(HOSTILE)
def test_any_text_is_right_or_wrong(text):
    for method, answer in ANSWERS.items():
        assert right(text, answer, method=method, right=2.0, wrong=-1.0) in (2.0, -1.0)
    assert sum(right(text, answer, method="yes_no") for answer in ("yes", "no")) <= 1
    assert sum(right(text, answer, method="choice") for answer in "ABCDEFGHIJ") <= 1
    assert sum(right(text, answer, method="number") for answer in range(10)) <= 1


@settings(max_examples=40, derandomize=True, deadline=None)
@given(HOSTILE)
def test_any_text_is_a_formula_or_not(text):
    assert math(text, "7") in (0.0, 1.0)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_auto_takes_any_right_answer(text, answer):
    if not any(mark in answer for mark in "\\$^="):  # see above
        assert right(text, answer, method="auto") in (0.0, 1.0)


@pytest.mark.parametrize(
    "piece", ["A ", "A. ", "(", "the answer is ", "7 ", "7,000", "1", "no ", ".", " ", "<answer>", "-", "a\n", "$"]
)
def test_a_hundred_kilobytes_take_no_time(piece):
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    for method, answer in ANSWERS.items():
        right(text, answer, method=method)
    assert time.process_time() - start < 3.0, "0.3 s on an idle machine"


def test_other_columns_of_texts_are_no_options_of_a_text():
    many = [[f"s{number}" for number in range(30)]]
    assert accuracy(["cat"], answer=["cat"], choices=many) == [1.0], "segments, say: the method asks for no letter"
    with pytest.raises(RewardError, match="a row has 30 options"):
        accuracy(["A"], answer=["A"], choices=many, method="choice")
