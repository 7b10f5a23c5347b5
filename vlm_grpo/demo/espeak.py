"""Speaks words through espeak-ng's library: a program, ``python espeak.py LIBRARY DATA``, in a process of its own.

The library keeps state from word to word that nothing resets, so only a fresh process gives the same samples again;
and it is not made for threads.

Standard input: a JSON list of [text, voice, words a minute, pitch 0 to 99]. Standard output: for each of them an int32
length and as many int16 samples. An error is one line on standard error, with exit code 1.
"""

import ctypes
import json
import struct
import sys
from pathlib import Path

RATE = 22050  # samples a second, of every voice without MBROLA
_SYNCHRONOUS, _DONT_EXIT, _UTF8, _AT_CHARACTER = 2, 0x8000, 1, 1
_SPEED, _PITCH = 1, 3
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Library:
    """espeak-ng, loaded: there can be one a process."""

    def __init__(self, library: str, data: Path) -> None:
        self._data = data
        self._samples = bytearray()
        self._espeak = ctypes.CDLL(library)
        rate = self._espeak.espeak_Initialize(_SYNCHRONOUS, 0, str(data.parent).encode(), _DONT_EXIT)
        if rate != RATE:  # also if the path is longer than its 160 characters
            raise RuntimeError(f"espeak-ng cannot use its data in {data}")
        self._espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else the clock's second: breath is noise
        self._callback = _CALLBACK(self._receive)  # kept: the library holds only a pointer
        self._espeak.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count: int, _events) -> int:
        if samples and count:
            self._samples += ctypes.string_at(samples, 2 * count)
        return 0

    def say(self, text: str, voice: str, speed: int, pitch: int) -> bytes:
        """The int16 samples of one word."""
        self._samples.clear()
        variant = voice.partition("+")[2]
        # An unknown variant would be ignored without a word.
        known = not variant or (self._data / "voices" / "!v" / variant).is_file()
        if not known or self._espeak.espeak_SetVoiceByName(voice.encode()):
            raise RuntimeError(f'espeak-ng has no voice "{voice}" in {self._data}')
        self._espeak.espeak_SetParameter(_SPEED, speed, 0)
        self._espeak.espeak_SetParameter(_PITCH, pitch, 0)
        written = text.encode() + b"\0"
        size = ctypes.c_size_t(len(written))
        if self._espeak.espeak_Synth(written, size, 0, _AT_CHARACTER, 0, _UTF8, None, None) or not self._samples:
            raise RuntimeError(f'espeak-ng cannot say "{text}" with the voice "{voice}"')
        return bytes(self._samples)


def main() -> None:
    try:
        library = Library(sys.argv[1], Path(sys.argv[2]))
        spoken = [library.say(*job) for job in json.load(sys.stdin)]
    except (OSError, RuntimeError) as error:
        sys.exit(str(error))
    for samples in spoken:
        sys.stdout.buffer.write(struct.pack("=i", len(samples) // 2) + samples)


if __name__ == "__main__":
    main()
