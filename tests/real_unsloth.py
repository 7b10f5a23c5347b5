"""The real Unsloth on a machine without a GPU: in processes of its own, since it changes global state.

Unsloth lets a CPU in by a switch of its own, and asks for the properties of one device, which ``unsloth_on_cpu``'s
``sitecustomize`` makes up. Nothing of Unsloth is replaced.
"""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

_TESTS = Path(__file__).parent
_SWITCHES = {
    "UNSLOTH_ALLOW_CPU": "1",
    "UNSLOTH_COMPILE_DISABLE": "1",
    "UNSLOTH_DISABLE_PINNED_MEMORY": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

# Lets Unsloth replace TRL's trainers by its generated ones, as its import does on a GPU.
REPLACE_TRL = """
import os
import unsloth
os.environ["UNSLOTH_ALLOW_CPU"] = "0"
from unsloth.models.rl import PatchFastRL
PatchFastRL(FastLanguageModel=unsloth.FastVisionModel)
os.environ["UNSLOTH_ALLOW_CPU"] = "1"
"""


def environment(**more: str) -> dict[str, str]:
    """The environment of a process in which Unsloth takes the CPU for a GPU."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    paths = os.pathsep.join([str(_TESTS / "unsloth_on_cpu"), str(_TESTS), str(_TESTS.parent)])
    return {**os.environ, **_SWITCHES, "PYTHONPATH": paths, **more}


def run_script(script: str, folder: Path, **more: str) -> Any:
    """Run ``script`` in ``folder``; the JSON of the last line it prints."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=folder, env=environment(**more), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def run_cli(arguments: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess:
    """``vlm-grpo`` with these arguments in ``folder``, finished, whatever its exit code."""
    command = [sys.executable, "-m", "vlm_grpo", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(**more), capture_output=True, text=True)
