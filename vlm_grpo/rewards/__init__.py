"""Reward functions by name, by file or by import, each with TRL's contract and a check on what it returns."""

import functools
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any, SupportsFloat

from ..config import RewardSpec
from ..errors import RewardError, nearest
from .accuracy import accuracy
from .format import think_answer_format
from .text import completion_text

BUILT_IN: dict[str, Callable[..., Any]] = {"accuracy": accuracy, "format": think_answer_format}


def load_rewards(specs: Sequence[RewardSpec | str]) -> tuple[list[Callable[..., list[float | None]]], list[float]]:
    """Resolve rewards: a built-in name, ``file.py:function`` or ``module:function``.

    Returns:
        the functions, and their weights.

    Raises:
        RewardError: no reward, an unknown name, a missing file or function; the message says which.
    """
    if not specs:
        raise RewardError(f'No reward is given. Name at least one: {", ".join(BUILT_IN)}, or "file.py:function".')
    specs = [RewardSpec(name=spec) if isinstance(spec, str) else spec for spec in specs]
    labels: list[str] = []
    for spec in specs:  # TRL keeps metrics and samples by name: two rewards of one name would overwrite each other
        label = spec.name.rpartition(":")[2]
        labels.append(label if label not in labels else f"{label}_{len(labels) + 1}")
    functions = [_checked(_resolve(spec.name), spec, label) for spec, label in zip(specs, labels, strict=True)]
    return functions, [spec.weight for spec in specs]


def finite_reward(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``function``, which raises ``RewardError`` with the row where it returns NaN or infinity.

    TRL takes NaN for None, and turns an advantage that an infinity has spoilt into 0: both without a word.
    """

    @functools.wraps(function)
    def reward(*args: Any, **columns: Any) -> Any:
        return check_finite(function(*args, **columns), name, columns)

    @functools.wraps(function)
    async def async_reward(*args: Any, **columns: Any) -> Any:
        return check_finite(await function(*args, **columns), name, columns)

    return async_reward if _is_async(function) else reward


def check_finite(values: Iterable[Any], name: str, columns: dict[str, Any]) -> list[Any]:
    """The values of a reward; ``RewardError`` with the row where one is NaN or infinite."""
    values = list(values)
    for number, value in enumerate(values):
        if isinstance(value, SupportsFloat) and not _is_finite(value):
            raise _not_finite(name, float(value), columns, number)
    return values


def _not_finite(name: str, value: Any, columns: dict[str, Any], number: int) -> RewardError:
    return RewardError(
        f'The reward "{name}" returned {value}. Return a finite number, or None{row_of(columns, number)}.'
    )


def row_of(columns: dict[str, Any], number: int) -> str:
    """`` for the completion "..." of the prompt "..."``, as far as the columns of a reward have them."""
    said = [
        f'the {name} "{shorten(completion_text(columns[name + "s"][number]), 80)}"'
        for name in ("completion", "prompt")
        if len(columns.get(name + "s") or ()) > number
    ]
    return f" for {' of '.join(said)}" if said else ""


def _resolve(name: str) -> Callable[..., Any]:
    if name in BUILT_IN:
        return BUILT_IN[name]
    place, colon, attribute = name.rpartition(":")
    if not colon:
        hint = nearest(name, list(BUILT_IN))
        raise RewardError(
            f'There is no reward "{name}".{hint} Built in: {", ".join(BUILT_IN)}; your own: "file.py:function".'
        )
    module = _module(place, name)
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RewardError(
            f'The reward "{name}": {place} has no function "{attribute}".{nearest(attribute, known)} '
            f"It defines: {', '.join(known) or 'none'}."
        )
    return function


def _module(place: str, name: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise RewardError(f'The reward "{name}": the file "{place}" does not exist. Correct the path.')
        spec = importlib.util.spec_from_file_location(f"vlm_grpo_reward_{path.stem}", path)
        assert spec is not None and spec.loader is not None, f"{path} is a Python file"
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickling look the module up by name
        spec.loader.exec_module(module)
        return module
    except RewardError:
        raise
    except Exception as error:  # a user's file may raise anything while it is imported
        raise RewardError(
            f'The reward "{name}": importing {place} failed with {_named(error)}. Fix it there.'
        ) from error


def _checked(function: Callable[..., Any], spec: RewardSpec, label: str) -> Callable[..., list[float | None]]:
    """Bind the spec's arguments; name the reward in whatever it does wrong."""

    def check(values: Any, columns: dict[str, Any]) -> list[float | None]:
        completions = columns.get("completions")
        if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
            raise RewardError(
                f'The reward "{spec.name}" returned {values!r}. Return a list, one number per completion.'
            )
        values = list(values)
        if completions is not None and len(values) != len(completions):
            raise RewardError(
                f'The reward "{spec.name}" returned {len(values)} values for {len(completions)} completions. '
                "Return one per completion."
            )
        for number, value in enumerate(values):
            if value is not None and not _is_finite(value):
                raise _not_finite(spec.name, value, columns, number)
        return values

    @contextmanager
    def naming() -> Iterator[None]:
        try:
            yield
        except RewardError as error:
            raise RewardError(f'The reward "{spec.name}": {error}') from error
        except Exception as error:  # a user's function may raise anything
            raise RewardError(f'The reward "{spec.name}" failed with {_named(error)}. Fix it there.') from error

    @functools.wraps(function)
    def reward(*args: Any, **columns: Any) -> list[float | None]:
        with naming():
            values = function(*args, **{**columns, **spec.kwargs})
        return check(values, columns)

    @functools.wraps(function)
    async def async_reward(*args: Any, **columns: Any) -> list[float | None]:
        with naming():
            values = await function(*args, **{**columns, **spec.kwargs})
        return check(values, columns)

    checked: Any = async_reward if _is_async(function) else reward
    checked.__name__ = checked.__qualname__ = label
    return checked


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)  # noqa: B004


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
