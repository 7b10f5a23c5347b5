"""The machine, as far as it can be seen without torch."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from .facts import Machine

_GIB = 2**30
_TRUE = {"1", "on", "yes", "true"}  # as huggingface_hub reads its variables


def look_around() -> Machine:
    """The facts of this machine; whatever it does not tell is left out."""
    total, free = _memory()
    cards, driver = nvidia()
    return Machine(
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        python=platform.python_version(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=total,
        memory_free_gib=free,
        cards=cards,
        driver=driver,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        processes=_processes(),
        notebook=notebook(),
        disk_gib={name: gib for name, at in _folders().items() if (gib := _free_gib(at)) is not None},
        offline=offline(),
        programs={"C compiler": _compiler()},
    )


def nvidia() -> tuple[tuple[str, ...], str]:
    """``(names, driver version)`` of this machine's NVIDIA GPUs, by the driver's own tool; empty without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return (), ""
    command = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return (), ""
    if done.returncode:
        return (), ""
    lines = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line]
    return tuple(name.strip() for name, _, _ in lines), lines[0][2].strip() if lines else ""


def notebook() -> str:
    """``"Kaggle"``, ``"Colab"``, or an empty string anywhere else."""
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        return "Kaggle"  # first: its image is made from Colab's
    return "Colab" if os.environ.get("COLAB_RELEASE_TAG") or os.environ.get("COLAB_GPU") else ""


def offline() -> str:
    """The variable that keeps the Hugging Face Hub away, or an empty string."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").lower() in _TRUE), "")


def _processes() -> int:
    world = os.environ.get("WORLD_SIZE", "")
    return int(world) if world.isdecimal() else 1


def _memory() -> tuple[float | None, float | None]:
    try:
        import psutil  # accelerate brings it
    except (ImportError, OSError):
        return None, None
    memory = psutil.virtual_memory()
    return memory.total / _GIB, memory.available / _GIB


def _folders() -> dict[str, Path]:
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "huggingface"
    )
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return {"current folder": Path("."), "Hugging Face cache": Path(os.path.expandvars(cache)).expanduser()}


def _free_gib(folder: Path) -> float | None:
    """Of the disk that holds ``folder``, which need not exist yet."""
    try:
        places = (folder, *folder.absolute().parents)
    except OSError:  # the current folder was deleted
        return None
    for place in places:
        try:
            return shutil.disk_usage(place).free / _GIB
        except OSError:
            continue
    return None


def _compiler() -> str | None:
    """What Triton compiles its launchers by."""
    named = os.environ.get("CC")
    return next((path for name in (named, "cc", "gcc", "clang") if name and (path := shutil.which(name))), None)
