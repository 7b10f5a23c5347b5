"""``vlm-grpo reward test`` and ``vlm-grpo reward serve``; ``reward train`` is beside ``train``."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import load_config
from ..errors import ConfigError
from ..yaml_text import read_yaml
from .base import app, err, help_of, out, say, set_up_logging

reward_app = typer.Typer(
    no_args_is_help=True,
    help="Try the rewards of a config before a run, serve them to other programs, or train a reward model.",
)
app.add_typer(reward_app, name="reward")


@reward_app.command(
    "test",
    epilog="It calls each reward as training would, on right answers, other rows' answers, all answers at once, "
    "nothing and noise, and warns where a reward cannot tell them apart.",
)
def test(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG.yaml", help="Config file with rewards:; or give --reward.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Rows to try them on. Default: the config's.")] = None,
    reward: Annotated[list[str] | None, typer.Option("--reward", help=help_of("rewards") + " Repeatable.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows that are tried, from the top.")] = 64,
    answer_column: Annotated[str, typer.Option("--answer-column", help="Where the right answers are.")] = "answer",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the wrong answers and the noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show what each reward gives to right answers, wrong ones, nothing and noise."""
    set_up_logging()
    # Rewards are tried without the policy: a file that names none is no reason to refuse it.
    named = config is not None and "model" in read_yaml(config)
    given: dict[str, Any] = {"data.train": data, "rewards": reward or None, "model": None if named else "none"}
    resolved = load_config(config, None, {key: value for key, value in given.items() if value is not None})
    if resolved.data.train is None:
        raise ConfigError("reward test: no rows. Give --data FILE.jsonl, or data: in the config file.")
    from ..trial import page, trial_of

    trial = trial_of(resolved, limit, answer_column, seed)
    if as_json:
        typer.echo(json.dumps(page.as_json(trial)))
    else:
        out.print(page.table_of(trial), markup=False)
    for warning in trial.warnings:
        err.print(warning, style="yellow", markup=False, highlight=False, soft_wrap=True)


@reward_app.command(
    epilog="The protocol: POST /v1/score/evaluation with "
    '{"model": "any", "messages": ["text", ...]} gives {"scores": [number, ...]}; GET /health says ok. '
    "The reward api speaks it."
)
def serve(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's config; its rewards: are what is served.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen at; the default is this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    token_env: Annotated[
        str | None,
        typer.Option(
            "--token-env", metavar="NAME", help="Environment variable with the token that requests must bear."
        ),
    ] = None,
    max_bytes: Annotated[int, typer.Option("--max-bytes", min=1, help="Longest request, in bytes.")] = 64_000_000,
    max_items: Annotated[int, typer.Option("--max-items", min=1, help="Most texts of a request.")] = 1024,
) -> None:
    """Answer requests for scores with a config's rewards, weighted and added up as in training."""
    set_up_logging()
    token = _token(token_env)
    from ..rewards import load_rewards
    from ..rewards import server as servers

    # A scoring server needs no policy: one that is missing in the file is no reason to refuse it.
    specs = load_config(config, direct={"model": "none"}).rewards
    if not specs:
        raise ConfigError(f"{config}: there are no rewards to serve. Add rewards: [accuracy].")
    functions, weights = load_rewards(specs)
    application = servers.build_app(functions, weights, max_bytes=max_bytes, max_items=max_items, token=token)
    server = servers.make_server(application)
    with servers.bound(host, port) as listening:
        if token is None and not servers.is_loopback(host):
            say(f"Anybody who reaches {host} can use this server. Give --token-env NAME, or leave --host out.")
        shown = ", ".join(f"{weight:g} x {f.__name__}" for f, weight in zip(functions, weights, strict=True))
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listening.getsockname()[1]}{servers.PATH}"
        out.print(f"Serving {shown} at {url} (Ctrl+C stops it)", markup=False, highlight=False, soft_wrap=True)
        server.run(sockets=[listening])


def _token(name: str | None) -> str | None:
    if name is None:
        return None
    token = os.environ.get(name, "").strip()
    if not token:
        raise ConfigError(
            f"--token-env {name}: that environment variable is not set. Set it to the token, or correct it."
        )
    return token
