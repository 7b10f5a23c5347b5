"""Captions of media, for a judge's eyes only (factual augmentation)."""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..data import Sample
from ..data.sample import shorten
from ..errors import DataFormatError
from ..media import Medium


@dataclass(frozen=True)
class Coverage:
    """How many rows have captions.

    Attributes:
        found, missing: rows with media that have a caption, or none.
        first: the first medium without one.
    """

    found: int
    missing: int
    first: str = ""

    def __str__(self) -> str:
        """One sentence about the rows without; empty where all have some."""
        if not self.missing:
            return ""
        rows = f"{self.missing:,} of {self.found + self.missing:,} rows"
        return f"{rows} {'has' if self.missing == 1 else 'have'} no caption (first: {self.first})"


@dataclass(frozen=True)
class Captions:
    """Captions by the names of media files.

    A name is a path's end: ``a.jpg`` and ``train/a.jpg`` name ``/data/train/a.jpg``, and so does ``a``; the longest
    wins. A name whose folders are not the medium's, such as ``coco/a.jpg``, names it where its file name is the only
    one of the kind. A row's own column ``captions`` comes before them.

    Attributes:
        texts: captions of each name.
        file: what messages call them.
    """

    texts: dict[str, list[str]] = field(default_factory=dict)
    file: str = "the captions"
    _by_name: dict[str, list[str]] = field(init=False, repr=False, compare=False, default_factory=dict)
    _by_end: dict[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for key in self.texts:
            path = _path(key)
            if not path.name:
                raise DataFormatError(f"{self.file}: {shorten(key)} is no name of a file. Correct it.")
            other = self._by_end.setdefault(path.as_posix(), key)
            if other != key:
                raise DataFormatError(f'{self.file}: "{other}" and "{key}" name the same file. Join their captions.')
            self._by_name.setdefault(path.name, []).append(key)

    @classmethod
    def read(cls, path: str | Path) -> "Captions":
        """``image_to_caption.json`` of LLaVA-RLHF: a file name, and its list of captions, or a single one.

        Raises:
            DataFormatError: no such file, no JSON, no object, a name twice, or a caption that is no text.
        """
        path = Path(path).expanduser()
        shape = 'Give a JSON object such as {"a.jpg": ["A cat on a mat."]}.'
        try:
            found = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_Pairs)
        except OSError as error:
            raise DataFormatError(
                f"The captions {path} cannot be read ({error.strerror}). Correct the path."
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataFormatError(f"The captions {path} are no JSON ({error}). {shape}") from error
        if not isinstance(found, _Pairs):
            raise DataFormatError(f"The captions {path} are a {type(found).__name__}. {shape}")
        texts: dict[str, list[str]] = {}
        for key, value in found:
            if key in texts:
                raise DataFormatError(f'{path}: "{key}" stands there twice. Join its captions.')
            try:
                texts[key] = _texts(value)
            except TypeError as error:
                raise DataFormatError(f'{path}: a caption of "{key}" is {error}. Give a text.') from error
        return cls(texts, str(path))

    def of(self, sample: Sample, seed: int = 0) -> list[str]:
        """The captions of a row, medium by medium, each medium's shuffled; empty where there are none.

        The order is the same for both answers of a pair, in every process and wherever the row stands, and another
        for another pair or seed.

        Raises:
            DataFormatError: a file name that several names in the file could mean, or a column ``captions`` that holds
                no texts.
        """
        groups = self._groups(sample)
        pair = sorted(str(sample.columns.get(name)) for name in ("chosen", "rejected"))
        told = json.dumps([seed, groups, _said(sample), pair])
        draw = random.Random(int.from_bytes(hashlib.sha256(told.encode()).digest(), "big"))
        return [text for group in groups for text in draw.sample(group, len(group))]

    def check(self, samples: Iterable[Sample]) -> Coverage:
        """Look through the rows before a run; rows without media are not counted.

        Raises:
            DataFormatError: no row has a caption, or two files share one, so that it cannot be of both; else as ``of``.
        """
        found = missing = 0
        first, users = "", {}
        for sample in samples:
            for medium, key in self._keys(sample):
                other = users.setdefault(key, medium.label)
                if other != medium.label:
                    raise DataFormatError(
                        f'{self.file}: "{key}" is the name of both {other} and {medium.label} — {sample.where}. Give '
                        "the names with their folders."
                    )
            if any(self._groups(sample)):
                found += 1
            elif sample.media:
                missing += 1
                first = first or sample.media[0].label
        if not found:
            names = ", ".join(f'"{key}"' for key in list(self.texts)[:3]) or "none"
            raise DataFormatError(
                f"No row has a caption: {self.file} has those of {names}, and the first medium of the rows is "
                f'{first or "missing"}. Give captions of these files, or a column "captions".'
            )
        return Coverage(found, missing, first)

    def _groups(self, sample: Sample) -> list[list[str]]:
        """The captions of each medium that has some."""
        own = sample.columns.get("captions")
        if own is None:
            return [self.texts[key] for key in dict.fromkeys(key for _, key in self._keys(sample))]
        try:
            return [_texts(own)]
        except TypeError as error:
            where = f"{sample.where}: " if sample.where else ""
            raise DataFormatError(f'{where}"captions" holds {error}. Give a list of texts.') from error

    def _keys(self, sample: Sample) -> Iterator[tuple[Medium, str]]:
        if sample.columns.get("captions") is not None:
            return
        for medium in sample.media:
            key = self._key(medium, sample.where)
            if key is not None:
                yield medium, key

    def _key(self, medium: Medium, where: str) -> str | None:
        """The name that stands for a medium; None where there is none, or the medium is no file."""
        if not isinstance(medium.source, Path):
            return None
        path = _path(str(medium.source))
        for start in range(len(path.parts)):
            end = PurePosixPath(*path.parts[start:])
            for name in (end, end.with_suffix("")):
                if name.as_posix() in self._by_end:
                    return self._by_end[name.as_posix()]
        for name in (path.name, path.stem):
            keys = self._by_name.get(name, [])
            if len(keys) > 1:
                raise DataFormatError(
                    f'{self.file}: both "{keys[0]}" and "{keys[1]}" could mean the {medium.kind} {medium.label} — '
                    f"{where}. Give its name with its folders."
                )
            if keys:
                return keys[0]
        return None


class _Pairs(list[tuple[str, Any]]):
    """The pairs of a JSON object, which a dict would lose one of where a name stands twice."""


def _path(name: str) -> PurePosixPath:
    return PurePosixPath(name.replace("\\", "/"))


def _texts(value: Any) -> list[str]:
    """Captions, without those that say nothing.

    Raises:
        TypeError: with what is no text.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or isinstance(texts, _Pairs):
        raise TypeError(shorten(value))
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None or None in texts:
        raise TypeError(shorten(wrong))
    return [text for text in texts if text.strip()]


def _said(sample: Sample) -> str:
    if isinstance(sample.prompt, str):
        return sample.prompt
    return "".join(part.get("text", "") for message in sample.prompt for part in message["content"])
