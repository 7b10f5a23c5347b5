"""Reward functions by name, by file or by import, each with TRL's contract and a check on what it returns."""

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from ..config import RewardSpec
from ..errors import RewardError, nearest
from .checked import check_finite, check_values, finite_reward, first_row, is_async, row_of
from .failed import Failed
from .resolve import BUILT_IN, named, parameters_of, resolve
from .showing import marks, say_changed, show_model, shown

__all__ = [
    "BUILT_IN",
    "Failed",
    "as_functions",
    "check_finite",
    "finite_reward",
    "introduce",
    "load_rewards",
    "marks",
    "row_of",
    "say_changed",
    "show_model",
    "shown",
]

_NO_COLUMNS = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})


def load_rewards(specs: Sequence[RewardSpec | str]) -> tuple[list[Callable[..., list[float | None]]], list[float]]:
    """Resolve rewards: a built-in name, ``file.py:function`` or ``module:function``.

    A class is made with the spec's ``kwargs``, once; a function is given them at each call. ``columns``, ``timeout``,
    ``scale``, ``shift`` and ``clip`` hold for any of them.

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
        label, number = spec.name.rpartition(":")[2], len(labels) + 1
        while (distinct := label if label not in labels else f"{label}_{number}") in labels:
            number += 1
        labels.append(distinct)
    functions = [_wrapped(*resolve(spec), spec, label) for spec, label in zip(specs, labels, strict=True)]
    return functions, [spec.weight for spec in specs]


def as_functions(given: Any) -> Any:
    """What a trainer is given as rewards, the folder of a reward model of ours among them as ``JudgeReward``.

    Args:
        given: one or several functions, models, or names; anything else comes back as it is.

    Raises:
        RewardError: the folder of a reward model that is not finished, or lacks something.
    """
    from .judge import JudgeReward
    from .reward_run import is_reward_run

    if isinstance(given, list | tuple):
        return [as_functions(one) for one in given]
    return JudgeReward(given) if is_reward_run(given) else given


def introduce(functions: Iterable[Any], **run: Any) -> None:
    """Show the run to those rewards that have a ``use_run``: once, before the first completion.

    Args:
        functions: rewards; what wraps them is looked through.
        run: ``processor``, ``media`` (``MediaOptions``) and ``max_completion_length``, or as much as is known.

    Raises:
        RewardError: an option of a reward that contradicts the run.
    """
    for function in functions:
        use_run = getattr(inspect.unwrap(function), "use_run", None) if callable(function) else None
        if use_run is not None:
            use_run(**run)


def _wrapped(
    function: Callable[..., Any], bound: dict[str, Any], spec: RewardSpec, label: str
) -> Callable[..., list[float | None]]:
    """Bind arguments and columns; name the reward in whatever it does wrong; scale and clip its values."""
    own = parameters_of(function)

    def arguments(columns: dict[str, Any], positional: tuple[Any, ...]) -> dict[str, Any]:
        given = {**_columns(spec, columns), **bound}
        if own is not None and not positional:
            _refuse_misfit(own, given)
        return given

    @functools.wraps(function)
    def reward(*args: Any, **columns: Any) -> list[Any]:
        with _naming(spec, columns):
            call = functools.partial(function, *args, **arguments(columns, args))
            values = call() if spec.timeout is None else _within(spec.timeout, call, columns)
        return _adjusted(check_values(values, spec.name, columns), spec)

    @functools.wraps(function)
    async def async_reward(*args: Any, **columns: Any) -> list[Any]:
        with _naming(spec, columns):
            call = function(*args, **arguments(columns, args))
            try:
                values = await asyncio.wait_for(call, spec.timeout)
            except TimeoutError:
                if spec.timeout is None:
                    raise
                values = _late(spec.timeout, columns)
        return _adjusted(check_values(values, spec.name, columns), spec)

    checked: Any = async_reward if is_async(function) else reward
    checked.__name__ = checked.__qualname__ = label
    return checked


@contextmanager
def _naming(spec: RewardSpec, columns: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except RewardError as error:
        raise RewardError(f'The reward "{spec.name}": {error}') from error
    except Exception as error:  # a user's function may raise anything
        raise RewardError(
            f'The reward "{spec.name}" failed with {named(error)}. Fix it there{first_row(columns)}.'
        ) from error


def _columns(spec: RewardSpec, columns: dict[str, Any]) -> dict[str, Any]:
    """The columns under the names that the function has for them."""
    renamed = dict(columns)
    for argument, column in spec.columns.items():
        if column not in columns:
            known = [name for name, value in columns.items() if isinstance(value, list) and name not in _NO_COLUMNS]
            raise RewardError(
                f'columns: {argument}={column}: the rows have no column "{column}".{nearest(column, known)} They '
                f"have: {', '.join(known) or 'none'}."
            )
        renamed[argument] = columns[column]
    return renamed


def _refuse_misfit(parameters: Sequence[inspect.Parameter], given: dict[str, Any]) -> None:
    """A function that asks for a column which the rows lack, or cannot take all that they have."""
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    names = {one.name for one in named}
    columns = [name for name, value in given.items() if isinstance(value, list) and name not in _NO_COLUMNS]
    for one in named:
        if one.default is one.empty and one.name not in given:
            hint = nearest(one.name, columns)
            raise RewardError(
                f'it asks for the column "{one.name}", which the rows do not have.{hint} They have: '
                f"{', '.join(columns) or 'none'}. Name the one that is meant: columns: {{{one.name}: COLUMN}}."
            )
    more = [name for name in given if name not in names]
    if more and not any(one.kind is one.VAR_KEYWORD for one in parameters):
        raise RewardError(
            f"it is given {', '.join(more)} by name and does not take them. Add **columns to its arguments: every "
            "reward is given all columns of the rows."
        )


def _within(seconds: float, call: Callable[[], Any], columns: dict[str, Any]) -> Any:
    """The call's result, or Failed for each completion; what hangs goes on in a thread that no exit waits for."""
    done: Future = Future()

    def work() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, name="reward", daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():  # the function's own
            raise
        return _late(seconds, columns)


def _late(seconds: float, columns: dict[str, Any]) -> list[Any]:
    return [Failed(f"no answer within {seconds:g} s")] * len(columns["completions"])


def _adjusted(values: list[Any], spec: RewardSpec) -> list[Any]:
    if spec.scale == 1 and spec.shift == 0 and spec.clip is None:
        return values
    low, high = spec.clip or (float("-inf"), float("inf"))
    return [
        value if value is None or isinstance(value, Failed) else min(high, max(low, value * spec.scale + spec.shift))
        for value in values
    ]
