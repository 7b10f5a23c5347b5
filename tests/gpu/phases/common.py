"""What every phase shares: its settings, a record that is on the disk at once, and rows and models of few weights.

A phase is a script: ``python PHASE.py SETTINGS.json RECORD.json``. It ends with 0 if all of its checks hold.
"""

import json
import logging
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEEDS_CUDA = "skipped: needs CUDA"


@dataclass(frozen=True)
class Settings:
    """How a phase runs.

    Attributes:
        device: ``cuda`` or ``cpu``.
        shape: of the model; ``tiny`` anywhere.
        work: a folder for models and runs, kept between phases.
        seconds: what the phase may take; a phase that can stop early does.
        options: what else this phase is given.
    """

    device: str
    shape: str
    work: str
    seconds: float
    options: dict[str, Any]

    @property
    def on_gpu(self) -> bool:
        """Whether there is CUDA."""
        return self.device == "cuda"

    @property
    def models(self) -> Path:
        """Where models are written."""
        return Path(self.work) / "models"


class Record:
    """What a phase found, written again with every entry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {"checks": {}, "skipped": {}}

    def put(self, **entries: Any) -> None:
        """Add figures."""
        self.found |= entries
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.found, default=str), encoding="utf-8")
        beside.replace(self.path)

    def check(self, name: str, holds: Any) -> None:
        """Add a claim that holds or not."""
        self.found["checks"][name] = bool(holds)
        self.put()

    def skip(self, name: str, why: str) -> None:
        """Add what was left out."""
        self.found["skipped"][name] = why
        self.put()

    def attempt(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Add what ``work`` returns under ``name``; an error is recorded there, and the next attempt goes on."""
        heard = _Heard()
        logging.getLogger("vlm_grpo").addHandler(heard)
        try:
            found = work()
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"}
            self.check(f"{name} runs", False)
        finally:
            logging.getLogger("vlm_grpo").removeHandler(heard)
        self.put(**{name: {**found, **({"warnings": heard.messages} if heard.messages else {})}})
        free()


class _Heard(logging.Handler):
    """Our own warnings: that sharing fell back, for one."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def run(phase: Callable[[Settings, Record], None]) -> None:
    """The end of every phase's script."""
    settings_file, record_file = sys.argv[1:]
    settings = Settings(**json.loads(Path(settings_file).read_text(encoding="utf-8")))
    record = Record(Path(record_file))
    try:
        phase(settings, record)
    except BaseException as error:
        record.put(error=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}")
        raise
    failed = [name for name, holds in record.found["checks"].items() if not holds]
    sys.exit(f"does not hold: {', '.join(failed)}" if failed else 0)


def free() -> None:
    """Give back what the last models took."""
    import gc

    if "torch" not in sys.modules:
        return
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rows(kind: str, count: int = 1) -> list[dict[str, Any]]:
    """Four rows with ``count`` media of a kind each, of several sizes, and texts that differ."""
    import tiny

    make: dict[str, Callable[[int, int], Any]] = {
        "image": lambda seed, i: tiny.image(seed, ((56, 56), (84, 56), (56, 112), (112, 84))[i]),
        "video": lambda seed, i: tiny.video(seed, (4, 6, 2, 8)[i], (56, 56)),
        "audio": lambda seed, i: tiny.audio(seed, (0.5, 0.9, 0.32, 0.71)[i]),
    }
    counts = {f"{name}s": count if name == kind else 0 for name in make}
    return [
        {
            "prompt": tiny.prompt(f"count {word}", **counts),
            f"{kind}s": [make[kind](10 * i + j, i) for j in range(count)],
            "fps": 2.0,
        }
        for i, word in enumerate(("one", "two", "three", "four"))
    ]


def table(data: list[dict[str, Any]]) -> Any:
    """The rows as they are, as a dataset."""
    from datasets import Dataset

    def of(numbers: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [data[number] for number in numbers["number"]]
        return {key: [row[key] for row in found] for key in data[0]}

    return Dataset.from_dict({"number": range(len(data))}).with_transform(of)


def tiny_folder(settings: Settings, family: str) -> str:
    """A model of few weights, wide enough for 4-bit weights and for every kernel on a GPU."""
    import os
    import tempfile

    import tiny

    final = settings.models / f"{family}-128"
    if not final.is_dir():
        settings.models.mkdir(parents=True, exist_ok=True)
        beside = tempfile.mkdtemp(dir=settings.models, prefix=f".{family}.")
        tiny.save(family, beside, hidden=128)
        try:
            os.replace(beside, final)
        except OSError:  # another phase was first
            assert final.is_dir()
    return str(final)


def fill_adapters(model: Any) -> list[str]:
    """Adapters that do something: B of a new one is zero. By name, so that equal models get equal ones."""
    import zlib

    import torch

    names = []
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(parameter.shape, generator=draw) * (0.05 if "lora_B" in name else 0.1)
            parameter.data.copy_(drawn)
            names.append(name)
    return sorted(names)
