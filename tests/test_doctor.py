"""The doctor: windows from metadata, problems from hand-written facts, and a page and JSON that always come."""

import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vlm_grpo import doctor
from vlm_grpo.cli import app
from vlm_grpo.doctor import (
    Backend,
    Diagnosis,
    Facts,
    Gpu,
    Machine,
    Package,
    PatchState,
    Precision,
    Torch,
    asking,
    machine,
    packages,
    probing,
    problems_of,
)
from vlm_grpo.doctor.page import show

ROOT = Path(__file__).parents[1]
L4 = Gpu("NVIDIA L4", 22.0, 21.5, (8, 9), True)
T4 = Gpu("Tesla T4", 14.6, 14.5, (7, 5), False)
HOME = Machine(
    "Linux 6.8 (x86_64)", "3.11.9", 8, 31.0, 25.0, ("NVIDIA L4",), "580.65", disk_gib={"current folder": 99.0}
)
FULL = (
    Package("torch", "2.14.1", ">=2.6,<2.15", True, failure=""),
    Package("torchvision", "0.29.2", "", True, failure=""),
    Package("trl", "1.15.0", ">=1.15,<1.16", True, "<=1.15.0", True, failure=""),
    Package("transformers", "5.17.0", ">=5.13,<5.18", True, "<=5.17.0", True, failure=""),
    Package("bitsandbytes", "0.50.2", ">=0.48", True, need="machine", failure=""),
    Package("unsloth", "2026.10.7", ">=2026.10", True, need="machine", failure=""),
    Package("fastapi", None, ">=0.110", need="extra", extra="serve"),
)
GOOD = Facts(
    HOME,
    FULL,
    Torch("2.14.1", "13.0", True, (L4,)),
    Precision("bfloat16", "bf16", "sdpa", False, True),
    Backend("unsloth", "there is a CUDA device and Unsloth works on it"),
    (PatchState("trl-log-probs", "trl.py", "No loss on a CPU.", "not needed here"),),
    "",
)


def with_gpus(*gpus: Gpu, **changes) -> Facts:
    return replace(GOOD, torch=Torch("2.14.1", "13.0", bool(gpus), gpus), **changes)


def with_package(name: str, **changes) -> Facts:
    return replace(GOOD, packages=tuple(replace(p, **changes) if p.name == name else p for p in GOOD.packages))


def on(**changes) -> Machine:
    return replace(HOME, **changes)


def test_a_good_machine_has_no_problem():
    assert problems_of(GOOD) == ()


