"""The tokens of a training command: its own options, and every other ``--name value`` for the run config."""

from typing import Any

from typer.core import TyperCommand

from ..errors import ConfigError
from ..yaml_text import parse_value

EXTRA = "vlm_grpo.extra"


class RunCommand(TyperCommand):
    """Takes its own options with dashes or underscores and keeps every other ``--name value`` for the run config."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own, ctx.meta[EXTRA] = _split(args, self.get_params(ctx))
        return super().parse_args(ctx, own)


def _split(args: list[str], params: list[Any]) -> tuple[list[str], dict[str, Any]]:
    """The tokens of the declared options and arguments, and the values of all other options by name.

    An undeclared option takes the tokens up to the next ``--option`` (several make a list, none means true), except a
    config file, which ends in .yaml or .yml.
    """
    known = {name: param for param in params for name in (*param.opts, *param.secondary_opts)}
    own: list[str] = []
    extra: dict[str, Any] = {}
    tokens = list(args)
    while tokens:
        token = tokens.pop(0)
        name, sign, value = token.partition("=")
        if token == "--" or not token.startswith("--"):
            own.append(token)
            continue
        dashed = name.replace("_", "-")
        dashed = _HUGGING_FACE.get(dashed, dashed)
        values = [value] if sign else []
        if dashed == "--config":
            own += values or tokens[:1]
            del tokens[: not sign]
        elif dashed in known and getattr(known[dashed], "is_flag", False):
            if not sign and tokens and tokens[0].lower() in _TRUE | _FALSE:
                values = [tokens.pop(0)]
            own += _flag(known[dashed], dashed, values)
        elif dashed in known:
            own.append(dashed)
            own += values or tokens[:1]
            del tokens[: not sign]
        else:
            while not sign and tokens and not tokens[0].startswith("--") and not tokens[0].endswith((".yaml", ".yml")):
                values.append(tokens.pop(0))
            parsed = [parse_value(text) for text in values]
            key = name[2:].replace("-", "_")
            extra[key] = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
    return own, extra


_HUGGING_FACE = {"--model-name-or-path": "--model", "--dataset-name": "--data", "--output-dir": "--output"}
_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


def _flag(param: Any, name: str, values: list[str]) -> list[str]:
    """``--flag true`` and ``--flag=false``, as Hugging Face's parser takes them, in Click's form."""
    if not values or values[0].lower() in _TRUE:
        return [name]
    if values[0].lower() not in _FALSE:
        raise ConfigError(f"{name}={values[0]}: needs true or false. Correct the value, or give {name} alone.")
    return param.secondary_opts[:1] if name in param.opts else []
