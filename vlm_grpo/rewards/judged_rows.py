"""The rows of a call as a reward model sees them: shown by the run, or read here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..data import MEDIA_COLUMNS, Sample
from ..encode import EncodedPrompt
from ..intake import Intake
from ..media import OVERRIDES
from .showing import Shown

# What of a row decides how its media are seen.
_COLUMNS = (*MEDIA_COLUMNS, *OVERRIDES, "meta", "audio_in_video")


class JudgedRows:
    """Knows the rows that the run has shown, and reads any other."""

    def __init__(self) -> None:
        self._rows: list[Shown] = []

    @contextmanager
    def seeing(self, rows: list[Shown]) -> Iterator[None]:
        """Within it, calls are about these rows."""
        before, self._rows = self._rows, rows
        try:
            yield
        finally:
            self._rows = before

    def of(
        self, prompts: Sequence[Any], columns: dict[str, Any], intake: Intake, theirs: bool
    ) -> list[tuple[Sample, EncodedPrompt]]:
        """The sample and the encoding of each row of a call; rows of equal prompts and media share both objects.

        Args:
            prompts, columns: what the reward is called with.
            intake: reads and encodes what was not shown, or not as it is to be seen.
            theirs: whether the policy's encodings are used.
        """
        known: dict[Any, tuple[Sample, EncodedPrompt]] = {}
        found = []
        names = [name for name in _COLUMNS if isinstance(columns.get(name), list | tuple)]
        places = self._places(prompts)
        for number, prompt in enumerate(prompts):
            row = {"prompt": prompt, **{name: columns[name][number] for name in names}}
            shown = self._shown(places[number], row)
            if shown is not None and shown.encoding is not None and theirs:
                found.append((shown.sample, shown.encoding))
                continue
            key = _content(row) if shown is None else id(shown.sample)
            if key not in known:
                known[key] = intake.read(row) if shown is None else (shown.sample, intake.encode(shown.sample))
            found.append(known[key])
        return found

    def _places(self, prompts: Sequence[Any]) -> list[int | None]:
        """Of each prompt, which of the shown rows it is: by its place, or in a part of the call by the object."""
        theirs = [row.original["prompt"] for row in self._rows]
        if len(prompts) == len(theirs) and all(a is b for a, b in zip(prompts, theirs, strict=True)):
            return list(range(len(prompts)))
        places: dict[int, list[int]] = {}
        for place, prompt in enumerate(theirs):
            places.setdefault(id(prompt), []).append(place)
        samples = {key: {id(self._rows[place].sample) for place in some} for key, some in places.items()}
        # Rows with other media may hold the same text, which tells nothing then.
        return [places[id(p)][0] if len(samples.get(id(p), ())) == 1 else None for p in prompts]

    def _shown(self, place: int | None, row: dict[str, Any]) -> Shown | None:
        """The row that was shown, unless the reward is called with other media than that has."""
        if place is None:
            return None
        shown = self._rows[place]
        return shown if all(value is shown.original.get(name) for name, value in row.items()) else None


def _content(row: dict[str, Any]) -> str:
    """Equal for rows of equal content: pictures that a table decodes are other objects each time."""
    from datasets.fingerprint import Hasher

    return Hasher.hash(row)
