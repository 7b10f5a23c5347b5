"""``vlm-grpo train``, ``vlm-grpo ppo``, ``vlm-grpo sft`` and ``vlm-grpo reward train``."""

from typing import Annotated, Any

import typer
from rich.table import Table

from ..config import DataOptions, MediaOptions, load_config, require, said_as
from ..errors import ConfigError
from .base import app, err, help_of, out, say, set_up_logging
from .parsing import EXTRA, RunCommand
from .reward import reward_app


def _run(
    ctx: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG.yaml", help="Config file; its relative paths start at this directory."),
    ] = None,
    preset: Annotated[str | None, typer.Option("--preset", help=help_of("preset"))] = None,
    model: Annotated[str | None, typer.Option("--model", help=help_of("model"))] = None,
    data: Annotated[str | None, typer.Option("--data", help=help_of("train", DataOptions))] = None,
    eval_data: Annotated[str | None, typer.Option("--eval-data", help=help_of("eval", DataOptions))] = None,
    media_root: Annotated[str | None, typer.Option("--media-root", help=help_of("media_root", DataOptions))] = None,
    scan: Annotated[str | None, typer.Option("--scan", help=help_of("scan", MediaOptions))] = None,
    on_bad_media: Annotated[str | None, typer.Option("--on-bad-media", help=help_of("on_bad", MediaOptions))] = None,
    reward: Annotated[list[str] | None, typer.Option("--reward", help=help_of("rewards") + " Repeatable.")] = None,
    output: Annotated[str | None, typer.Option("--output", help=help_of("output"))] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Stop after so many training steps.")] = None,
    backend: Annotated[str | None, typer.Option("--backend", help=help_of("backend"))] = None,
    load_in_4bit: Annotated[
        bool | None, typer.Option("--load-in-4bit/--no-load-in-4bit", help=help_of("load_in_4bit"))
    ] = None,
    max_minutes: Annotated[float | None, typer.Option("--max-minutes", help=help_of("max_minutes"))] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of sampling, shuffling and new weights.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="a.b=c", help="Set any key of the config. Repeatable.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew; an old run folder is renamed, not deleted.")] = (
        False
    ),
    resume_from_checkpoint: Annotated[
        str | None, typer.Option("--resume-from-checkpoint", help="Continue from this checkpoint, not the newest.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run and stop; nothing is written.")] = (
        False
    ),
) -> None:
    command = _command(ctx)
    if reward and command in _WITHOUT_REWARD:
        raise ConfigError(f"{said_as(command)}: --reward has no use, since {_WITHOUT_REWARD[command]}. Leave it out.")
    given = {
        "preset": preset,
        "model": model,
        "data.train": data,
        "data.eval": eval_data,
        "data.media_root": media_root,
        "media.scan": scan,
        "media.on_bad": on_bad_media,
        "rewards": reward or None,
        "output": output,
        "max_steps": max_steps,
        "backend": backend,
        "load_in_4bit": load_in_4bit,
        "max_minutes": max_minutes,
        "seed": seed,
    }
    alias = {"algorithm": "ppo"} if ctx.info_name == "ppo" else {}
    direct = {**alias, **ctx.meta[EXTRA], **{key: value for key, value in given.items() if value is not None}}
    resolved = load_config(config, settings, direct)
    if alias and resolved.algorithm != "ppo":
        raise ConfigError(f"ppo: algorithm={resolved.algorithm} contradicts the command. Use train, or leave it out.")
    require(resolved, command)
    resume = _checkpoint(resume_from_checkpoint, fresh)
    for note in resolved.notes:
        err.print(f"Note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    set_up_logging()
    if not dry_run:
        from ..models import import_unsloth_first, is_adapter

        adapter = resolved.parts.apart or is_adapter(resolved.model) or command == "reward-train"
        import_unsloth_first(resolved.backend, adapter)
    from .. import run

    if dry_run:
        _print_plan(run.plan(resolved, command), command)
        return
    start = getattr(run, command.replace("-", "_"))
    _say_result(start(resolved, fresh=fresh, resume_from_checkpoint=resume), command)


_WITHOUT_REWARD = {
    "sft": "sft learns from the rows' own answers",
    "reward-train": "the pairs say what is better",
}


def _command(ctx: typer.Context) -> str:
    """As run folders have it: ``train``, ``sft`` or ``reward-train``; ``ppo`` is a ``train``."""
    name = "train" if ctx.info_name in (None, "ppo") else ctx.info_name
    return f"reward-{name}" if ctx.parent is not None and ctx.parent.info_name == "reward" else name


def _say_result(result: Any, command: str) -> None:
    if result.stopped in _SIGNALS:
        say(f"Stopped by {result.stopped} at step {result.steps}; the same command again continues from there.")
        raise typer.Exit(_SIGNALS[result.stopped])
    from ..folder import is_main_process

    if not is_main_process():
        return
    why = f" ({result.stopped})" if result.stopped else ""
    use = f"Talk to it: vlm-grpo chat {result.run_dir} --image picture.png"
    if command == "reward-train":
        use = f"Train with it: rewards: [{{model: {result.run_dir}}}] in a config"
        if result.evaluation:
            from ..pairwise import page

            out.print(page(result.evaluation), highlight=False)
    out.print(
        f"{result.steps} steps in {result.seconds:.0f} s{why}, saved in {result.run_dir}\n"
        f"{_left_out(result.left_out)}"
        f"Look at it: {result.run_dir}/report.html\n"
        f"{use}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _left_out(counts: dict[str, int]) -> str:
    return f"Left out: {', '.join(f'{count} ({name})' for name, count in counts.items())}\n" if counts else ""


_SIGNALS = {"Ctrl-C": 130, "SIGTERM": 143}  # 128 + the signal's number, as a shell reports it
_MORE = "Any option of TRL's GRPOConfig may follow by its name: --learning_rate 2e-5 --num_generations 4."
app.command("train", cls=RunCommand, help="Train a model by GRPO, or by PPO (--algorithm ppo).", epilog=_MORE)(_run)
app.command(
    "ppo",
    cls=RunCommand,
    help="Train a model by PPO: train --algorithm ppo.",
    epilog="Any option of VLMPPOConfig may follow by its name: --kl_coef 0.1 --vf_coef 0.1.",
)(_run)
app.command(
    "sft",
    cls=RunCommand,
    help="Warm-start a model on the rows' own answers.",
    epilog="Any option of transformers' TrainingArguments may follow by its name: --learning_rate 2e-5.",
)(_run)

reward_app.command(
    "train",
    cls=RunCommand,
    help="Train a reward model on pairs of answers.",
    epilog="--judge.captions FILE.json and --judge.prompt FILE.jinja say what the judge reads behind an answer. Any "
    "option of transformers' TrainingArguments may follow by its name: --learning_rate 2e-5.",
)(_run)


def _checkpoint(path: str | None, fresh: bool) -> str | None:
    """Hugging Face's ``true`` means the newest checkpoint, which is what happens anyway."""
    if path is not None and path.lower() == "false":
        raise ConfigError("--resume-from-checkpoint false: a run folder is continued by default. Give --fresh instead.")
    if path is None or path.lower() == "true":
        return None
    if fresh:
        raise ConfigError(f"--fresh and --resume-from-checkpoint {path} contradict each other. Keep one of them.")
    return path


def _print_plan(plan: dict[str, Any], command: str) -> None:
    table = Table(title=f"vlm-grpo {said_as(command)} (dry run: nothing is written)", title_justify="left")
    table.add_column("option", no_wrap=True)
    table.add_column("value", overflow="fold")
    for key, value in _flat(plan):
        table.add_row(key, _cell(value))
    out.print(table, markup=False)


def _cell(value: Any) -> str:
    """A value as a person would write it; a reward with its weight."""
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value) or "none"
    if isinstance(value, dict) and "weight" in value:
        return f"{value['name']}={value['weight']:g}" + (f" {value['kwargs']}" if value["kwargs"] else "")
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flat(value: dict[str, Any], at: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, inner in value.items():
        rows += _flat(inner, f"{at}{key}.") if isinstance(inner, dict) and inner else [(f"{at}{key}", inner)]
    return rows
