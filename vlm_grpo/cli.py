"""The command line: one thin function a command. Nothing heavy is imported before a command runs."""

import logging
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from . import __version__
from .config import DataOptions, MediaOptions, RunConfig, load_config, require
from .errors import ConfigError, VLMGRPOError
from .yaml_text import parse_value

out = Console()
err = Console(stderr=True)
_EXTRA = "vlm_grpo.extra"


class _Commands(TyperGroup):
    """User errors become one sentence on stderr and exit code 2; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except VLMGRPOError as error:
            _say(str(error))
            raise typer.Exit(2) from error
        except ValidationError as error:
            problem = error.errors()[0]
            _say(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']} (given {problem['input']!r}).")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            _say("Stopped. The same command again continues from the last checkpoint, if one was written.")
            raise typer.Exit(130) from error


class _RunCommand(TyperCommand):
    """Takes its own options with dashes or underscores and keeps every other ``--name value`` for the run config."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own, ctx.meta[_EXTRA] = _split(args, self.get_params(ctx))
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


def _say(text: str) -> None:
    err.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def _help(name: str, model: Any = RunConfig) -> str:
    return model.model_fields[name].description


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__, highlight=False)
        raise typer.Exit


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Teach a multimodal model a checkable skill by reinforcement learning."""


def _run(
    ctx: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG.yaml", help="Config file; its relative paths start at this directory."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help=_help("model"))] = None,
    data: Annotated[str | None, typer.Option("--data", help=_help("train", DataOptions))] = None,
    eval_data: Annotated[str | None, typer.Option("--eval-data", help=_help("eval", DataOptions))] = None,
    media_root: Annotated[str | None, typer.Option("--media-root", help=_help("media_root", DataOptions))] = None,
    scan: Annotated[str | None, typer.Option("--scan", help=_help("scan", MediaOptions))] = None,
    on_bad_media: Annotated[str | None, typer.Option("--on-bad-media", help=_help("on_bad", MediaOptions))] = None,
    reward: Annotated[list[str] | None, typer.Option("--reward", help=_help("rewards") + " Repeatable.")] = None,
    output: Annotated[str | None, typer.Option("--output", help=_help("output"))] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Stop after so many training steps.")] = None,
    backend: Annotated[str | None, typer.Option("--backend", help=_help("backend"))] = None,
    load_in_4bit: Annotated[
        bool | None, typer.Option("--load-in-4bit/--no-load-in-4bit", help=_help("load_in_4bit"))
    ] = None,
    max_minutes: Annotated[float | None, typer.Option("--max-minutes", help=_help("max_minutes"))] = None,
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
    command = ctx.info_name or "train"
    if command == "sft" and reward:
        raise ConfigError("sft: --reward has no use, since sft learns from the rows' own answers. Leave it out.")
    given = {
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
    direct = {**ctx.meta[_EXTRA], **{key: value for key, value in given.items() if value is not None}}
    resolved = load_config(config, settings, direct)
    require(resolved, command)
    resume = _checkpoint(resume_from_checkpoint, fresh)
    for note in resolved.notes:
        err.print(f"Note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    _set_up_logging()
    from . import run

    if dry_run:
        _print_plan(run.plan(resolved, command), command)
        return
    result = getattr(run, command)(resolved, fresh=fresh, resume_from_checkpoint=resume)
    _say_result(result)


def _say_result(result: Any) -> None:
    if result.stopped in _SIGNALS:
        _say(f"Stopped by {result.stopped} at step {result.steps}; the same command again continues from there.")
        raise typer.Exit(_SIGNALS[result.stopped])
    why = f" ({result.stopped})" if result.stopped else ""
    out.print(
        f"{result.steps} steps in {result.seconds:.0f} s{why}, saved in {result.run_dir}\n"
        f"{_left_out(result.left_out)}"
        f"Talk to it: vlm-grpo chat {result.run_dir} --image picture.png",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _left_out(counts: dict[str, int]) -> str:
    return f"Left out: {', '.join(f'{count} ({name})' for name, count in counts.items())}\n" if counts else ""


_SIGNALS = {"Ctrl-C": 130, "SIGTERM": 143}  # 128 + the signal's number, as a shell reports it
_MORE = "Any option of TRL's GRPOConfig may follow by its name: --learning_rate 2e-5 --num_generations 4."
app.command("train", cls=_RunCommand, help="Train a model by GRPO.", epilog=_MORE)(_run)
app.command(
    "sft",
    cls=_RunCommand,
    help="Warm-start a model on the rows' own answers.",
    epilog="Any option of transformers' TrainingArguments may follow by its name: --learning_rate 2e-5.",
)(_run)


class _OnScreen(logging.Handler):
    """Our own log lines (the backend and why, a resumed checkpoint), on the standard error stream."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def _set_up_logging() -> None:
    # What two libraries warn about while they are imported stays off the screen: nobody here can act on it.
    for name in ("torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ours = logging.getLogger("vlm_grpo")
    ours.setLevel(logging.INFO)
    if not any(isinstance(handler, _OnScreen) for handler in ours.handlers):
        ours.addHandler(_OnScreen())


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
    table = Table(title=f"vlm-grpo {command} (dry run: nothing is written)", title_justify="left")
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


@app.command()
def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or any model that train takes.")],
    image: Annotated[list[str] | None, typer.Option("--image", help="A picture to ask about. Repeatable.")] = None,
    video: Annotated[list[str] | None, typer.Option("--video", help="A video to ask about. Repeatable.")] = None,
    audio: Annotated[list[str] | None, typer.Option("--audio", help="A sound to ask about. Repeatable.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask this and stop; without it, a conversation.")] = (
        None
    ),
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--max_new_tokens", min=1, help="Longest answer, in tokens.")
    ] = 256,
) -> None:
    """Talk to a trained model."""
    _set_up_logging()
    from . import chat as chats

    chats.chat(run, image, prompt, max_new_tokens, videos=video, audios=audio)


