"""The package as others get it: its folders, its symlink, its exports, its wheel, its commands."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import vlm_grpo

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def modules() -> set[str]:
    """Every Python file of the package as its path inside a wheel; the walk does not follow the symlink."""
    files = {path.relative_to(ROOT) for home in ("vlm_grpo", "patches") for path in (ROOT / home).rglob("*.py")}
    return {str(f if f.parts[0] == "vlm_grpo" else Path("vlm_grpo", f)) for f in files}


def test_packages_are_exactly_the_folders_with_python_files():
    assert set(SETUPTOOLS["packages"]) == {str(Path(file).parent).replace(os.sep, ".") for file in modules()}
    assert SETUPTOOLS["package-dir"] == {"vlm_grpo.patches": "patches"}


def test_the_link_to_patches_is_relative_and_tracked():
    assert os.readlink(ROOT / "vlm_grpo" / "patches") == os.path.join("..", "patches")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-s", "vlm_grpo/patches"], cwd=ROOT, capture_output=True, text=True)
    assert listed.stdout.startswith("120000 "), f"git does not track vlm_grpo/patches as a symlink: {listed.stdout!r}"


def test_patches_has_one_name_only(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match='Import this package as "vlm_grpo.patches"'):
        importlib.import_module("patches")
    assert importlib.import_module("vlm_grpo.patches").__name__ == "vlm_grpo.patches"


def test_every_export_resolves_to_what_type_checkers_see():
    for name in vlm_grpo.__all__:
        assert getattr(vlm_grpo, name) is not None
    assert set(vlm_grpo.__all__) <= set(dir(vlm_grpo))
    with pytest.raises(AttributeError, match="no attribute 'VLMGRPOTrainr'"):
        vlm_grpo.VLMGRPOTrainr  # noqa: B018

    tree = ast.parse(Path(vlm_grpo.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname: node.module for node in imports for alias in node.names} == vlm_grpo._HOMES


def test_version_is_written_twice_and_equal():
    assert PROJECT["project"]["version"] == vlm_grpo.__version__


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([a-z-]+) ", shown, re.MULTILINE)) == make_targets()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documented_make_commands_exist(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"(?:^|`|&& )make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert named, f"{document} names no make target"
    assert named <= make_targets()


def test_a_second_make_installs_nothing(tmp_path):
    """A newer pyproject.toml of the same content, as after a checkout, does not call pip."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    stamp = tmp_path / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.write_bytes((ROOT / "pyproject.toml").read_bytes())
    os.utime(stamp, (1, 1))
    done = subprocess.run(["make", "venv"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Installing" not in done.stdout, done.stdout + done.stderr
    assert stamp.stat().st_mtime > 1


def test_an_old_python_is_refused_in_one_sentence(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text().replace("(3, 11)", "(99, 0)"))
    done = subprocess.run(["make", "venv", f"PYTHON={sys.executable}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "is too old: vlm-grpo needs 3.11 or newer" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / ".venv").exists()


@pytest.mark.slow
def test_the_wheel_holds_every_module_once(tmp_path):
    """Built from a copy, so that neither an old build/ nor this checkout is touched."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("vlm_grpo", "patches"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.endswith(".py")} == modules()
    assert len(names) == len(set(names)) and "vlm_grpo/patches/README.md" in names
    beside = {path.relative_to(ROOT) for path in (ROOT / "vlm_grpo").rglob("*.*") if path.is_file()}
    assert {str(f) for f in beside if f.suffix in (".html", ".css", ".js", ".jinja")} <= set(names), "pages' templates"
    assert "would be ignored" not in done.stdout + done.stderr
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_readmes_row_reward_and_code_work():
    from vlm_grpo.data import to_sample

    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    rows = [json.loads(line) for kind, block in blocks if kind == "json" for line in block.splitlines()]
    assert rows and all(to_sample(row).media for row in rows)
    code = [block for kind, block in blocks if kind == "python"]
    names: dict = {}
    exec(code[0], names)
    completions = [[{"role": "assistant", "content": answer}] for answer in (" 3 ", "4")]
    assert names["right"](completions, answer=["3", "3"], prompts=[], trainer_state=None) == [1.0, 0.0]
    imported = re.search(r"from vlm_grpo import (.*)", code[1])
    assert imported and set(imported[1].split(", ")) <= set(vlm_grpo.__all__)
    compile(code[1], "README.md", "exec")
