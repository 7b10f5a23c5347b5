"""``vlm-grpo bench``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import ConfigError
from .base import app, set_up_logging


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
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="trl,unsloth",
            help="Measure whole trainers instead, each in a process of its own: TRL's, Unsloth's, or both, and ours.",
        ),
    ] = None,
    shape: Annotated[
        str,
        typer.Option(
            "--shape",
            metavar="NAME",
            help="Model of a published shape, with --against: qwen2.5-vl-3b, qwen2.5-vl-7b. Default: as given here.",
        ),
    ] = "tiny",
    prompts_per_step: Annotated[
        str, typer.Option("--prompts-per-step", metavar="N[,N...]", help="Prompts of a step, with --against.")
    ] = "1",
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="4-bit weights, with --against.")] = False,
    memory_gib: Annotated[
        float | None, typer.Option("--memory-gib", help="GPU memory that torch may hold, with --against.")
    ] = None,
    models: Annotated[
        str | None, typer.Option("--models", metavar="DIR", help="Keep the written model here, with --against.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON line at the end.")] = False,
    plot: Annotated[str | None, typer.Option("--plot", metavar="PNG", help="Draw them.")] = None,
) -> None:
    given = dict(locals())
    groups = _counts("--num-generations", given.pop("num_generations"))
    output = {name: given.pop(name) for name in ("as_json", "plot")}
    contest = {name: given.pop(name) for name in ("shape", "prompts_per_step", "load_in_4bit", "memory_gib", "models")}
    del given["against"]
    set_up_logging()
    from .. import bench as benches

    options = benches.BenchOptions(**given, num_generations=groups[0])
    if against is None:
        _refuse_without_against(contest)
        benches.bench(options, groups, **output)
        return
    if len(groups) > 1:
        raise ConfigError(f"--num-generations {num_generations}: a sweep has no --against. Give one number.")
    from ..bench.contest import Contest, contenders

    contest["prompts_per_step"] = tuple(_counts("--prompts-per-step", prompts_per_step))
    contest["models"] = None if models is None else Path(models).expanduser()
    benches.against(Contest(options, contenders(against), **contest), **output)


def _refuse_without_against(given: dict[str, Any]) -> None:
    usual = {"shape": "tiny", "prompts_per_step": "1", "load_in_4bit": False, "memory_gib": None, "models": None}
    for name, value in given.items():
        if value != usual[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} {value}: has a use only with --against. Add --against trl, or leave {flag} out.")


def _counts(option: str, text: str) -> list[int]:
    """``8`` or ``2,4,8,16``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"{option} {text}: needs a whole number, or several as in 2,4,8,16.")
    return [int(part) for part in dict.fromkeys(parts)]
