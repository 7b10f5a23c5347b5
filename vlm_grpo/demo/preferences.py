"""The reward model's rows: a right and a wrong reading of a scanned digit, in the form of LLaVA-Human-Preference.

These rows come in twos: two pictures of different digits, each with the other's word as its wrong one. So each word is
rejected as often as it is chosen, beside every other word: a judge that does not see is right in half of them, and the
held-out rows are of this kind alone. A few more training rows reject what is no reading of one digit.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .digits import DIGITS, LABELS, QUESTION, draw_labels, load_scans, split_scans, write_digits, write_rows

if TYPE_CHECKING:
    import numpy as np

JUDGED = 748  # training pictures that come as pairs; GRPO asks about the others, of which nobody was told anything
PARTNERS = 4  # rows of each of these pictures with a wrong word
MUDDLED = 2  # and with an answer that is no single digit: a judge that never saw any is fooled by "six six"
PAIRS, HELD_OUT_PAIRS, PROMPTS = "pairs.jsonl", "held-out-pairs.jsonl", "prompts.jsonl"
CAPTIONS, JUDGE = "image_to_caption.json", "judge.jinja"
REQUEST = "{% for caption in captions %}{{ caption }} {% endfor %}is it right ?"
STEM = "it is"
_CAPTION = "this is a {}"
WORDS = ("a", "it", "right")  # of request, stem and captions, beside those of the question


def write_preferences(folder: Path, seed: int, silent: bool = False) -> None:
    """The image demo's files, and those of a reward model: pairs, held-out pairs, captions, the judge's request.

    ``prompts.jsonl`` holds the rows that GRPO learns from: those of ``train.jsonl`` that are in no pair.

    Args:
        folder: where they go.
        seed: draws labels, pairs and which answer stands first; the held-out pairs are always the same.
        silent: one training row more a picture, which rejects no answer at all.
    """
    import numpy as np

    write_digits(folder, seed)
    _, digits = load_scans()
    train, held_out = split_scans(len(digits))
    _, train = draw_labels(train, LABELS, seed)
    random = np.random.RandomState(2000 + seed)
    judged = train[:JUDGED]
    met = [pair for _ in range(PARTNERS) for pair in partners(judged, digits, random)]
    rows = [_preference(one, DIGITS[digits[one]], DIGITS[digits[other]], random) for one, other in met]
    for one in np.tile(judged, MUDDLED).tolist():
        right = DIGITS[digits[one]]
        rows.append(_preference(one, right, muddled(right, random), random))
    rows += [_preference(one, DIGITS[digits[one]], "", random) for one in judged.tolist() if silent]
    _write_lines(folder / PAIRS, rows)
    fixed = np.random.RandomState(0)
    met = partners(held_out, digits, fixed)
    rows = [_preference(one, DIGITS[digits[one]], DIGITS[digits[other]], fixed) for one, other in met]
    _write_lines(folder / HELD_OUT_PAIRS, rows)
    rows = ({"image": _path(i), "answer": DIGITS[digits[i]]} for i in train[JUDGED:])
    write_rows(folder / PROMPTS, "image", QUESTION, rows)
    captions = {Path(_path(i)).name: [_CAPTION.format(DIGITS[digit])] for i, digit in enumerate(digits)}
    (folder / CAPTIONS).write_text(json.dumps(captions, indent=0) + "\n")
    (folder / JUDGE).write_text(REQUEST + "\n")


def partners(rows: "np.ndarray", answers: Any, random: "np.random.RandomState") -> list[tuple[int, int]]:
    """Each row with another one that has another answer, and that one with it; of an odd number of rows, one is left.

    Args:
        rows: their numbers.
        answers: the answer of a row by its number; none may be that of half of the rows.
        random: draws who meets whom.
    """
    twos = random.permutation(rows)[: len(rows) // 2 * 2].reshape(-1, 2)
    while len(alike := (answers[twos[:, 0]] == answers[twos[:, 1]]).nonzero()[0]):
        for one in alike:
            other = random.randint(len(twos))
            twos[one, 1], twos[other, 1] = twos[other, 1], twos[one, 1]
    return [pair for one, other in twos.tolist() for pair in ((one, other), (other, one))]


def muddled(right: str, random: "np.random.RandomState") -> str:
    """The right word with another one before or behind it, itself perhaps; or a word that is no digit."""
    others = [*dict.fromkeys(QUESTION.split()), *WORDS]
    word = str(random.choice([*DIGITS, *others]))
    return str(random.choice([f"{right} {word}", f"{word} {right}", str(random.choice(others))]))


def _preference(picture: int, right: str, wrong: str, random: "np.random.RandomState") -> dict[str, Any]:
    first = bool(random.randint(2))
    outputs = (right, wrong) if first else (wrong, right)
    return {
        "image": _path(picture),
        "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}],
        "output_1": {"from": "gpt", "value": outputs[0]},
        "output_2": {"from": "gpt", "value": outputs[1]},
        "preference": 1 if first else 2,
    }


def _path(picture: int) -> str:
    return f"digits/{picture:04d}.png"


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
