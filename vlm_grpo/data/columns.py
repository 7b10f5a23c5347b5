"""Media columns of a ``datasets`` table: kept undecoded until a step needs them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


# Where a stream remembers the features that it lost.
_PICTURES = "_vlm_grpo_pictures"


def undecoded(dataset: Any) -> "tuple[Dataset | IterableDataset, dict[str, Any]]":
    """The dataset with its Image, Video and Audio columns (and lists of them) as bytes or paths.

    Reading a row then decodes nothing: no picture is decoded once for each of its G completions, none that is broken
    stops the data loader, and sound and video need no further package.

    Returns:
        the dataset (or several, as a dict of them), and the features that were decoding pictures, by column:
        ``decoded`` restores them for rewards.
    """
    import datasets

    if isinstance(dataset, dict):  # several, by name
        parts = {name: undecoded(part) for name, part in dataset.items()}
        pictures = {column: feature for _, found in parts.values() for column, feature in found.items()}
        return {name: part for name, (part, _) in parts.items()}, pictures  # type: ignore[return-value]
    features = getattr(dataset, "features", None)
    pictures = dict(getattr(dataset, _PICTURES, {}))
    if not features or getattr(dataset, "format", {}).get("type") == "custom":  # a transform makes the rows
        return dataset, pictures
    for column, feature in features.items():
        inner = inner_feature(feature)
        if not isinstance(inner, (datasets.Image, datasets.Video, datasets.Audio)) or not inner.decode:
            continue
        raw = type(inner)(decode=False)
        dataset = _labelled(dataset, column, raw if inner is feature else datasets.List(raw))
        if isinstance(inner, datasets.Image):
            pictures[column] = inner
    return dataset, pictures


def remembering(stream: "IterableDataset", pictures: dict[str, Any]) -> "IterableDataset":
    """A stream whose rows are made anew, and so have no features, with those of its pictures for ``undecoded``."""
    setattr(stream, _PICTURES, pictures)
    return stream


def _labelled(dataset: Any, column: str, feature: Any) -> Any:
    """The column under another feature of the same storage; ``cast_column`` writes lists anew, pictures included."""
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        return dataset.cast_column(column, feature)
    info, format_ = dataset.info.copy(), dataset.format
    info.features = datasets.Features({**dataset.features, column: feature})
    table = dataset.data.cast(info.features.arrow_schema)
    whole = datasets.Dataset(table, info=info, split=dataset.split, indices_table=dataset._indices)
    return whole.with_format(**format_) if format_["type"] else whole


def inner_feature(feature: Any) -> Any:
    """What a list feature lists; any other feature itself."""
    return getattr(feature, "feature", feature)


def decoded(row: dict[str, Any], pictures: dict[str, Any], where: str = "") -> dict[str, Any]:
    """The row with its pictures as PIL images again, as reward functions expect them.

    Raises:
        MediaError: one that cannot be read, in whatever column: only those that the model sees are looked at before.
    """
    from ..media import Medium
    from ..media.problems import reading

    def decode(feature: Any, value: Any) -> Any:
        if isinstance(value, list):
            return [decode(feature, item) for item in value]
        if not isinstance(value, dict):
            return value
        with reading(Medium.of(value, "image", where=where)):
            return feature.decode_example(value)

    return {**row, **{name: decode(feature, row[name]) for name, feature in pictures.items() if name in row}}
