"""The audio demo's rows: the names of the ten digits, spoken by espeak-ng in many voices, some of them held out."""

import io
import json
import shutil
import subprocess
import sys
import wave
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ConfigError
from . import espeak
from .digits import DIGITS, draw_balanced, write_rows

if TYPE_CHECKING:
    import numpy as np

QUESTION = "which word is this ?"
RATE = 16000  # samples a second; every recording lasts one
ACCENTS = ("en-us", "en", "en-gb-scotland", "en-029", "en-gb-x-rp", "en-gb-x-gbclan")
SPEAKERS = ("m1", "m2", "m4", "m5", "m6", "f1", "f2", "f4")
HELD_OUT_SPEAKERS = ("m3", "m7", "f3", "f5")
SPEEDS, PITCHES = (130, 190), (20, 80)  # words a minute; 50 is a voice's usual pitch
TRAINING_ROWS, HELD_OUT_ROWS, LABELS = 1200, 400, 50


class Utterance(NamedTuple):
    """One word as it is to be spoken."""

    word: str
    voice: str
    speed: int
    pitch: int


def write_words(folder: Path, seed: int) -> None:
    """One recording a row as 16 kHz WAV, and three JSON-lines files: labels, train, held-out.

    Args:
        folder: where they go.
        seed: draws the labels from the training rows; recordings and held-out rows are always the same.

    Raises:
        ConfigError: there is no espeak-ng, or it has not the voices.
    """
    import numpy as np

    random = np.random.RandomState(0)
    spoken = [*utterances(SPEAKERS, TRAINING_ROWS, random), *utterances(HELD_OUT_SPEAKERS, HELD_OUT_ROWS, random)]
    (folder / "words").mkdir(parents=True, exist_ok=True)
    for index, samples in enumerate(speak(spoken)):
        write_wav(folder / "words" / f"{index:04d}.wav", recording(samples, random))
    rows = np.arange(len(spoken))
    answers = [utterance.word for utterance in spoken]
    labels, train = draw_balanced(rows[:TRAINING_ROWS], LABELS // len(DIGITS), seed, answers)
    for name, part in (("labels", labels), ("train", train), ("held-out", rows[TRAINING_ROWS:])):
        said = ({"audio": f"words/{i:04d}.wav", "answer": spoken[i].word, "voice": spoken[i].voice} for i in part)
        write_rows(folder / f"{name}.jsonl", "audio", QUESTION, said)


def utterances(speakers: tuple[str, ...], count: int, random: "np.random.RandomState") -> list[Utterance]:
    """All words equally often; accent, speaker, speed and pitch at random."""
    return [
        Utterance(
            DIGITS[n % len(DIGITS)],
            f"{random.choice(ACCENTS)}+{random.choice(speakers)}",
            int(random.randint(SPEEDS[0], SPEEDS[1] + 1)),
            int(random.randint(PITCHES[0], PITCHES[1] + 1)),
        )
        for n in range(count)
    ]


def recording(word: "np.ndarray", random: "np.random.RandomState") -> "np.ndarray":
    """A second (16000,) float32 with the word somewhere in it: louder or softer, and a little hiss throughout."""
    import numpy as np

    second = np.zeros(RATE, np.float32)
    word = word[:RATE]
    start = random.randint(0, RATE - len(word) + 1)
    second[start : start + len(word)] = word * random.uniform(0.3, 0.9) / np.abs(word).max()
    return second + random.randn(RATE).astype(np.float32) * random.uniform(0.001, 0.01)


def write_wav(path: Path, samples: "np.ndarray") -> None:
    """Samples in [-1, 1] as 16 bit, mono, 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())


def speak(spoken: list[Utterance]) -> list["np.ndarray"]:
    """The words as 16 kHz float32 samples, silence cut off.

    They come from the library of the package espeakng-loader or, without it, from the program espeak-ng.

    Raises:
        ConfigError: neither is there, or it cannot say a word.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        program = shutil.which("espeak-ng")
        if program is None:
            raise ConfigError(
                "The audio demo's words are spoken by espeak-ng, which is not installed. "
                'Install it: pip install "vlm-grpo[audio]".'
            ) from error
        return [_trimmed(*_by_program(program, utterance)) for utterance in spoken]
    files = [espeakng_loader.get_library_path(), espeakng_loader.get_data_path()]
    output = _output([sys.executable, espeak.__file__, *map(str, files)], json.dumps(spoken).encode())
    return [_trimmed(samples, espeak.RATE) for samples in _split(output)]


def _by_program(program: str, spoken: Utterance) -> tuple["np.ndarray", int]:
    """Samples as int16, and their rate."""
    import numpy as np

    options = ["-v", spoken.voice, "-s", str(spoken.speed), "-p", str(spoken.pitch), "--stdout", spoken.word]
    with wave.open(io.BytesIO(_output([program, *options]))) as file:
        return np.frombuffer(file.readframes(2**24), "<i2"), file.getframerate()


def _output(command: list[str], given: bytes = b"") -> bytes:
    done = subprocess.run(command, input=given, capture_output=True)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise ConfigError(
            f'The audio demo\'s words cannot be spoken: {reason[-1]}. Install it anew: pip install "vlm-grpo[audio]".'
        )
    return done.stdout


def _split(output: bytes) -> list["np.ndarray"]:
    import numpy as np

    words, at = [], 0
    while at < len(output):
        length = int(np.frombuffer(output, np.int32, 1, at)[0])
        words.append(np.frombuffer(output, np.int16, length, at + 4))
        at += 4 + 2 * length
    return words


def _trimmed(samples: "np.ndarray", rate: int) -> "np.ndarray":
    """int16 samples at ``rate`` to float32 at 16 kHz, without the silence around the word."""
    import av
    import numpy as np

    frame = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler("flt", "mono", RATE)
    frames = [*resampler.resample(frame), *resampler.resample(None)]
    sound = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    loud = np.flatnonzero(np.abs(sound) > 0.01)
    margin = RATE // 50
    return sound[max(0, loud[0] - margin) : loud[-1] + margin]
