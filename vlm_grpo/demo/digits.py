"""The image demo's rows: scikit-learn's 1,797 scanned digits as PNG files. Their split serves the video demo too."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "which digit is this ?"
SIDE = 56  # pixels; 4 image tokens of 28 x 28
TRAINING_ROWS, LABELS = 1347, 100


def write_digits(folder: Path, seed: int) -> None:
    """The scans as PNG files and three JSON-lines files: labels, train, held-out.

    Args:
        folder: where they go.
        seed: draws the labels from the training rows; the held-out rows are always the same.
    """
    scans, digits = load_scans()
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    for index, scan in enumerate(scans):
        picture_of(scan, SIDE).convert("RGB").save(folder / "digits" / f"{index:04d}.png")
    train, held_out = split_scans(len(scans))
    labels, train = draw_labels(train, LABELS, seed)
    for name, part in (("labels", labels), ("train", train), ("held-out", held_out)):
        rows = ({"image": f"digits/{i:04d}.png", "answer": DIGITS[digits[i]]} for i in part)
        write_rows(folder / f"{name}.jsonl", "image", QUESTION, rows)


def load_scans() -> tuple["np.ndarray", "np.ndarray"]:
    """The scans (1797, 8, 8), 0 to 16, and the digit of each (1797,).

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            'The demo\'s digits come with scikit-learn. Install it: pip install "vlm-grpo[demo]".'
        ) from error
    digits: Any = load_digits()
    return digits.images, digits.target


def split_scans(count: int) -> tuple["np.ndarray", "np.ndarray"]:
    """The numbers of the training scans and of the held-out ones: the same for every seed."""
    import numpy as np

    order = np.random.RandomState(0).permutation(count)
    return order[:TRAINING_ROWS], order[TRAINING_ROWS:]


def draw_labels(rows: "np.ndarray", count: int, seed: int) -> tuple["np.ndarray", "np.ndarray"]:
    """``count`` of the training rows, whose answers the warm start learns, and the others."""
    import numpy as np

    rows = np.random.RandomState(1000 + seed).permutation(rows)
    return rows[:count], rows[count:]


def draw_balanced(rows: "np.ndarray", each: int, seed: int, answers: Any) -> tuple["np.ndarray", "np.ndarray"]:
    """As ``draw_labels``, with ``each`` rows of every answer: a policy that never gives one is never rewarded for it.

    ``answers``: the answer of a row by its number.
    """
    import numpy as np

    rows = np.random.RandomState(1000 + seed).permutation(rows)
    seen: Counter[str] = Counter()
    chosen = np.zeros(len(rows), bool)
    for place, row in enumerate(rows.tolist()):
        chosen[place] = seen[answers[row]] < each
        seen[answers[row]] += 1
    return rows[chosen], rows[~chosen]


def picture_of(scan: "np.ndarray", side: int) -> "Image":
    """A scan (8, 8) as a grey picture of ``side`` x ``side`` pixels."""
    import numpy as np
    from PIL import Image

    pixels = np.clip(scan * 15.94, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)


def write_rows(path: Path, kind: str, question: str, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line: a question about one medium of ``kind``, then the row's own columns."""
    prompt = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}]
    path.write_text("".join(json.dumps({"prompt": prompt, **row}) + "\n" for row in rows))
