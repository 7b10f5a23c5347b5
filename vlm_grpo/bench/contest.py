"""``vlm-grpo bench --against``: whole trainers against each other, each in a process of its own on the same prompts.

They change what the libraries do for the whole process, so they cannot stand side by side in one. Every process loads
the same weights from the disk, warms up, and takes the time of its own steps.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, get_args

from ..errors import ConfigError, UnsupportedError
from .contender import Case, Contender
from .options import BenchOptions, ShapeName
from .timing import PHASES

Say = Callable[[str], None]
_NAMES: dict[Contender, str] = {
    "trl": "TRL",
    "unsloth": "Unsloth",
    "ours": "ours",
    "ours-unsloth": "ours on Unsloth",
}


@dataclass(frozen=True)
class Contest:
    """Who is measured, on what.

    Attributes:
        options: prompts, completions, device; the sizes of the shape ``tiny``.
        contenders: each gets a process, one after the other.
        shape: of the model.
        prompts_per_step: groups of a generation batch; several are measured one after the other.
        load_in_4bit: NF4 weights.
        memory_gib: limit of what torch may hold of the GPU's memory, or None.
        models: a folder that keeps the written models, or None: they are deleted at the end.
        limit: seconds after which a contender is stopped; what it has said until then counts.
        warm_up: prompts before the measured steps; ours computes the first two of a kind both ways.
        environment: more variables for the processes.

    Raises:
        ConfigError: no such contender or shape, or a medium that not every contender trains on.
    """

    options: BenchOptions
    contenders: tuple[Contender, ...]
    shape: ShapeName = "tiny"
    prompts_per_step: tuple[int, ...] = (1,)
    load_in_4bit: bool = False
    memory_gib: float | None = None
    models: Path | None = None
    limit: float | None = None
    warm_up: int = 2
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from .published import shaped

        object.__setattr__(self, "options", shaped(self.options, self.shape))
        for name in self.contenders:
            if name not in get_args(Contender):
                raise ConfigError(f"--against {name}: there is none such. Use trl, unsloth, or both: trl,unsloth.")
        others = [name for name in self.contenders if not name.startswith("ours")]
        if others and self.options.modality != "image":
            raise ConfigError(
                f"--against {','.join(others)}: only vlm-grpo trains on {self.options.modality}. Leave --against out "
                "to compare with vlm-grpo without sharing, or use --modality image."
            )
        if not self.prompts_per_step or min(self.prompts_per_step) < 1:
            raise ConfigError(f"prompts_per_step={self.prompts_per_step}: needs 1 or more. Correct the value.")
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ConfigError(f"memory_gib={self.memory_gib:g}: needs more than 0. Correct the value.")
        if self.memory_gib is not None and self.options.device != "cuda":
            raise ConfigError(f"memory_gib={self.memory_gib}: only a GPU's memory can be limited. Leave it out.")


def contenders(against: str) -> tuple[Contender, ...]:
    """``"trl,unsloth"`` with ours beside each: on transformers where TRL is, on Unsloth where Unsloth is.

    Raises:
        ConfigError: anything else.
    """
    names = list(dict.fromkeys(part.strip() for part in against.split(",")))
    if not set(names) <= {"trl", "unsloth"}:
        raise ConfigError(f"--against {against}: needs trl, unsloth, or both: trl,unsloth.")
    pairs: dict[str, tuple[Contender, Contender]] = {"trl": ("trl", "ours"), "unsloth": ("unsloth", "ours-unsloth")}
    theirs, ours = zip(*(pairs[name] for name in names), strict=True)
    return (*theirs, *ours)


def run_contest(contest: Contest, say: Say = lambda text: None, now: Say = lambda text: None) -> dict[str, Any]:
    """Measure every contender.

    Args:
        contest: the case.
        say: is told what has been measured, a line each.
        now: is told what is running.

    Returns:
        what ``vlm-grpo bench --against … --json`` prints. ``contenders`` has a row for each of them and each number of
        prompts a step: medians of the measured steps' seconds, of each phase's, and the highest memory. A row without
        ``seconds`` has an ``error``.

    Raises:
        ConfigError: the device is missing, or the disk is full.
        UnsupportedError: no contender could be measured.
    """
    from .compare import versions
    from .published import write_model

    _require(contest.options.device)
    with tempfile.TemporaryDirectory() as work:
        say(_heading(contest))
        now(f"writing the model: {contest.shape}")
        model = write_model(contest.shape, contest.options, contest.models or Path(work), contest.options.device)
        rows: list[dict[str, Any]] = []
        for name in contest.contenders:
            now(f"{_NAMES[name]}")
            lines = run_contender(contest, name, model, Path(work))
            found = [summary(name, count, lines) for count in contest.prompts_per_step]
            rows += found
            for row in found:
                say(_line(row))
                for note in row.get("notes", []):
                    say(f"  {note}")
    if all("seconds" not in row for row in rows):
        raise UnsupportedError(f"no contender could be measured. {rows[0]['name']}: {rows[0]['error'].rstrip('.')}.")
    options = contest.options
    import torch

    return {
        "shape": contest.shape,
        "model": model_title(contest),
        "contenders": rows,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "load_in_4bit": contest.load_in_4bit,
        "memory_gib": contest.memory_gib,
        "num_generations": options.num_generations,
        "completion_tokens": options.completion,
        "prompt_tokens": max(row.get("prompt_tokens", 0) for row in rows),
        "beta": options.beta,
        "options": asdict(options),
        "versions": {**versions(), **_unsloth_versions()},
    }


def run_contender(contest: Contest, name: Contender, model: Path, work: Path) -> list[dict[str, Any]]:
    """Everything that one contender's process has said, with an ``error`` at the end if it was stopped or broke."""
    case = Case(
        contest.options,
        name,
        str(model),
        contest.prompts_per_step,
        contest.load_in_4bit,
        contest.memory_gib,
        contest.warm_up,
    )
    case_file, said, log = (work / f"{name}.{end}" for end in ("json", "jsonl", "log"))
    case.write(case_file)
    said.unlink(missing_ok=True)
    said.touch()
    home = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), home]))
    command = [sys.executable, "-m", f"{__package__}.contender", str(case_file), str(said)]
    environment = {**os.environ, "PYTHONPATH": path, **contest.environment}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(contest.limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    lines = [json.loads(line) for line in said.read_text(encoding="utf-8").splitlines()]
    if code is None:
        return [*lines, _error("out of time", f"stopped after {contest.limit:.0f} s")]
    if code and not any(line["event"] == "error" for line in lines):
        return [*lines, _error(f"exit code {code}", _last_line(log))]
    return lines


def summary(name: Contender, prompts: int, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: medians over the measured steps of a contender with so many prompts a step."""
    row: dict[str, Any] = {"contender": name, "name": _NAMES[name], "prompts_per_step": prompts}
    loaded = next((line for line in lines if line["event"] == "loaded"), None)
    if loaded:
        row |= {"load_seconds": loaded["seconds"], "load_peak_bytes": loaded["peak"][0]}
    notes = list(dict.fromkeys(line["message"] for line in lines if line["event"] == "note"))
    if notes:
        row["notes"] = notes
    own = [line for line in lines if line["event"] == "step" and line["prompts"] == prompts]
    steps = [line for line in own if not line["warm_up"]]
    failed = [line for line in lines if line["event"] == "error" and line["prompts"] in (prompts, None)]
    if failed and (not steps or failed[0]["prompts"] is not None):
        row["error"] = f"{failed[0]['kind']}: {failed[0]['message']}"
        row["error_kind"] = failed[0]["kind"]
    if own:  # the warm-up has reached its highest too
        row["peaks"] = {phase: _highest([line["peaks"].get(phase, (None, None)) for line in own]) for phase in PHASES}
        row["peak_bytes"], row["peak_reserved_bytes"] = _highest(list(row["peaks"].values()))
    if steps:
        row |= {
            "seconds": median(line["seconds"] for line in steps),
            "rounds": [line["seconds"] for line in steps],
            "phases": {phase: median(line["phases"][phase] for line in steps) for phase in PHASES},
            "prompt_tokens": steps[0]["prompt_tokens"],
            "completion_tokens": steps[0]["completion_tokens"],
        }
    elif "error" not in row:
        row["error"] = row["error_kind"] = "not reached"
    return row


def _highest(pairs: list[Any]) -> list[int | None]:
    columns = zip(*pairs, strict=True)
    return [max((value for value in column if value is not None), default=None) for column in columns]


def _heading(contest: Contest) -> str:
    options = contest.options
    bits = "4-bit weights" if contest.load_in_4bit else "bf16" if options.bf16 else "fp32"
    place = "GPU" if options.device == "cuda" else f"CPU, {options.threads} thread{'s' * (options.threads > 1)}"
    limit = "" if contest.memory_gib is None else f", {contest.memory_gib:g} GiB at most"
    if options.device == "cpu":
        limit = "\nTRL is given our plain log-prob head, since its own needs Triton and so a GPU"
    tokens = f"P {options.target or 'as the medium decides'}, C {options.completion}, G {options.num_generations}"
    return f"{model_title(contest)}\n{tokens}, beta {options.beta:g}, {bits}, {place}{limit}"


def model_title(contest: Contest) -> str:
    """The model in words."""
    from .published import SHAPES
    from .shapes import describe

    if contest.shape == "tiny":
        return describe(contest.options)
    return f"{SHAPES[contest.shape].title} (random weights)"


def _require(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device="cuda": torch sees no GPU here. Leave --device out, or install torch for CUDA.')


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"event": "error", "prompts": None, "kind": kind, "message": message}


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _line(row: dict[str, Any]) -> str:
    head = f"{row['name']}, prompts a step: {row['prompts_per_step']}:"
    if "seconds" not in row:
        return f"{head} {row['error']}"
    peak = "" if row["peak_bytes"] is None else f", at most {row['peak_bytes'] / 2**30:.2f} GiB"
    return f"{head} {row['seconds']:.2f} s{peak}"


def _unsloth_versions() -> dict[str, str]:
    found = {}
    for name in ("unsloth", "unsloth_zoo", "bitsandbytes", "triton", "xformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
