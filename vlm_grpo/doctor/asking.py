"""Ask torch and the libraries, in a process of their own; what it says before it dies counts."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

from .facts import Backend, Facts, Gpu, Package, PatchState, Precision, Torch

_LONGEST = 600  # seconds: Unsloth's first import compiles
_START = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given['path']; "
    "from vlm_grpo.doctor.probing import main; main(given['packages'])"
)


def ask(facts: Facts) -> Facts:
    """``facts`` with everything that takes torch, transformers or Unsloth to find out."""
    answers, death = _answers([package.name for package in facts.packages])
    failures = {name: answer["failure"] for name, answer in answers.items() if "failure" in answer}
    values = {name: answer["value"] for name, answer in answers.items() if "value" in answer}
    unasked = [name for name in ("backend", "torch", "precision", "trainer", "patches") if name not in answers]
    failures |= dict.fromkeys(unasked, death)
    return replace(
        facts,
        packages=tuple(_tried(package, answers) for package in facts.packages),
        torch=_torch(values["torch"]) if "torch" in values else None,
        precision=_precision(values["precision"]) if "precision" in values else None,
        backend=Backend(**values["backend"]) if "backend" in values else None,
        patches=tuple(PatchState(**record) for record in values.get("patches", ())),
        trainer_failure=failures.pop("trainer", ""),
        failures={name: why for name, why in failures.items() if not name.startswith("import ")},
    )


def _answers(packages: list[str]) -> tuple[dict[str, Any], str]:
    """``(answers by question, why the process ended early)``; each is ``{"value": ...}`` or ``{"failure": ...}``."""
    given = json.dumps({"packages": packages, "path": sys.path})
    flags = ["-S"] * sys.flags.no_site  # else its start-up files would add what this process does not have
    command = [sys.executable, *flags, "-c", _START, given]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_LONGEST)
        said, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        said, code = (error.stdout or b"").decode(errors="replace"), None
    except OSError as error:
        return {}, f"Python could not be started again ({error})"
    answers, asked = {}, ""
    for line in said.splitlines():
        answer = json.loads(line)
        if "asked" in answer:
            asked = answer["asked"]
        else:
            answers[answer.pop("question")] = answer
    death = f"no answer within {_LONGEST // 60} minutes" if code is None else f"the process ended with code {code}"
    if asked and asked not in answers:
        answers[asked] = {"failure": death}
    return answers, f"{death} at {asked or 'its start'}"


def _tried(package: Package, answers: dict[str, Any]) -> Package:
    """What importing it gave: a version where there is no metadata, or a reason."""
    answer = answers.get(f"import {package.name}")
    if answer is None:
        return package
    if "failure" in answer:
        return replace(package, failure=answer["failure"])
    if answer["value"] is None:  # no such module
        return package if package.version is None else replace(package, failure="its files are gone")
    return replace(package, version=package.version or answer["value"], failure="")


def _torch(value: dict[str, Any]) -> Torch:
    gpus = [Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in value.pop("gpus")]
    return Torch(**value, gpus=tuple(gpus))


def _precision(value: dict[str, Any]) -> Precision:
    return Precision(**{**value, "overflowing": tuple(value["overflowing"])})