# What is there: (facts, whether a run is blocked, what one problem says, what to do about it)
CASES: dict[str, tuple[Facts, bool, str, str]] = {
    "no GPU": (with_gpus(machine=on(cards=())), False, "There is no GPU", "Take a machine with an NVIDIA GPU"),
    "no GPU on Colab": (with_gpus(machine=on(cards=(), notebook="Colab")), False, "no GPU", "Change runtime type"),
    "no GPU on Kaggle": (with_gpus(machine=on(cards=(), notebook="Kaggle")), False, "no GPU", "Settings, Accelerator"),
    "CPU-only torch": (
        replace(GOOD, torch=Torch("2.13.0+cpu", "", False)),
        False,
        r"has a GPU \(NVIDIA L4\) but torch 2.13.0\+cpu is a CPU-only build",
        r'pip install --force-reinstall "torch>=2.6,<2.15" torchvision\.',
    ),
    "hidden GPU": (with_gpus(machine=on(visible="")), False, "CUDA_VISIBLE_DEVICES='' hides", "Unset it"),
    "old driver": (with_gpus(), False, "CUDA 13.0.*cannot use .*driver 580.65", "Update the driver"),
    "Unsloth without a GPU": (
        with_gpus(machine=on(cards=())),
        False,
        "Unsloth is installed but there is no GPU: .* NotImplementedError",
        r"transformers \+ PEFT will be used",
    ),
    "two GPUs on Kaggle": (
        with_gpus(T4, T4, machine=on(notebook="Kaggle")),
        True,
        "2 GPUs are visible to one process on Kaggle, which TRL refuses",
        "CUDA_VISIBLE_DEVICES=0 .*accelerate launch",
    ),
    "a T4": (with_gpus(T4), False, r"Tesla T4 \(compute capability 7.5\) only emulates bf", "Leave bf16 unset"),
    "an overflowing family": (
        with_gpus(T4, precision=Precision("float16", "fp16", "sdpa", False, True, ("wide3",))),
        False,
        r"overflow in it \(wide3\) are loaded in bfloat16",
        "choose a model type that does not overflow",
    ),
    "no kernels for the GPU": (
        with_gpus(replace(T4, name="Tesla P100", capability=(6, 0), failure="no kernel image")),
        True,
        r"Tesla P100\), compute capability 6.0, cannot compute .*no kernel image",
        "Install a torch built for it",
    ),
    "a small GPU": (with_gpus(replace(L4, total_gib=6.0, free_gib=6.0)), False, "6.0 GiB of memory", "load_in_4bit"),
    "a GPU in use": (with_gpus(replace(L4, free_gib=3.0)), False, "22.0 GiB of memory 3.0 are free", "End the process"),
    "TRL outside": (
        with_package("trl", version="1.16.0", inside=False, inside_unsloth=True),
        False,
        r"trl 1.16.0 is outside the tested window \(>=1.15,<1.16\)",
        r'pip install "trl>=1.15,<1.16"\.',
    ),
    "torch outside": (with_package("torch", inside=False), False, "torch 2.14.1 is outside", 'install "torch'),
    "Unsloth outside": (with_package("unsloth", inside=False), False, "unsloth .* is outside", 'install "unsloth'),
    "beyond Unsloth": (
        with_package("transformers", version="5.17.1", inside_unsloth=False),
        False,
        r"transformers 5.17.1 is outside what Unsloth 2026.10.7 takes \(<=5.17.0\)",
        r'pip install "transformers<=5.17.0"\.',
    ),
    "Unsloth broken": (
        replace(GOOD, backend=Backend("hf", "Unsloth cannot be imported here (no triton)")),
        False,
        r"is not used: Unsloth cannot be imported here \(no triton\)",
        r"transformers \+ PEFT will be used",
    ),
    "no Unsloth": (
        with_package("unsloth", version=None, failure=None),
        False,
        "Unsloth is not inst",
        "pip install unsl",
    ),
    "no torchvision": (
        with_package("torchvision", version=None, inside=None, failure=None),
        False,
        "torchvision is not installed",
        "pip install torchvision",
    ),
    "torchvision of another torch": (
        with_package("torchvision", failure="RuntimeError: operator torchvision::nms does not exist"),
        True,
        r"cannot be imported beside torch 2.14.1 \(RuntimeError: operator torchvision::nms does not exist\)",
        "or remove torchvision",
    ),
    "no bitsandbytes": (
        with_package("bitsandbytes", version=None, failure=None),
        False,
        "bitsandbytes is not installed, so load_in_4bit is refused",
        "pip install bitsandbytes",
    ),
    "bitsandbytes broken": (with_package("bitsandbytes", failure="OSError: x"), False, "OSError: x", "without load_in"),
    "no TRL": (
        with_package("trl", version=None, failure=None),
        True,
        "trl is not installed",
        'install "trl>=1.15,<1.16"',
    ),
    "TRL broken": (with_package("trl", failure="AttributeError: y"), True, "AttributeError: y", "--force-reinstall"),
    "the trainer": (replace(GOOD, trainer_failure="ImportError: z"), True, "The trainer .*ImportError: z", "window"),
    "little disk": (
        replace(GOOD, machine=on(disk_gib={"Hugging Face cache": 4.0})),
        False,
        "4.0 GiB of disk are free for the Hugging Face cache",
        "HF_HOME",
    ),
    "no disk": (replace(GOOD, machine=on(disk_gib={"current folder": 0.2})), True, "0.2 GiB of disk", "--output"),
    "little memory": (replace(GOOD, machine=on(memory_free_gib=3.0)), False, "3.0 GiB of memory are free", "End other"),
    "offline": (replace(GOOD, machine=on(offline="HF_HUB_OFFLINE")), False, "HF_HUB_OFFLINE is set", "Unset it"),
    "torch does not answer": (
        replace(GOOD, torch=None, failures={"torch": "RuntimeError: no NVML"}),
        True,
        r"could not be asked for its GPUs \(RuntimeError: no NVML\)",
        "Reinstall it",
    ),
    "a patch's place is gone": (
        replace(GOOD, patches=(PatchState("p", "trl.py", "", "cannot be probed (RuntimeError: gone)"),)),
        False,
        "The patch p cannot be probed",
        "into the tested window",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_problem_says_what_and_what_to_do(case: str):
    facts, blocks, what, todo = CASES[case]
    found = problems_of(facts)
    problem = next((p for p in found if re.search(what, p.text)), None)
    assert problem, [p.text for p in found]
    assert re.search(todo, problem.text), problem.text
    assert problem.blocks is blocks and problem.text.endswith(".") and "\n" not in problem.text
    assert Diagnosis(facts, found).blocked is blocks


def test_what_blocks_comes_first():
    facts = with_gpus(T4, T4, machine=on(offline="HF_HUB_OFFLINE"))
    blocks = [problem.blocks for problem in problems_of(facts)]
    assert blocks == sorted(blocks, reverse=True) and blocks[0] and not blocks[-1]


def test_no_needless_problem():
    """A launcher's process of its own for each GPU, a package of other machines, an extra nobody asked for."""
    several = with_gpus(L4, L4, machine=on(processes=2))
    assert problems_of(several) == ()
    assert problems_of(with_package("bitsandbytes", version=None, need="elsewhere")) == ()
    assert problems_of(with_package("trl", inside=None, window=None)) == ()


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_windows_are_the_metadatas_own(monkeypatch):
    """An installed distribution, one of another version in front of a clone, none, and a lone folder."""
    installed = {str(requirement) for requirement in packages.own_requirements()}
    assert installed == {str(r) for r in map(_requirement, importlib.metadata.requires("vlm-grpo"))}
    listed = {package.name: package for package in packages.list_packages()}
    assert listed["trl"].window == ">=1.15,<1.16" and listed["trl"].inside and listed["trl"].need == "run"
    assert listed["fastapi"].extra == "serve" and "pytest" not in listed
    assert listed["unsloth"].need == ("machine" if sys.platform == "linux" else "elsewhere")

    stale = SimpleNamespace(version="0.0.0")
    for found in (lambda name: stale, _not_installed):
        monkeypatch.setattr(packages, "distribution", found)
        clone = packages.list_packages()
        assert {p.name: (p.window, p.need, p.extra) for p in clone} == {
            name: (p.window, p.need, p.extra) for name, p in listed.items()
        }
    monkeypatch.setattr(packages, "__file__", "/nowhere/vlm_grpo/doctor/packages.py")
    unknown = {package.name: package for package in packages.list_packages()}
    assert unknown["trl"].window is None and unknown["trl"].version and unknown["trl"].inside is None


def _requirement(line: str):
    from packaging.requirements import Requirement

    return Requirement(line)


def _not_installed(name: str):
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_version_lies_in_its_window_or_not(monkeypatch):
    monkeypatch.setattr(packages, "version", lambda name: {"trl": "1.16.0", "torch": "2.14.1+cu130"}.get(name, "9!9"))
    listed = {package.name: package for package in packages.list_packages()}
    assert listed["trl"].inside is False and listed["torch"].inside is True


def test_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "yet"))
    for name in ("HF_HUB_CACHE", "COLAB_RELEASE_TAG", "COLAB_GPU", "KAGGLE_KERNEL_RUN_TYPE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    found = machine.look_around()
    assert found.cpus >= 1 and found.memory_gib > found.memory_free_gib > 0
    assert found.disk_gib["Hugging Face cache"] > 0 and found.processes == 1
    assert (found.notebook, found.offline) == ("", "")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "r")
    assert machine.notebook() == "Colab"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert machine.notebook() == "Kaggle"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert machine.offline() == "HF_HUB_OFFLINE"
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "current folder" not in machine.look_around().disk_gib


