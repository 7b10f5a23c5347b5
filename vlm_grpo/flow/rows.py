"""The rows that the flow check looks at: found in the columns of a table, nothing decoded until one is taken."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..data import MEDIA_COLUMNS, Sample, to_sample
from ..data.sample import COLUMNS
from ..encode import EncodedPrompt
from ..errors import EncodingError, MediaError, OverlongError
from ..intake import Intake
from ..media import KINDS, Kind

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

_FIRST = 20  # candidates for a kind of row that the columns tell: some of them may be unusable
_LOOKED_AT = 500  # rows whose messages are searched for media
_TRANSFORMED = 50  # the same where reading a row runs the user's own code
_TWINS = 5  # rows encoded in search of other media of the same kind
_SOURCES = {*KINDS, "url", "path", "bytes"}


@dataclass(frozen=True)
class Probe:
    """A row under test.

    Attributes:
        sample, encoding: the row.
        kinds: the kinds of media that it holds; none: text.
        shows: those of them that it is the first to hold.
        completion: the T tokens that are scored after it.
    """

    sample: Sample
    encoding: EncodedPrompt
    kinds: tuple[Kind, ...]
    shows: tuple[Kind, ...]
    completion: list[int]


def choose(
    rows: Iterable[tuple[str, dict[str, Any]]], intake: Intake, wanted: set[str], avoid: set[int], mixed: bool = True
) -> list[Probe]:
    """One row of each wanted kind, and a second one with other media of a kind that is there.

    Args:
        rows: candidates with how the user finds them again, best first.
        intake: reads them; rows that it leaves out are passed over, and not counted.
        wanted: kinds of media, and ``text`` for a row without.
        avoid: token ids that no completion may hold.
        mixed: whether rows ever share a batch; if not, a second row and one without media have nothing to show.

    Raises:
        MediaError, EncodingError, OverlongError: a row that the run would not leave out either.
    """
    probes: list[Probe] = []
    left_out, twins, twin = intake.left_out.copy(), 0, not mixed
    wanted = wanted if mixed else wanted - {"text"}
    for where, row in rows:
        seen = {kind for probe in probes for kind in probe.kinds or ("text",)}
        if wanted <= seen and twin:
            break
        try:
            sample = to_sample(row, intake.root, where)
        except MediaError as error:
            intake.leave_out(error)
            continue
        kinds = kinds_of(sample, intake)
        new = bool(set(kinds or ("text",)) & wanted - seen)
        if not new and (twin or not kinds or twins == _TWINS):
            continue
        try:
            encoding = intake.encode(sample)
        except (MediaError, EncodingError, OverlongError) as error:
            intake.leave_out(error)
            continue
        alike = [probe for probe in probes if set(probe.kinds) & set(kinds)]
        other = all(differ(encoding, probe.encoding) for probe in alike)
        twins += not new
        if new or other:
            shows: tuple[Kind, ...] = tuple(kind for kind in kinds if kind not in seen)
            probes.append(Probe(sample, encoding, kinds, shows, _completion(encoding, avoid)))
            twin = twin or (bool(alike) and other)
    intake.left_out.clear()
    intake.left_out.update(left_out)
    return probes


def kinds_of(sample: Sample, intake: Intake) -> tuple[Kind, ...]:
    """The kinds of media that the model gets of a row, in the order of ``KINDS``."""
    found = {medium.kind for medium in sample.media}
    if intake.media.audio_in_video and "video" in found:
        found.add("audio")
    return tuple(kind for kind in KINDS if kind in found)


def differ(one: EncodedPrompt, other: EncodedPrompt) -> bool:
    """Whether two rows hold other media, as the processor sees them."""
    pairs = [(one.media.get(key), other.media.get(key)) for key in one.media | other.media]
    return any(a is None or b is None or a.shape != b.shape or bool((a != b).any()) for a, b in pairs)


_TOKENS = 3


def _completion(encoding: EncodedPrompt, avoid: set[int]) -> list[int]:
    """Ordinary tokens, taken from the prompt's own words: unlike a likely answer, which a trained model may give with
    certainty whatever it sees, their log-probabilities always move with what it sees."""
    words = [token for token in encoding.input_ids if token not in avoid]
    words = words or [token for token in range(len(avoid) + 1) if token not in avoid]
    return [words[round(i * (len(words) - 1) / (_TOKENS - 1))] for i in range(_TOKENS)]


def candidates(dataset: "Dataset") -> tuple[Iterator[tuple[str, dict[str, Any]]], set[str]]:
    """Rows of a table to look at, and the kinds that may be found there (``text``: rows without media)."""
    custom = dataset.format["type"] == "custom"
    searched = custom or _may_hold_media(dataset.features.get("prompt"))
    count = min(len(dataset), _TRANSFORMED if custom else _LOOKED_AT)
    spread = [round(i * (len(dataset) - 1) / max(count - 1, 1)) for i in range(count)] if searched else []
    told, wanted = ([], set()) if custom else _told_by_columns(dataset)
    order = dict.fromkeys(chain(told, spread))
    rows = ((f"row {index} of train_dataset", dataset[index]) for index in order)
    return rows, {*KINDS, "text"} if searched else wanted


def _told_by_columns(dataset: "Dataset") -> tuple[list[int], set[str]]:
    columns = [name for name in MEDIA_COLUMNS if name in dataset.column_names]
    held = {name: _held(dataset, name) for name in columns}
    told, wanted = [], {COLUMNS[name] for name in columns if held[name].any()}
    for name in columns:
        told += held[name].nonzero()[0][:_FIRST].tolist()
    if columns:
        without = ~sum(held.values()).astype(bool)  # type: ignore[union-attr]
        told += without.nonzero()[0][:_FIRST].tolist()
        wanted |= {"text"} if without.any() else set()
    return told, wanted


def _held(dataset: "Dataset", column: str) -> "np.ndarray":
    """(rows,) whether the cell holds anything. Reads no medium: a table keeps this apart from the bytes."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import compute

    pc: Any = compute  # its functions are made at run time
    cells = dataset.data.column(column)
    held = pc.is_valid(cells)
    if pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        held = pc.and_(held, pc.fill_null(pc.greater(pc.list_value_length(cells), 0), False))
    out = np.asarray(held.to_numpy(), bool)
    indices = dataset._indices  # of a shuffled or filtered table; there is no public way that reads no cell
    return out if indices is None else out[indices.column(0).to_numpy()]


def _may_hold_media(feature: Any) -> bool:
    """Whether message parts of this type can name a medium."""
    from datasets import Value

    if isinstance(feature, dict):
        return bool(_SOURCES & set(feature)) or any(_may_hold_media(inner) for inner in feature.values())
    inner = feature[0] if isinstance(feature, (list, tuple)) else getattr(feature, "feature", None)
    return _may_hold_media(inner) if inner is not None else not isinstance(feature, Value)
