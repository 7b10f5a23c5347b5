"""Installed versions, and the windows this project and Unsloth ask for: by their own metadata, no second list."""

import tomllib
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from .facts import Package

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

_US = "vlm-grpo"
_DEVELOPMENT = "dev"  # an extra for those who change this project, not for those who use it
# Neither is in our own list: Unsloth brings them, and both are the first to be asked for when it fails.
_UNSLOTHS = ("unsloth-zoo", "triton")


def list_packages() -> tuple[Package, ...]:
    """Every package asked for, in the order of the project's own list; not one of them is imported."""
    from packaging.utils import canonicalize_name

    found: dict[str, Package] = {}
    for requirement in own_requirements():
        name = canonicalize_name(requirement.name)
        if name == _US:
            continue
        need, extra = _need(requirement)
        if extra != _DEVELOPMENT and name not in found:
            package = Package(name, _installed(name), _written(requirement.specifier), need=need, extra=extra)
            found[name] = replace(package, inside=_lies_in(package.version, package.window))
    if not found:  # nothing says what is asked for: then what the code cannot do without
        names = ("torch", "torchvision", "trl", "transformers", "peft", "accelerate", "datasets", "pillow", "av")
        found = {name: Package(name, _installed(name), None) for name in names}
        found |= {name: Package(name, _installed(name), None, need="machine") for name in ("bitsandbytes", "unsloth")}
    for name in _UNSLOTHS:
        found.setdefault(name, Package(name, _installed(name), need="machine"))
    return tuple(_with_unsloth(list(found.values())))


def own_requirements() -> list["Requirement"]:
    """What this project asks for: by the installed distribution, else by ``pyproject.toml`` beside the package.

    An empty list where neither is there, as for a copied folder.
    """
    from packaging.requirements import Requirement

    return [Requirement(line) for line in _own_lines()]


def _own_lines() -> list[str]:
    try:
        # Another version's metadata says nothing of this code, which then is a clone in front of it.
        if distribution(_US).version == __version__ and (lines := requires(_US)):
            return lines
    except PackageNotFoundError:
        pass
    path = Path(__file__).parents[2] / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return []
    if project.get("name") != _US:
        return []
    lines = list(project.get("dependencies", ()))
    for extra, more in project.get("optional-dependencies", {}).items():
        lines += [_with_extra(line, extra) for line in more]
    return lines


def _with_extra(line: str, extra: str) -> str:
    """A line of an extra as an installed distribution's metadata writes it."""
    before, semicolon, marker = line.partition(";")
    return f'{before}; ({marker}) and extra == "{extra}"' if semicolon else f'{before}; extra == "{extra}"'


def _need(requirement: "Requirement") -> tuple[str, str]:
    """``(need, extra)`` of a package, as ``Package`` has them."""
    marker = requirement.marker
    if marker is None:
        return "run", ""
    if marker.evaluate({"extra": ""}):
        return "machine", ""
    for extra in _extras(str(marker)):
        if marker.evaluate({"extra": extra}):
            return "extra", extra
    return "elsewhere", ""


def _extras(marker: str) -> list[str]:
    words = marker.replace("(", " ").replace(")", " ").split()
    return [words[at + 2].strip("\"'") for at, word in enumerate(words[:-2]) if word == "extra"]


def _with_unsloth(packages: list[Package]) -> Iterable[Package]:
    """The same packages with what the installed Unsloth asks of them."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name

    asked: dict[str, SpecifierSet] = {}
    for owner in ("unsloth", "unsloth-zoo"):
        try:
            lines = requires(owner) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                name = canonicalize_name(requirement.name)
                asked[name] = asked.get(name, SpecifierSet()) & requirement.specifier
    for package in packages:
        window = _written(asked.get(package.name, SpecifierSet()))
        yield replace(package, unsloth=window, inside_unsloth=_lies_in(package.version, window) if window else None)


def _written(window: "SpecifierSet") -> str:
    """The lower bound first, then the upper one, then single versions that are left out."""
    order = (">", "~", "=", "<", "!")
    return ",".join(sorted({str(part) for part in window}, key=lambda part: (order.index(part[0]), part)))


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _lies_in(number: str | None, window: str | None) -> bool | None:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    if number is None or window is None:
        return None
    try:
        # A development build (2.14.0.dev..., 2.14.1+cu130) counts by its number.
        return SpecifierSet(window).contains(Version(number), prereleases=True)
    except InvalidVersion:
        return None


_MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml"}


def module_of(name: str) -> str:
    """The module that a distribution is imported by."""
    return _MODULES.get(name, name.replace("-", "_"))
