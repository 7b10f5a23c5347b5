"""A library's own classes and functions, also where another library has put its own in their place."""

import importlib
import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

from .ledger import Patch

_LOCK = threading.RLock()


def is_defined_in(value: Any, module: ModuleType) -> bool:
    """Whether a function, or a class by its functions, was written in the module's file.

    ``__module__`` is a label that a replacement may copy; the file of the code is not.
    """
    values = vars(value).values() if isinstance(value, type) else [value]
    return any(getattr(inner, "__code__", None) and inner.__code__.co_filename == module.__file__ for inner in values)


def private_copy(live: ModuleType) -> ModuleType:
    """The module once more, run from its file under a private name: what was put into the live one is not in it."""
    name = _private_name(live.__name__)
    with _LOCK:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, live.__file__)
            assert spec is not None and spec.loader is not None, f"{live.__name__} has no source file"
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]


def _private_name(module_name: str) -> str:
    parent, _, own = module_name.rpartition(".")
    return f"{parent}._vlm_grpo_own_{own}"  # beside the live one, so that relative imports resolve


def is_copied(module_name: str) -> bool:
    """Whether a private copy of the module is in use in this process."""
    return _private_name(module_name) in sys.modules


def forget_copy(module_name: str) -> None:
    """The private copy is gone; classes that were taken from it stay as they are."""
    with _LOCK:
        sys.modules.pop(_private_name(module_name), None)


def is_replaced(module_name: str, class_name: str, names: tuple[str, ...] = ()) -> bool | None:
    """Whether another library has put its own in the place of a class, or of methods of it, and no copy stands in.

    None where the library is not installed.
    """
    if importlib.util.find_spec(module_name.partition(".")[0]) is None:
        return None
    if is_copied(module_name):
        return False
    live = importlib.import_module(module_name)
    cls = getattr(live, class_name)
    if names:
        return not all(is_defined_in(vars(cls).get(name), live) for name in names)
    return not any(base.__name__ == class_name and is_defined_in(base, live) for base in cls.__mro__)


def own_class(module_name: str, class_name: str) -> type:
    """The class that the module's file defines: the live one where it still is, or is a base of what replaced it."""
    live = importlib.import_module(module_name)
    for candidate in getattr(live, class_name).__mro__:
        if candidate.__name__ == class_name and is_defined_in(candidate, live):
            return candidate
    return getattr(private_copy(live), class_name)


def own_methods(module_name: str, class_name: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Methods of a class as the module's file defines them, also where the live class holds others.

    Raises:
        AttributeError: the class has no such method.
    """
    live = importlib.import_module(module_name)
    methods = {}
    for name in names:
        cls = getattr(live, class_name)
        if not is_defined_in(vars(cls).get(name), live):
            cls = getattr(private_copy(live), class_name)
        methods[name] = vars(cls)[name] if name in vars(cls) else getattr(cls, name)
    return methods


PATCHES: list[Patch] = []  # nothing is changed here
