"""GGUF files for llama.cpp, through its converter; and its answers, where its program is there."""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import MediaOptions
from ..data import to_sample
from ..errors import ConfigError, ExportError, UnsupportedError
from ..models.unsloth import save_gguf, why_not

_SCRIPTS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
RUNNER = "llama-mtmd-cli"
_OUTTYPES = {"bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Converter:
    """What makes GGUF files here.

    Attributes:
        script: llama.cpp's ``convert_hf_to_gguf.py``; None where Unsloth does it, with a llama.cpp of its own.
        runner: llama.cpp's program for prompts with media; None where it was not built.
    """

    script: Path | None
    runner: Path | None

    def convert(self, merged: Path, folder: Path, dtype: str, has_media: bool) -> None:
        """A saved 16-bit model to ``model-*.gguf``, and its media towers to ``mmproj-*.gguf``.

        Raises:
            ExportError: it cannot be converted; the message has the converter's own words.
        """
        outtype = _OUTTYPES[dtype]
        if self.script is None:
            _convert_by_unsloth(merged, folder, outtype)
            return
        _convert(self.script, merged, folder / f"model-{outtype}.gguf", outtype)
        if has_media:
            _convert(self.script, merged, folder / f"mmproj-{outtype}.gguf", outtype, "--mmproj")

    def answers(
        self, folder: Path, rows: list[dict[str, Any]], media: MediaOptions, max_new_tokens: int
    ) -> list[str | None] | None:
        """llama.cpp's greedy answers, None for a row that its command line cannot be given; None without a runner.

        Raises:
            ExportError: it fails on a row.
        """
        files = sorted(folder.glob("*.gguf"))
        projector = next((file for file in files if "mmproj" in file.name), None)
        model = next((file for file in files if file != projector), None)
        if self.runner is None or model is None or projector is None:
            return None
        command = [str(self.runner), "-m", str(model), "--mmproj", str(projector), "--temp", "0", "--jinja"]
        return [_answer([*command, "-n", str(max_new_tokens)], row, media) for row in rows]


def find_converter(folder: str | None) -> Converter:
    """llama.cpp in ``folder``, else in ``$LLAMA_CPP``, else on the PATH; else Unsloth, where it works.

    Raises:
        ConfigError: a folder was named and has no converter.
        UnsupportedError: there is none of them; the message says what to install.
    """
    for origin, root in (("--llama-cpp", folder), ("LLAMA_CPP", os.environ.get("LLAMA_CPP"))):
        if not root:
            continue
        path = Path(root).expanduser()
        script = next((path / name for name in _SCRIPTS if (path / name).is_file()), None)
        if script is None:
            raise ConfigError(f"{origin}: {root} has no {_SCRIPTS[0]}. Give the folder of a llama.cpp checkout.")
        built = [path / place / RUNNER for place in (".", "bin", "build/bin")]
        runner = next((place for place in built if place.is_file()), None)
        return Converter(script.resolve(), runner.resolve() if runner else _on_path(RUNNER))
    script = next((found for name in _SCRIPTS if (found := _on_path(name))), None)
    if script is None and why_not():
        raise UnsupportedError(
            f"export: --to gguf needs llama.cpp's {_SCRIPTS[0]}, which is neither in --llama-cpp, nor in $LLAMA_CPP, "
            "nor on the PATH. Do: git clone https://github.com/ggml-org/llama.cpp && pip install -r "
            "llama.cpp/requirements.txt, and give --llama-cpp llama.cpp."
        )
    return Converter(script, _on_path(RUNNER))


def _on_path(name: str) -> Path | None:
    found = shutil.which(name)
    return Path(found).resolve() if found else None


def _convert(script: Path, merged: Path, file: Path, outtype: str, *more: str) -> None:
    program = [sys.executable, str(script)] if script.suffix == ".py" else [str(script)]
    command = [*program, str(merged), "--outfile", str(file), "--outtype", outtype, *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not file.is_file():
        raise ExportError(
            f"llama.cpp cannot convert the merged model ({_last_line(done)}). Nothing was kept. Update llama.cpp, or "
            "use --to merged_16bit."
        )


def _convert_by_unsloth(merged: Path, folder: Path, outtype: str) -> None:
    save_gguf(str(merged), str(folder), outtype)
    if not any(folder.glob("*.gguf")):
        raise ExportError("Unsloth wrote no GGUF file. Nothing was kept; install llama.cpp and give --llama-cpp.")


def _last_line(done: subprocess.CompletedProcess) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1].strip().rstrip(".")[:300]


def _answer(command: list[str], row: dict[str, Any], media: MediaOptions) -> str | None:
    with tempfile.TemporaryDirectory() as scratch:
        prompt = _as_arguments(row, Path(scratch), media)
        if prompt is None:
            return None
        done = subprocess.run([*command, *prompt], capture_output=True, text=True)
    if done.returncode:
        raise ExportError(f"llama.cpp cannot run the converted model ({_last_line(done)}). Nothing was kept.")
    return done.stdout.strip()


def _as_arguments(row: dict[str, Any], scratch: Path, media: MediaOptions) -> list[str] | None:
    """One user message with its pictures in front, as files: all that the program takes on its command line."""
    sample = to_sample(row)
    if (
        isinstance(sample.prompt, str)
        or len(sample.prompt) != 1
        or {medium.kind for medium in sample.media} - {"image"}
    ):
        return None
    parts = sample.prompt[0]["content"]
    if any(part["type"] == "text" for part in parts[: len(sample.media)]):
        return None
    arguments = ["-p", "".join(part["text"] for part in parts if part["type"] == "text")]
    for number, medium in enumerate(sample.media):
        file = scratch / f"{number}.png"
        medium.open(media).save(file)
        arguments += ["--image", str(file)]
    return arguments
