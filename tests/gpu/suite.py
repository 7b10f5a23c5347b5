"""Everything that only a GPU can prove, in one command of ten minutes, on a machine without network.

    python tests/gpu/suite.py --wheels DIR --out DIR      install the wheels, run, write results/<gpu>.json
    python tests/gpu/suite.py --table results/*.json      the README's table of what was measured

Every phase is a process with a time limit of its own. One that fails is recorded with its error, and the next goes on.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS, ROOT = HERE.parent, HERE.parents[1]
NO_TIME = "skipped: no time left"


@dataclass(frozen=True)
class Phase:
    """One script of ``phases/``.

    Attributes:
        name: in the results.
        script: its file.
        shape: of the model where the suite names none.
        seconds: its limit.
        least: what must be left for it to begin.
        options: for the script.
        together: its times do not matter, so it runs beside others of this kind.
    """

    name: str
    script: str
    shape: str = "qwen2.5-vl-3b"
    seconds: float = 150
    least: float = 20
    options: dict[str, Any] = field(default_factory=dict)
    together: bool = False


# The most valuable first.
PHASES = (
    Phase("environment", "environment", seconds=90, least=5),
    Phase("adapters", "adapters", seconds=200, together=True),
    Phase("logps", "logps", seconds=200, together=True),
    Phase("merged", "merged", seconds=200, together=True),
    Phase("precision", "precision", seconds=200, together=True),
    Phase("flex", "flex", seconds=120),
    Phase("contest", "contest", seconds=560, least=100, options={"prompts_per_step": [1, 8]}),
    Phase("fit-3b", "fit", seconds=150, least=60, options={"contender": "ours-unsloth"}),
    Phase("fit-7b", "fit", "qwen2.5-vl-7b", 180, 90, {"contender": "ours-unsloth"}),
    Phase("fit-3b-trl", "fit", seconds=120, least=60, options={"contender": "trl"}),
    Phase("fit-audio-7b", "fit", "qwen2-audio-7b", 180, 90, {"contender": "ours-unsloth"}),
)


def main() -> int:
    """0 if every phase that ran ended well."""
    arguments = _arguments()
    if arguments.table is not None:
        sys.path.insert(0, str(HERE))
        from table import markdown

        print(markdown([json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments.table]))
        return 0
    out = Path(arguments.out).resolve()
    work = Path(arguments.work or out / "work").resolve()
    work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    site = install(Path(arguments.wheels).resolve(), work / "site") if arguments.wheels else None
    # Always with the environment, which says whose figures they are.
    wanted = {"environment", *arguments.phases.split(",")} if arguments.phases else {phase.name for phase in PHASES}
    chosen = [phase for phase in PHASES if phase.name in wanted]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what stops the phases
    results = run(chosen, arguments.device, arguments.shape, out, work, environment(arguments.device, site), deadline)
    ended = [phase["status"] for phase in results["phases"].values()]
    return 0 if all(status == "ok" or status.startswith("skipped") for status in ended) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", help="folder of wheels to install first")
    parser.add_argument("--out", default=str(HERE / "results"), help="where <gpu>.json is written")
    parser.add_argument("--work", help="models and runs; kept, so that a second command is quicker")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a rehearsal")
    parser.add_argument("--shape", help="of every model; by default each phase's own, on a CPU tiny")
    parser.add_argument("--phases", help=f"some of {','.join(phase.name for phase in PHASES)}")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything together")
    parser.add_argument("--table", nargs="*", metavar="JSON", help="print the README's table of these results")
    arguments = parser.parse_args()
    unknown = set((arguments.phases or "").split(",")) - {phase.name for phase in PHASES} - {""}
    if unknown:
        parser.error(f"--phases: there is no {', '.join(sorted(unknown))}")
    return arguments


def _spoken() -> list[str]:
    """The arguments that change what is measured; folders do not."""
    pairs = [
        f"--{name} {value}" for name, value in vars(_arguments()).items() if name in ("phases", "shape", "minutes")
    ]
    return [pair for pair in pairs if not pair.endswith(" None")]


def install(wheels: Path, site: Path) -> Path:
    """The folder that the wheels are installed in, without their requirements and without an index."""
    found = sorted(str(wheel) for wheel in wheels.glob("*.whl"))
    if not found:
        sys.exit(f"--wheels {wheels}: there is no wheel in it.")
    if not site.is_dir():
        partial = site.with_name(f".{site.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        if subprocess.run([*command, "--target", str(partial), *found]).returncode:
            sys.exit(f"--wheels {wheels}: pip cannot install them. They must be of this Python and system.")
        partial.rename(site)
    return site


def environment(device: str, site: Path | None) -> dict[str, str]:
    """Of every phase; on a CPU one in which Unsloth takes it for a GPU."""
    paths = [str(path) for path in (site, HERE / "phases", TESTS, ROOT) if path is not None]
    switches = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if device == "cpu":
        sys.path.insert(0, str(TESTS))
        from real_unsloth import environment as on_cpu

        return {**on_cpu(**switches), "PYTHONPATH": os.pathsep.join([str(HERE / "on_cpu"), *paths])}
    inherited = [path for path in [os.environ.get("PYTHONPATH")] if path]
    return {**os.environ, **switches, "PYTHONPATH": os.pathsep.join([*paths, *inherited])}


def run(
    phases: list[Phase],
    device: str,
    shape: str | None,
    out: Path,
    work: Path,
    variables: dict[str, str],
    deadline: float,
) -> dict[str, Any]:
    """Run them, write the results after each, and return what was written."""
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python tests/gpu/suite.py", *_spoken()]),
        "device": device,
        "phases": {},
    }
    waiting = list(phases)
    # On a CPU no time means anything; the environment is first, since it names the file.
    together = [phase for phase in phases if phase.together or (device == "cpu" and phase.name != "environment")]
    while waiting:
        batch = together if waiting[0] in together else waiting[:1]
        waiting = [phase for phase in waiting if phase not in batch]
        shapes = [shape or ("tiny" if device == "cpu" else phase.shape) for phase in batch]
        started: list[tuple[Phase, subprocess.Popen | None, float]] = []
        try:
            for phase, own in zip(batch, shapes, strict=True):
                started.append((phase, *start(phase, device, own, work, variables, deadline)))
            for phase, process, limit in started:
                results["phases"][phase.name] = finish(phase, process, limit, work)
                write(results, out)
                print(f"{phase.name}: {results['phases'][phase.name]['status']}", flush=True)
        finally:
            for _, process, _ in started:
                kill(process)
    return results


def start(
    phase: Phase, device: str, shape: str, work: Path, variables: dict[str, str], deadline: float
) -> tuple[subprocess.Popen | None, float]:
    """``(process, when it must have ended)``; no process where too little time is left."""
    left = deadline - time.monotonic()
    if left < phase.least:
        return None, 0.0
    seconds = min(phase.seconds, left) if device == "cuda" else left
    settings = {"device": device, "shape": shape, "work": str(work), "seconds": seconds, "options": phase.options}
    settings_file, record, log = (work / f"{phase.name}.{end}" for end in ("settings.json", "record.json", "log"))
    settings_file.write_text(json.dumps(settings), encoding="utf-8")
    record.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "phases" / f"{phase.script}.py"), str(settings_file), str(record)]
    home = work / (phase.name if phase.together or device == "cpu" else "alone")  # Unsloth writes code where it runs
    home.mkdir(exist_ok=True)
    with log.open("w") as output:  # the process keeps it open
        process = subprocess.Popen(
            command, cwd=home, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    return process, time.monotonic() + seconds


def finish(phase: Phase, process: subprocess.Popen | None, until: float, work: Path) -> dict[str, Any]:
    """What a phase has found, and how it ended; one that runs too long is stopped."""
    if process is None:
        return {"status": NO_TIME}
    began = time.monotonic()
    try:
        code: int | None = process.wait(max(0.1, until - began))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        kill(process)
    record = work / f"{phase.name}.record.json"
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    log = (work / f"{phase.name}.log").read_text(errors="replace").strip().splitlines()
    status = (
        "ok" if code == 0 else "stopped: out of time" if code is None else f"failed: {(log or ['no output'])[-1][:300]}"
    )
    if code != 0:
        found["log"] = log[-30:]
    return _anywhere({"status": status, **found}, work)


def kill(process: subprocess.Popen | None) -> None:
    """A phase that still runs, and all that it has started."""
    if process is not None and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _anywhere(found: dict[str, Any], work: Path) -> dict[str, Any]:
    """Without the folders of this machine: what is written is read by others."""
    text = json.dumps(found)
    for folder, name in ((work, "work"), (ROOT, "."), (Path(sys.prefix), "python"), (Path.home(), "~")):
        if folder != Path("/"):
            text = text.replace(json.dumps(str(folder))[1:-1], name)
    return json.loads(text)


def write(results: dict[str, Any], out: Path) -> Path:
    """Add the results to those of the same GPU and the same versions; other versions begin anew."""
    versions = results["phases"].get("environment", {})
    name = versions.get("gpu") or ("cpu" if results["device"] == "cpu" else "gpu")
    file = out / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    out.mkdir(parents=True, exist_ok=True)
    whole = dict(results)
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["phases"].get("environment", {}).get("versions") == versions.get("versions"):
            own = {name: found for name, found in results["phases"].items() if found["status"] != NO_TIME}
            whole["phases"] = {**results["phases"], **before["phases"], **own}
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    beside.replace(file)
    return file


if __name__ == "__main__":
    sys.exit(main())
