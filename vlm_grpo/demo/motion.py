"""The video demo's rows: clips of real handwritten digits that move left, right, up or down.

A single frame says little: the middle of the path is drawn alike for all directions, and a clip played backwards
shows the same frames with the opposite answer.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from .digits import draw_balanced, load_scans, picture_of, split_scans, write_rows

if TYPE_CHECKING:
    import numpy as np

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
QUESTION = "which way does it move ?"
SIDE, DIGIT, FRAMES, FPS = 56, 20, 4, 4  # pixels, pixels, frames, frames a second
STEP = (6.0, 10.0)  # pixels from frame to frame
LABELS = 24


def write_clips(folder: Path, seed: int) -> None:
    """One clip of each scan as MP4, and four JSON-lines files: labels, train, held-out, reversed.

    Args:
        folder: where they go.
        seed: draws the labels from the training rows; clips and held-out rows are always the same.
    """
    import numpy as np

    scans, _ = load_scans()
    train, held_out = split_scans(len(scans))
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    answers: dict[int, str] = {}
    for part in (train, held_out):  # both balanced
        directions = random.permutation([list(DIRECTIONS)[n % 4] for n in range(len(part))])
        answers |= dict(zip(part.tolist(), directions.tolist(), strict=True))
    for index, direction in answers.items():
        frames = moving(scans[index], direction, random)
        write_mp4(folder / "clips" / f"{index:04d}.mp4", frames, FPS)
        if index in held_out:
            write_mp4(folder / "clips" / f"{index:04d}-reversed.mp4", frames[::-1], FPS)
    labels, train = draw_balanced(train, LABELS // len(DIRECTIONS), seed, answers)
    for name, part in (("labels", labels), ("train", train), ("held-out", held_out)):
        rows = ({"video": f"clips/{i:04d}.mp4", "answer": answers[i]} for i in part.tolist())
        write_rows(folder / f"{name}.jsonl", "video", QUESTION, rows)
    rows = ({"video": f"clips/{i:04d}-reversed.mp4", "answer": OPPOSITE[answers[i]]} for i in held_out.tolist())
    write_rows(folder / "reversed.jsonl", "video", QUESTION, rows)


def moving(scan: "np.ndarray", direction: str, random: "np.random.RandomState") -> "np.ndarray":
    """A scan (8, 8) that moves evenly through (F, H, W) uint8 frames, speed and place drawn at random."""
    import numpy as np

    digit = np.asarray(picture_of(scan, DIGIT))
    step = random.uniform(*STEP)
    times = step * (np.arange(FRAMES) - (FRAMES - 1) / 2)  # pixels from the middle of the path
    x, y = random.uniform(times[-1], SIDE - DIGIT - times[-1], 2)
    frames = np.zeros((FRAMES, SIDE, SIDE), np.uint8)
    for frame, time in zip(frames, times, strict=True):
        left, top = (round(at + way * time) for at, way in zip((x, y), DIRECTIONS[direction], strict=True))
        frame[top : top + DIGIT, left : left + DIGIT] = digit
    return frames


def write_mp4(path: Path, frames: "np.ndarray", fps: int) -> None:
    """Grey frames (F, H, W) as H.264; the same frames give the same bytes."""
    import av

    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": "10", "threads": "1"})
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"  # what every player shows
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "gray")))
        file.mux(stream.encode())
