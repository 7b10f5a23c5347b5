"""What a text answers: yes or no, a choice, a number. Shared by rewards and evaluation.

Every reader gives one answer or None and never looks at the right one, so a text that lists several answers, to be
right whatever is asked, gains nothing.
"""

import functools
import math
import re
from collections.abc import Sequence

from .text import answer_body

_SENTENCE_END = re.compile(r"[.!?。！？\n]+")
_AROUND_WORDS = " \t\"'`*_“”‘’()[]{}<>:;-–—"
_THOUGHT = "</think>"


def said(text: str) -> str:
    """The body of the first ``<answer>…</answer>``; without one, what follows the last ``</think>``, or all."""
    body = answer_body(text)
    return body if len(body) < len(text) else text[text.rfind(_THOUGHT) + len(_THOUGHT) :] if _THOUGHT in text else text


# ---- yes or no ----------------------------------------------------------------------------------------------------


def yes_or_no(text: str, strict: bool = False) -> str | None:
    """``"yes"`` or ``"no"`` as POPE-style evaluations read it, or None for a text without a word.

    "no" where the first sentence has the word "no" or "not" (commas removed, any case), else "yes".

    Args:
        strict: "yes" has to be said ("yes" or "true", as "false" then says no), and other texts are None. For rewards,
            which would else pay for anything at all where the answer is yes.
    """
    for sentence in _SENTENCE_END.split(said(text)):
        words = [word.strip(_AROUND_WORDS) for word in sentence.casefold().replace(",", "").split()]
        if not any(words):
            continue
        if "no" in words or "not" in words or (strict and "false" in words):
            return "no"
        return "yes" if not strict or "yes" in words or "true" in words else None
    return None


# ---- a choice -----------------------------------------------------------------------------------------------------

