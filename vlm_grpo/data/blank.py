"""The control of every claim that a model looks or listens: the same row with its media blanked."""

from dataclasses import replace
from typing import Any

from ..config import MediaOptions
from ..media import Medium, Video
from .sample import Sample, swap_media


def blanked(sample: Sample, options: MediaOptions, rate: int | None = None) -> Sample:
    """The sample with black pictures, black frames and silence of the same sizes and lengths, so of the same tokens.

    Args:
        sample: the row.
        options: how its media are opened.
        rate: samples a second that the processor hears; needed where there is sound.

    Raises:
        MediaError: a medium that cannot be opened.
    """
    return swap_media(sample, {id(medium): _blank(medium, options, rate) for medium in sample.media})


def _blank(medium: Medium, options: MediaOptions, rate: int | None) -> Medium:
    import numpy as np
    from PIL import Image

    def silence() -> Any:
        assert rate is not None, "the caller knows the processor"
        return np.zeros_like(medium.open_audio(rate, options))

    if medium.kind == "image":
        # Of the original size: the blank goes through the run's pixel bounds itself.
        original = Medium("image", medium.source, medium.where)
        blank: Any = Image.new("RGB", original.open().size)
    elif medium.kind == "audio":
        blank = silence()
    else:
        video: Video = medium.open_video(options)
        heard = silence() if options.audio_in_video else None
        blank = replace(video, frames=np.zeros_like(video.frames), sound=heard)
    return Medium(medium.kind, blank, medium.where, medium.overrides, rate if medium.kind == "audio" else medium.rate)
