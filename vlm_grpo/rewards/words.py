"""Texts as words in any script: shared by the speech, length and repetition rewards."""

import re
import unicodedata
from collections.abc import Hashable, Sequence
from typing import Any, Literal

from ..errors import RewardError
from .text import completion_text

Normalization = Literal["basic", "strict"]
Unit = Literal["tokens", "words", "characters"]

# Han, kana, Thai, Lao, Burmese and Khmer are written without spaces; so is the punctuation among them.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u303f\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff9f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_SPACE_BESIDE_UNSPACED = re.compile(rf"(?<=[{_UNSPACED}]) | (?=[{_UNSPACED}])")
_DOTLESS = frozenset({"tr", "tur", "turkish", "az", "aze", "azerbaijani"})
_APOSTROPHES = "'’ʼ＇`´"
_JOINERS = "\u200c\u200d"  # they change how Persian and Indic words read


def split_words(text: str) -> list[str]:
    """Runs without white space; in a script that is written without spaces, every character (code point) is a word."""
    return _WORD.findall(text)


def prepared(text: str, language: str | None = None, normalize: Normalization = "basic") -> str:
    """``text`` as transcripts are compared: without what cannot be heard.

    ``basic``: lower case, outer white space removed and inner white space made one space; composed (NFC), without
    invisible format characters (byte order and direction marks), without spaces beside a script that is written
    without. ``strict``: also wide and other compatible forms unified (NFKC), apostrophes removed, and every other
    punctuation mark or symbol (Unicode categories P and S) made a space.

    Args:
        language: Turkish and Azerbaijani ("tr", "tr-TR", "az", ...) lower I to ı; all others are treated alike.
    """
    form = "NFKC" if normalize == "strict" else "NFC"
    text = unicodedata.normalize(form, text)
    if language and re.split("[-_]", language.strip().casefold())[0] in _DOTLESS:
        text = text.replace("İ", "i").replace("I", "ı")
    text = unicodedata.normalize(form, text.casefold())
    text = "".join(character for character in text if _is_written(character))
    if normalize == "strict":
        kept = (character for character in text if character not in _APOSTROPHES)
        text = "".join(" " if unicodedata.category(character)[0] in "PS" else character for character in kept)
    return _SPACE_BESIDE_UNSPACED.sub("", " ".join(text.split()))


def _is_written(character: str) -> bool:
    # Half a surrogate pair is no character, and tokenizers fail on it.
    return unicodedata.category(character) not in ("Cf", "Cs") or character in _JOINERS


def in_units(completions: list[Any], columns: dict[str, Any], unit: Unit) -> list[Sequence[Hashable]]:
    """Each completion as its tokens (``completion_ids``), lower-case words, or characters (white space as one space).

    Raises:
        RewardError: tokens are asked for, and the caller gave no ``completion_ids``.
    """
    if unit == "tokens":
        if columns.get("completion_ids") is None:
            raise RewardError(
                "there are no completion_ids to count tokens in (the trainer gives them). Pass them, or set unit to "
                '"words" or "characters".'
            )
        return [list(ids) for ids in columns["completion_ids"]]
    texts = [" ".join(completion_text(completion).casefold().split()) for completion in completions]
    return [split_words(text) for text in texts] if unit == "words" else list(texts)