@pytest.mark.parametrize("code, cards", [(0, ("Tesla T4", "Tesla T4")), (9, ())])
def test_the_drivers_own_tool(monkeypatch, tmp_path, code, cards):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "Tesla T4, 550.54"\necho "Tesla T4, 550.54"\nexit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine.nvidia() == (cards, "550.54" if cards else "")


def test_a_gpu_that_cannot_compute_is_a_fact(monkeypatch):
    import torch

    card = SimpleNamespace(name="Tesla P100", total_memory=16 << 30, major=6, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    (gpu,) = probing.torch()["gpus"]
    assert gpu["capability"] == [6, 0] and gpu["total_gib"] == 16 and gpu["failure"]


def test_the_reason_is_what_was_raised_first():
    try:
        try:
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        except RuntimeError as inner:
            raise ModuleNotFoundError("Could not import module 'X'") from inner
    except ModuleNotFoundError as error:
        assert probing.reason_of(error) == "RuntimeError: operator torchvision::nms does not exist"
    assert probing.reason_of(NotImplementedError()) == "NotImplementedError"


def test_a_process_that_dies_leaves_what_it_said(monkeypatch):
    """A library that ends Python while it is imported: a fact, beside what was asked before it."""
    script = (
        "import json; print(json.dumps({'asked': 'backend'})); "
        "print(json.dumps({'question': 'backend', 'value': {'name': 'hf', 'reason': 'r'}})); "
        "print(json.dumps({'asked': 'import av'}), flush=True); import os; os._exit(11)"
    )
    monkeypatch.setattr(asking, "_START", script)
    facts = asking.ask(Facts(HOME, (Package("av", "18.1.0", failure=None), Package("trl", "1.15.0"))))
    assert facts.backend == Backend("hf", "r") and facts.torch is None
    assert facts.package("av").failure == "the process ended with code 11" and facts.package("trl").failure is None
    assert facts.trainer_failure == "the process ended with code 11 at import av"
    assert any(problem.blocks and "av" in problem.text for problem in problems_of(facts))


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("case", ["good", *CASES])
def test_the_page_fits(case: str, width: int):
    facts = CASES[case][0] if case in CASES else GOOD
    console = Console(file=io.StringIO(), width=width)
    show(facts, problems_of(facts), console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert titles[0].strip() == "Machine" and titles[-1].strip() == "Problems"


@pytest.mark.parametrize("facts, code", [(GOOD, 0), (CASES["two GPUs on Kaggle"][0], 1)])
def test_the_exit_code_says_whether_a_run_can_start(monkeypatch, facts, code):
    monkeypatch.setattr(doctor, "diagnose", lambda: Diagnosis(facts, problems_of(facts)))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == code
    said = json.loads(result.output)
    assert said["blocked"] is bool(code) and said["facts"]["machine"]["cpus"] == 8
    page = CliRunner().invoke(app, ["doctor"])
    assert page.exit_code == code and ("blocks" in page.output) is bool(code)


def test_help_names_the_exit_codes_and_needs_no_torch():
    script = (
        "import sys; from vlm_grpo.cli import app; from typer.testing import CliRunner; "
        "print(CliRunner().invoke(app, ['doctor', '--help']).output); import vlm_grpo.doctor; "
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Exit code 0 where nothing blocks a run, 1 where" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_the_doctor_here(tmp_path):
    """As a user calls it: every question is answered, and the libraries say what a run would find."""
    command = [sys.executable, "-m", "vlm_grpo", "doctor", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = json.loads(done.stdout)
    assert done.returncode == said["blocked"] == 0, said["problems"]
    facts = said["facts"]
    assert facts["failures"] == {} and facts["trainer_failure"] == ""
    tried = {package["name"]: package["failure"] for package in facts["packages"] if package["need"] == "run"}
    assert set(tried.values()) == {""}, tried
    from vlm_grpo.patches.ledger import patches

    assert [patch["name"] for patch in facts["patches"]] == [patch.name for _, patch in patches()]
