"""Installations without a package: import, --help, doctor, 4-bit and the image path work, or say what is missing.

Each is a folder of links to everything installed here but the package and its metadata, so that Python really does not
find it.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tiny
from test_broken import REWARDS

ROOT = Path(__file__).parents[1]
WITHOUT = {
    "unsloth": ("unsloth", "unsloth_zoo"),
    "bitsandbytes": ("bitsandbytes",),
    "torchvision": ("torchvision",),
    "compilers": ("triton", "xformers"),
    "all": ("unsloth", "unsloth_zoo", "bitsandbytes", "torchvision", "triton", "xformers"),
}


def entries(distributions: tuple[str, ...]) -> set[str]:
    """What these distributions have put into the folder of packages, themselves and their metadata."""
    gone = set()
    for name in distributions:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        gone |= {file.parts[0] for file in files}
    return gone - {"..", "__pycache__"}


def links(folder: Path, distributions: tuple[str, ...]) -> Path:
    folder.mkdir()
    gone = entries(distributions)
    for packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(packages).iterdir():
            if entry.name not in gone and entry.suffix != ".pth" and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The environments, and what a run takes: models, a picture, rows and rewards."""
    folder = tmp_path_factory.mktemp("environments")
    for name, distributions in WITHOUT.items():
        links(folder / f"without-{name}", distributions)
    tiny.image(1).save(folder / "a.png")
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": tiny.prompt(f"count {word}"), "image": "a.png"} for word in tiny.WORDS[:2]]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def python(folder: Path, without: str, *arguments: str) -> subprocess.CompletedProcess:
    """Python in that environment; nothing but its folder and this repository is on the path."""
    paths = os.pathsep.join([str(ROOT), str(folder / f"without-{without}")])
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "120", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def train(folder: Path, without: str, model: str, *more: str) -> subprocess.CompletedProcess:
    """One step of GRPO on pictures; a published folder of ``model`` is made first."""
    if not (folder / model).exists():
        tiny.save(model, folder / model)
    options = {"model": model, "data": "rows.jsonl", "reward": "rewards.py:pattern", "lora": "true", "max-steps": "1"}
    options |= {"output": f"runs/{without}-{model}", "per_device_train_batch_size": "4", "num_generations": "2"}
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    return python(folder, without, "-m", "vlm_grpo", "train", *given, "--max_completion_length", "2", *more)


def sentence(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stderr.strip().splitlines()[-1]


LOOK = """
import importlib.metadata, importlib.util, sys
for name in sys.argv[1:]:
    assert importlib.util.find_spec(name) is None, name
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        continue
    raise AssertionError(name)
import vlm_grpo
from vlm_grpo.cli import main
sys.argv[1:] = ["--help"]
main()
"""


@pytest.mark.parametrize("without", WITHOUT)
def test_import_and_help(folder, without):
    done = python(folder, without, "-c", LOOK, *WITHOUT[without])
    assert done.returncode == 0, done.stderr
    assert {"train", "chat", "doctor"} <= set(done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("without", WITHOUT)
def test_the_doctor_says_what_is_missing(folder, without):
    done = python(folder, without, "-m", "vlm_grpo", "doctor", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == said["blocked"] == 0, said["problems"]
    assert said["facts"]["failures"] == {} and said["facts"]["trainer_failure"] == ""
    versions = {package["name"]: package["version"] for package in said["facts"]["packages"]}
    gone = {name.replace("_", "-") for name in WITHOUT[without]}
    assert gone == {name for name in versions if versions[name] is None} - {"fastapi", "uvicorn"}
    problems = " ".join(problem["text"] for problem in said["problems"])
    for name in gone & {"torchvision", "bitsandbytes"}:
        assert f"{name} is not installed" in problems
    assert ("Unsloth is installed but" in problems) is ("unsloth" not in gone)


@pytest.mark.slow
def test_the_doctor_names_a_torchvision_of_another_torch(folder):
    """As pip leaves it beside a torch it was not built for; then transformers itself cannot be imported."""
    broken = links(folder / "without-fit", ("torchvision",))
    (broken / "torchvision").mkdir()
    (broken / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    done = python(folder, "fit", "-m", "vlm_grpo", "doctor")
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
    page = " ".join(done.stdout.split())
    assert "is installed but cannot be imported" in page
    assert "operator torchvision::nms does not exist" in page and "remove torchvision" in page


@pytest.mark.slow
def test_four_bit_without_bitsandbytes_is_one_sentence(folder):
    call = "from vlm_grpo import load_model; load_model('nobody/model', load_in_4bit=True)"
    done = python(folder, "bitsandbytes", "-c", call)
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "vlm_grpo.errors.UnsupportedError: load_in_4bit needs bitsandbytes, which cannot be imported here "
        "(No module named 'bitsandbytes'). Install it (pip install bitsandbytes), or load without 4-bit."
    )


@pytest.mark.slow
@pytest.mark.parametrize("without", WITHOUT)
def test_a_step_on_pictures(folder, without):
    """LLaVA's pictures are read by Pillow where torchvision is missing."""
    done = train(folder, without, "llava")
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = (folder / f"runs/{without}-llava/metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["step"] == 1


@pytest.mark.slow
def test_unsloth_asked_for_where_it_is_missing(folder):
    assert 'backend="unsloth": Unsloth is not installed.' in sentence(
        train(folder, "unsloth", "llava", "--backend", "unsloth", "--output", "runs/asked")
    )


# Each fails in a way of its own: the video processor, the image processor, and the config, whose tower is timm's.
@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen2_5_vl", "smolvlm", "gemma3n"])
def test_a_model_that_needs_torchvision_says_so(folder, model):
    said = sentence(train(folder, "torchvision", model))
    assert re.search(rf"{model}'? needs torchvision, which is not installed\b.*pip install torchvision", said), said
