"""What pydantic found wrong with a config, in one sentence."""

from collections.abc import Callable

from pydantic import ValidationError

from .errors import ConfigError, nearest

Location = tuple[int | str, ...]


def as_sentence(
    error: ValidationError, known: Callable[[Location], list[str]], origin: dict[str, str], at: tuple[str, ...] = ()
) -> ConfigError:
    """The first problem pydantic found, said with its key, its value and where it was written.

    Args:
        error: pydantic's.
        known: the keys that are allowed beside the one at a location.
        origin: where each key was written.
        at: the section that was validated.
    """
    problems = error.errors()
    # A misspelt key often is why another one is missing.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = at + problem["loc"]
    path = ".".join(str(part) for part in location)
    source = next((origin[p] for p in _prefixes(path) if p in origin), "config")
    last = str(location[-1]) if location else ""
    if problem["type"] == "extra_forbidden":
        hint = nearest(last, known(location))
        if not hint and len(location) == 1:
            hint = f' Trainer options go under "train:" (train.{last}).'
        return ConfigError(
            f'{source}: unknown key "{path}".{hint or " Known here: " + ", ".join(known(location)) + "."}'
        )
    if problem["type"] == "missing":
        if path != "model":
            return ConfigError(f'{source}: "{path}" is needed. Give it.')
        typo = nearest("model", list(problem["input"].get("train", {}))).replace("Did you mean", "Was it meant by")
        return ConfigError(f"{source}: a model is needed. Give --model, or model: in the config file.{typo}")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = 'needs "key: value" lines, one option each'
    message = message[:1].lower() + message[1:]
    given = "" if problem["type"] == "value_error" else f" (given {problem['input']!r})"
    if not path:  # options that contradict each other
        return ConfigError(f"{', '.join(dict.fromkeys(origin.values())) or 'config'}: {message.removesuffix('.')}.")
    return ConfigError(f"{source}: {path}: {message}{given}.")


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
