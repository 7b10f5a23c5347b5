"""``Medium``: an image, a video or a sound by path, bytes or object; lazy until a step needs it."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..config import MediaOptions
from ..errors import DataFormatError, MediaError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Kind = Literal["image", "video", "audio"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# What a row or a message part may set for its own media; the first six also for a whole run.
OVERRIDES = ("min_pixels", "max_pixels", "min_frames", "max_frames", "base_interval", "fps", "frame_cnts")
OVERRIDES = (*OVERRIDES, "dynamic_sample", "max_audio_seconds")


@dataclass(frozen=True, eq=False)
class Video:
    """Sampled frames of a clip.

    Attributes:
        frames: (F, H, W, 3) uint8.
        indices: the F frame numbers within the clip.
        total: frames of the whole clip.
        fps: its true rate, frames a second.
        duration: its length in seconds.
        sound: (samples,) of its audio track, only in a ``Video`` that is itself a source.
    """

    frames: "np.ndarray"
    indices: list[int]
    total: int
    fps: float
    duration: float
    sound: "np.ndarray | None" = None

    @property
    def sampled_fps(self) -> float:
        """Taken frames a second, on average over the clip."""
        return len(self.indices) / self.total * self.fps


class Medium:
    """One image, video or sound.

    Two media are the same only if they are the same object: identity is what lets the completions of a group share
    one encoding.

    Args:
        kind: ``image``, ``video`` or ``audio``.
        source: a path; the bytes of a file; a PIL image; a numpy array (video (F, H, W, 3), audio (samples,) or
            (channels, samples)); a list of frames for a video, each a path, bytes, PIL image or array; a ``Video``.
        where: how the user finds it again in an error message, such as ``train.jsonl row 17``.
        overrides: this medium's own values of some ``MediaOptions``, and ``frame_cnts``.
        rate: of the source where it does not say itself: frames a second for a list or array of frames, samples a
            second for an array of sound.
    """

    __slots__ = ("kind", "overrides", "rate", "source", "where")

    def __init__(
        self,
        kind: Kind,
        source: Any,
        where: str = "",
        overrides: dict[str, Any] | None = None,
        rate: float | None = None,
    ) -> None:
        self.kind: Kind = kind
        self.source = source
        self.where = where
        self.overrides = overrides or {}
        self.rate = rate

    @classmethod
    def of(
        cls,
        value: Any,
        kind: Kind = "image",
        root: Path | None = None,
        where: str = "",
        overrides: dict[str, Any] | None = None,
    ) -> "Medium":
        """Wrap whatever a row may hold.

        Args:
            value: what ``Medium`` takes as source (paths may be text, relative to ``root``), or a cell of a
                ``datasets`` Image, Video or Audio column, decoded or not.

        Raises:
            MediaError: the value is none of these.
        """
        if isinstance(value, cls):
            return value
        from .sources import to_source

        source, rate = to_source(value, kind, root, where)
        overrides = {key: item for key, item in (overrides or {}).items() if item is not None}
        return cls(kind, source, where, overrides, rate)

    @property
    def label(self) -> str:
        """A short name for logs: the path, or the kind of data in memory."""
        if isinstance(self.source, Path):
            return str(self.source)
        if isinstance(self.source, bytes):
            return f"<{len(self.source)} bytes>"
        if isinstance(self.source, (list, Video)):
            frames = self.source if isinstance(self.source, list) else self.source.frames
            return f"<{self.kind} of {len(frames)} frames>"
        if hasattr(self.source, "shape"):
            return f"<{self.kind} {'x'.join(map(str, self.source.shape))}>"
        size = getattr(self.source, "size", None)  # a decoder object has none
        return f"<{self.kind} {size[0]}x{size[1]}>" if size else f"<{self.kind} {type(self.source).__name__}>"

    def options(self, run: MediaOptions | None = None) -> MediaOptions:
        """The run's options with this medium's own values on top.

        Raises:
            DataFormatError: one of its values cannot be.
        """
        run = run or MediaOptions()
        own = {key: value for key, value in self.overrides.items() if key != "frame_cnts"}
        if not own:
            return run
        rate_given = own.get("fps") is not None or own.get("base_interval") is not None
        values = run.model_dump(exclude_unset=True) | ({"fps": None, "base_interval": None} if rate_given else {})
        for low, high in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
            if (low in own) != (high in own):  # the medium's own limit is nearer than the run's other one
                mine, other = (low, high) if low in own else (high, low)
                limit = values.get(other)
                if limit is not None and (limit < own[mine] if mine == low else limit > own[mine]):
                    values.pop(other)
        values |= own
        try:
            return MediaOptions.model_validate(values)
        except ValueError as error:
            problems = "; ".join(problem["msg"] for problem in error.errors())  # type: ignore[attr-defined]
            raise DataFormatError(
                f'The {self.kind} "{self.label}" has the options {own}, which cannot be ({problems})'
                f"{self.at}. Correct them in the row."
            ) from error

    @property
    def at(self) -> str:
        """``" — train.jsonl row 17"``, or an empty text."""
        return f" — {self.where}" if self.where else ""

    def open(self, run: MediaOptions | None = None) -> "Image":
        """An image: upright, RGB, within ``min_pixels`` and ``max_pixels``.

        Raises:
            MediaError: missing, empty, truncated, or not an image.
        """
        from .image import open_image

        return open_image(self, self.options(run))

    def open_video(self, run: MediaOptions | None = None, draw: random.Random | None = None) -> Video:
        """A video's frames, chosen by the frame rules; ``draw`` chooses their number under ``dynamic_sample``.

        Raises:
            MediaError: missing, empty, torn, or without frames.
        """
        if isinstance(self.source, Video):
            return self.source
        from .video import open_video

        return open_video(self, self.options(run), draw)

    def open_audio(self, rate: int, run: MediaOptions | None = None) -> "np.ndarray":
        """(samples,) float32 in [-1, 1], mono, at ``rate`` samples a second; of a video, its audio track.

        Raises:
            MediaError: missing, empty, torn, without an audio track, or with NaN.
        """
        if isinstance(self.source, Video):
            assert self.source.sound is not None, "whoever makes a Video a source gives its sound where it is heard"
            return self.source.sound
        from .audio import open_audio

        return open_audio(self, self.options(run), rate)

    def __deepcopy__(self, memo: dict) -> "Medium":
        # TRL deep-copies every prompt, G times a step.
        return self

    def __repr__(self) -> str:
        return f"Medium({self.kind}, {self.label})"


def refuse(medium: Medium, reason: str, advice: str = "Replace it or remove the row.") -> MediaError:
    """The error for a medium that cannot be read."""
    return MediaError(f'The {medium.kind} "{medium.label}" cannot be read ({reason.rstrip(".")}){medium.at}. {advice}')
