"""Rewards by name, by file or by import, and the keyword arguments that their functions take."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..config import RewardSpec
from ..errors import RewardError, nearest

# Name to module and attribute here: a run imports what it names. A class is an object to be made, once a run.
BUILT_IN: dict[str, str] = {
    "accuracy": "accuracy:accuracy",
    "format": "format:think_answer_format",
    "actions": "actions:actions",
    "counting": "counting:counting",
    "asr": "asr:Asr",
    "grounding": "grounding:Grounding",
    "ocr": "ocr:Ocr",
    "caption_type": "caption_type:caption_type",
    "length": "length:Length",
    "overlong": "length:Overlong",
    "length_bonus": "length:LengthBonus",
    "repetition": "repetition:Repetition",
    "api": "api:ApiReward",
    "model": "model:kind_of",
}
_BY_OPTIONS = frozenset({"model"})  # these are functions that say by the options which class is made
# What TRL gives every reward beside the columns of the rows.
_LONGEST = 300  # characters of an exception's message: an assertion about a picture shows all of its bytes
_TRLS = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})


def resolve(spec: RewardSpec) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function that a spec names, and the arguments of each call; of a class, an instance made with them.

    Raises:
        RewardError: an unknown name, file, function or argument; a class that cannot be made.
    """
    found = _find(spec.name)
    if spec.name in _BY_OPTIONS:
        found = found(spec.kwargs)
    refuse_unknown_arguments(found, spec)
    if not inspect.isclass(found):
        return found, {**(_defaults(found) if spec.name in BUILT_IN else {}), **spec.kwargs}
    try:
        made = found(**spec.kwargs)
    except RewardError as error:
        raise RewardError(f'The reward "{spec.name}": {error}') from error
    except Exception as error:  # a user's class may raise anything
        raise RewardError(
            f'The reward "{spec.name}": making {found.__name__} failed with {named(error)}. Fix it, or its kwargs.'
        ) from error
    if not callable(made):
        raise RewardError(f'The reward "{spec.name}" is a class without __call__. Give it one, or name a function.')
    if spec.timeout is not None and hasattr(made, "use_model"):  # it would go on in the model that is trained
        raise RewardError(
            f'The reward "{spec.name}": timeout={spec.timeout:g} cannot hold for a reward model, which works in the '
            "policy's own model. Leave it out."
        )
    return made, {}


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The options as they are unless given: a column of the dataset may have the name of one, and is not that."""
    return {one.name: one.default for one in parameters_of(function) or () if one.default is not one.empty}


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """Its parameters; None of a callable of C that does not tell."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def _find(name: str) -> Callable[..., Any]:
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), attribute)
    place, colon, attribute = name.rpartition(":")
    if not colon:
        hint = nearest(name, list(BUILT_IN))
        if Path(name).expanduser().is_dir():
            hint = f" A reward model in a folder is given as rewards: [{{model: {name}}}]."
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
            f'The reward "{name}": importing {place} failed with {named(error)}. Fix it there.'
        ) from error


def refuse_unknown_arguments(function: Callable[..., Any], spec: RewardSpec) -> None:
    """A misspelt argument would vanish into a function's ``**columns`` without a word."""
    parameters = parameters_of(function)
    if parameters is None:
        return
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if takes_any and (inspect.isclass(function) or spec.name not in BUILT_IN):
        return
    known = [
        parameter.name
        for parameter in parameters
        if parameter.name not in _TRLS and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    beside = list(RewardSpec.model_fields) if spec.name in _BY_OPTIONS else []  # options may be written beside these
    for key in spec.kwargs:
        if key not in known:
            raise RewardError(
                f'The reward "{spec.name}" has no option "{key}".{nearest(key, known + beside)} It has: '
                f"{', '.join(known) or 'none'}."
            )


def named(error: Exception) -> str:
    """``KeyError: 'x'``: an exception in one line of at most 300 characters."""
    lines = str(error).strip().splitlines() or ["no message"]
    line = lines[0] if len(lines[0]) <= _LONGEST else f"{lines[0][:_LONGEST]}..."
    return f"{type(error).__name__}: {line}"
