"""Small copies of a run's media: kept in the run folder while it trains, and put into a page afterwards."""

import hashlib
import logging
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ..config import MediaOptions
from ..errors import VLMGRPOError
from ..media import Kind, Medium
from ..media.preview import Preview, playable, preview_image, preview_sound, preview_video
from ..media.problems import read_errors

logger = logging.getLogger("vlm_grpo")

FOLDER = "media"
_SIDE, _FRAME_HEIGHT, _SECONDS, _VIDEO_BYTES = 256, 96, 15.0, 1_000_000
_PIXELS = 4 * _SIDE * _SIDE
# Of one rollout, so that no step waits; and of a run, so that a long one does not fill the disk.
_ROLLOUT_MEDIA, _ROLLOUT_BYTES, _ROLLOUT_SECONDS, _RUN_BYTES = 16, 8_000_000, 5.0, 400_000_000


def preview(medium: Medium, options: MediaOptions | None = None) -> Preview:
    """A copy of at most about 1 MB that a browser shows: a picture, the clip itself or its frames, or a sound.

    Raises:
        VLMGRPOError: it cannot be opened.
    """
    options = options or MediaOptions()
    # Decoders are quicker where they know that little is wanted.
    most = min(options.max_pixels or _PIXELS, _PIXELS)
    options = options.model_copy(update={"min_pixels": None, "max_pixels": most})
    if medium.kind == "image":
        return preview_image(medium, _SIDE, options)
    if medium.kind == "audio":
        return preview_sound(medium, _SECONDS, options=options)
    return playable(medium, _VIDEO_BYTES) or preview_video(medium, _FRAME_HEIGHT, options=options)


_KINDS: dict[str, Kind] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v"), "video"),
    **dict.fromkeys((".wav", ".mp3", ".ogg", ".flac", ".m4a", ".opus", ".aac"), "audio"),
}


class MediaFolder:
    """The previews of a run: ``media/<hash>.<ext>``, each written once, also over resumes.

    It never stops a run: what cannot be opened or written is left out and said once. A rollout adds 16 previews, 8 MB
    and 5 seconds at most, and the run 400 MB, spread over its steps, so that its last step has pictures too.

    Args:
        run: the run folder.
        options: how the run opens media.
    """

    def __init__(self, run: Path, options: MediaOptions | None = None) -> None:
        self.folder, self.options = run / FOLDER, options
        self._known: dict[tuple[Any, ...], str | None] = {}
        self._bytes: int | None = None
        self._said: set[str] = set()
        self._until, self._left, self._more = 0.0, 0, 0

    def begin(self, progress: float) -> None:
        """Before the media of a rollout; ``progress`` is the share of the run that is done, 0 to 1."""
        if self._bytes is None:
            self._bytes = sum(file.stat().st_size for file in self.folder.glob("*.*") if file.is_file())
        self._until, self._more = time.monotonic() + _ROLLOUT_SECONDS, _ROLLOUT_MEDIA
        self._left = min(_ROLLOUT_BYTES, int(_RUN_BYTES * min(1.0, progress + 0.05)) - self._bytes)

    def keep(self, media: Sequence[Sequence[Medium]]) -> list[list[dict[str, str]]]:
        """Keep the media of the rows of a rollout.

        Returns:
            for each row ``{"kind", "file"}`` of each medium that has a preview, the file relative to the run folder.
        """
        # Objects live as long as this call: beyond it only a file's name tells that it is the same medium.
        files: dict[int, str | None] = {}
        for medium in chain.from_iterable(media):
            if id(medium) not in files:
                files[id(medium)] = self._file(medium)
        return [
            [{"kind": medium.kind, "file": file} for medium in row if (file := files[id(medium)]) is not None]
            for row in media
        ]

    def _file(self, medium: Medium) -> str | None:
        key = (medium.kind, str(medium.source), repr(medium.overrides)) if isinstance(medium.source, Path) else None
        if key is not None and key in self._known:
            return self._known[key]
        if self._left <= 0 or self._more <= 0 or time.monotonic() > self._until:
            return None
        self._more -= 1
        try:
            file = self._write(preview(medium, self.options))
        except (VLMGRPOError, *read_errors()) as error:
            file = None
            if str(error) not in self._said and len(self._said) < 10:
                self._said.add(str(error))
                logger.warning("Left out of the samples: %s", error)
        if key is not None:
            self._known[key] = file
        return file

    def _write(self, found: Preview) -> str:
        path = self.folder / f"{hashlib.sha256(found.data).hexdigest()[:24]}{found.suffix}"
        if not path.exists():
            self.folder.mkdir(exist_ok=True)
            beside = path.with_name(f".{path.name}.new")
            beside.write_bytes(found.data)
            beside.replace(path)
            self._left -= len(found.data)
            self._bytes = (self._bytes or 0) + len(found.data)
        return f"{FOLDER}/{path.name}"


def medium_of_label(label: str) -> Medium | None:
    """The medium of a file that a log names, if it is still there and its name says what it is."""
    path = Path(label)
    kind = kind_of_file(path)
    try:
        return Medium(kind, path) if kind is not None and path.is_file() else None
    except (OSError, ValueError):  # a name too long for the system, or with a NUL
        return None


def kind_of_file(path: Path) -> Kind | None:
    """By the end of its name."""
    return _KINDS.get(path.suffix.lower())