@app.command()
def demo(
    modality: Annotated[
        Literal["image", "video", "audio"], typer.Option("--modality", help="What the demo's rows hold.")
    ] = "image",
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights, sampling and shuffling.")] = 0,
    output: Annotated[str | None, typer.Option("--output", help="Folder of the demo's runs and pictures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON line at the end.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Train every weight instead of LoRA adapters.")] = False,
) -> None:
    """Teach a tiny model to read handwritten digits, see motion or hear words, in minutes, on any computer."""
    _set_up_logging()
    from . import demo as demos

    demos.demo(modality=modality, seed=seed, output=output, as_json=as_json, full=full)


@app.command(
    help="Measure TRL's own trainer and this one side by side: seconds, memory, and whether both compute the same.",
    epilog="The model, prompts and media are made in code: nothing is downloaded, and anyone can repeat it.",
)
def bench(
    modality: Annotated[
        Literal["image", "video", "audio"], typer.Option("--modality", help="What a prompt holds beside its text.")
    ] = "image",
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", help="Tokens of a prompt, media included. Default: 960, 1100, 800.")
    ] = None,
    media_tokens: Annotated[
        int | None,
        typer.Option(
            "--media-tokens", "--image-tokens", help="How many of them are the medium's. Default: all but 60."
        ),
    ] = None,
    max_completion_length: Annotated[
        int | None, typer.Option("--max-completion-length", help="Tokens of a completion. Default: 100, audio 30.")
    ] = None,
    num_generations: Annotated[
        str, typer.Option("--num-generations", metavar="G[,G...]", help="Completions a prompt; several are a sweep.")
    ] = "8",
    beta: Annotated[float, typer.Option("--beta", help="KL weight; above 0 there are reference log-probs.")] = 0.0,
    train_vision: Annotated[bool, typer.Option("--train-vision", help="Adapters in the vision tower too.")] = False,
    rounds: Annotated[int, typer.Option("--rounds", help="Measured rounds, after two that warm up.")] = 3,
    threads: Annotated[int, typer.Option("--threads", help="Threads of torch on the CPU.")] = 1,
    device: Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="Where both trainers run.")] = "cpu",
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bf16 instead of fp32.")] = False,
    hidden_size: Annotated[int, typer.Option("--hidden-size", help="Width of the language model.")] = 384,
    num_hidden_layers: Annotated[int, typer.Option("--num-hidden-layers", help="Its depth.")] = 6,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Its vocabulary.")] = 8192,
    vision_hidden_size: Annotated[int, typer.Option("--vision-hidden-size", help="Width of the media tower.")] = 192,
    vision_depth: Annotated[int, typer.Option("--vision-depth", help="Its depth.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON line at the end.")] = False,
    plot: Annotated[str | None, typer.Option("--plot", metavar="PNG", help="Draw them.")] = None,
) -> None:
    given = dict(locals())
    groups = _groups(given.pop("num_generations"))
    output = {name: given.pop(name) for name in ("as_json", "plot")}
    _set_up_logging()
    from . import bench as benches

    benches.bench(benches.BenchOptions(**given, num_generations=groups[0]), groups, **output)


def _groups(text: str) -> list[int]:
    """``8`` or ``2,4,8,16``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--num-generations {text}: needs a whole number, or several as in 2,4,8,16.")
    return [int(part) for part in dict.fromkeys(parts)]


def main() -> None:
    """The ``vlm-grpo`` command."""
    app()
