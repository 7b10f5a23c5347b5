"""``vlm-grpo demo``."""

from typing import Annotated, Literal

import typer

from .base import app, set_up_logging


@app.command()
def demo(
    modality: Annotated[
        Literal["image", "video", "audio"], typer.Option("--modality", help="What the demo's rows hold.")
    ] = "image",
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights, sampling and shuffling.")] = 0,
    output: Annotated[str | None, typer.Option("--output", help="Folder of the demo's runs and pictures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON line at the end.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Train every weight instead of LoRA adapters.")] = False,
    algorithm: Annotated[
        Literal["grpo", "ppo", "reward-model", "rlhf"],
        typer.Option(
            "--algorithm",
            help="GRPO or PPO from correct answers; reward-model: GRPO from one that pairs teach; rlhf: PPO from such.",
        ),
    ] = "grpo",
) -> None:
    """Teach a tiny model to read handwritten digits, see motion or hear words, in minutes, on any computer."""
    set_up_logging()
    from .. import demo as demos

    demos.demo(modality=modality, seed=seed, output=output, as_json=as_json, full=full, algorithm=algorithm)