_TYPESETTING = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)(?=\{)|[{}$*_`]")


def choice_letter(text: str, letters: Sequence[str] = "ABCD") -> str | None:
    r"""The one letter of ``letters`` (capitals) that a text chooses, or None.

    Read are, with ``**``, ``$`` and ``\boxed{}`` taken away: a letter alone ("B", "(b)", "b."), a letter in front
    ("B. a cat", "(B) a cat", "B, a cat"; "A cat" is no choice), and what the text calls the answer ("the correct
    option is B", "Answer: (b)", "B is correct"). Two different ones ("A. cat B. dog", "A or B", "The answer is A. The
    answer is B.") are none. A letter in front allows no second marked letter ("B. It is not (A)"), unless the text
    also says which of them is the answer.
    """
    text = " ".join(_TYPESETTING.sub("", said(text)).split()).strip("\"'“”‘’ ")
    alone, front, called, another, marked = _choice_patterns("".join(letters))
    if match := alone.fullmatch(text):
        return match["letter"].upper()
    first = front.match(text)
    calls = list(called.finditer(text))
    found: set[str] = set()
    for match in [first, *calls] if first else calls:
        letter = match["letter"] or match["subject"]
        found.add(letter.upper())
        after = match.end("letter") if match["letter"] else match.end("subject")
        if second := another.match(text, after):
            found.add(second["letter"].upper())
    if first and not calls:
        found |= {match["letter"].upper() for match in marked.finditer(text)}
    return found.pop() if len(found) == 1 else None


@functools.cache
def _choice_patterns(letters: str) -> tuple[re.Pattern[str], ...]:
    """Patterns for white space already made single; no two repeats in a row may match the same character."""
    upper, lower = letters.upper(), letters.lower()
    words = "".join(letter for letter in upper if letter in "AI")  # "A cat", "I see"
    either = rf"(?:[{upper}](?![\w'’])|[{lower}](?=[).\]:]|$))"
    plain = f"[{''.join(letter for letter in upper if letter not in words) or upper}]"
    unmarked = rf"{plain}(?= (?!is\b|isn|was\b|are\b|or\b|and\b|cannot\b|can't))|[{upper}](?=,| [-–—] )"
    front = rf"[(\[]?(?P<letter>[{upper}](?=[).\]:])|[{lower}](?=[).\]:](?: |$))|{unmarked})(?P<subject>)"
    be = r"(?:is|was|would be|should be|must be)"
    adverb = r"(?:(?:definitely|clearly|therefore|probably|most likely|likely|thus) )?"
    verb = rf"(?:answer|option|choice)(?: {be}(?: ?:)?| ?[:=])|\b(?:choose|pick|select|answer)"
    called = (
        rf"(?i:\b(?:{verb}) ?{adverb}(?:the )?(?:(?:option|choice|letter|answer) )?)[(\[\"'“]*+(?P<letter>{either})"
    )
    judged = r"is (?:the )?(?:most |only |best )?(?:correct|right|answer|best)\b"
    right = rf"(?<![\w'’])(?P<subject>[{upper}])[)\].\"”]{{0,2}} {judged}"
    joined = r"[)\].\"'”]*+(?: ?[,;/&|+])? ?(?:(?:or|and) )?(?:(?:option|choice) )?[(\[\"'“]*+"
    listed = rf"(?=$|[.,;:)\]/&|+]| [{upper}](?!\w)| or | and )"
    return tuple(
        re.compile(pattern)
        for pattern in (
            rf"[(\[ ]*+(?i:(?:option|choice|answer) )?[(\[]*+(?P<letter>[{upper}{lower}])[)\].:,;!? ]*",
            front,
            f"{called}|{right}",
            rf"{joined}(?P<letter>{either}){listed}",
            rf"(?<![\w'’.])(?:[(\[]?(?P<letter>[{upper}])(?:[)\]:]|\. (?=\w)))",
        )
    )


# ---- a number -----------------------------------------------------------------------------------------------------

_NUMBER = re.compile(
    # Not inside a word ("x2"), a date, a version, a clock time, a range or a list without spaces ("1,2").
    r"(?<![\w.])(?<!\d[,/:])(?<![\w)][-+−–])"
    r"(?P<sign>[-+−]?)[€£¥]?(?P<top>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?P<power>[eE][-+]?\d+)?"
    r"(?: ?/ ?(?P<bottom>\d+(?:\.\d+)?))?(?!\d|[.,:]\d| ?/ ?\d|[-–]\d|[eE][-+]?\d)(?P<percent> ?(?:%|percent\b))?"
)
_FRACTION = re.compile(r"\\[dt]?frac ?\{(\d+)\} ?\{(\d+)\}")
_MARKS = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)(?=\{)|\\(?=%)|[{}$*`]")
# "3 + 4 = 7", "the answer is 7": of several numbers, the one that the text calls the answer.
_CALLED = re.compile(r"(?:[=≈]|\b(?:answer|result|total|count)(?: is| are)?:?) ?$", re.IGNORECASE)
_CALL_LENGTH = 16  # characters, "the result are: " is the longest

_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: value for value, word in enumerate(_ONES)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_WORDS |= {"none": 0, "hundred": 100} | {
    f"{ten}-{one}": 20 + 10 * i + j for i, ten in enumerate(_TENS) for j, one in enumerate(_ONES[1:10], 1)
}
_WORD = re.compile(rf"(?<![\w-])(?:{'|'.join(sorted(_WORDS, key=len, reverse=True))})(?![\w-])")


def number_in(text: str) -> float | None:
    r"""The one number that a text answers, or None.

    Read are ``7``, ``-7``, ``1,234.5``, ``.5``, ``1e-3``, ``3/4``, ``\frac{3}{4}``, ``45%`` (0.45, never 45), a
    currency sign in front and any unit behind (``7 kg`` is 7: units are not compared); in a text without digits the
    English words from "zero" and "none" to "ninety-nine" and "hundred". Dates, clock times, ranges (2-3) and decimal
    commas (1,5) are no numbers. Of several different numbers the one that is called the answer counts ("3 + 4 = 7",
    "of the 9, the answer is 7"); if none or two are, the text answers none.
    """
    text = " ".join(_MARKS.sub(" ", _FRACTION.sub(r"\1/\2", said(text))).split())
    found = [(match.start(), _value(match)) for match in _NUMBER.finditer(text)]
    if not any(character.isdecimal() for character in text):
        found = [(match.start(), float(_WORDS[match[0]])) for match in _WORD.finditer(text.casefold())]
        text = text.casefold()
    values = {value for _, value in found}
    if len(values) > 1:
        values = {value for start, value in found if _CALLED.search(text[max(0, start - _CALL_LENGTH) : start])}
    value = values.pop() if len(values) == 1 else math.inf
    return value if math.isfinite(value) else None


def _value(match: re.Match[str]) -> float:
    """Infinite where there is no such float, as ``1e999`` and ``1/0``."""
    bottom = float(match["bottom"] or 1)
    value = float(match["top"].replace(",", "") + (match["power"] or "")) / bottom if bottom else math.inf
    return value * (-1 if match["sign"] in ("-", "−") else 1) * (0.01 if match["percent"] else 1)
