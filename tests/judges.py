"""Finished reward models of tiny random weights, written as a training run leaves them."""

import json
from pathlib import Path
from typing import Any

import tiny
import torch
import yaml

from vlm_grpo.config import LoraOptions
from vlm_grpo.judging.prompt import JudgePrompt
from vlm_grpo.models import load_model
from vlm_grpo.models.heads import add_head, save_heads

TEMPLATE = "say how many{% for caption in captions %} look {{ caption }}{% endfor %}"  # few words: quick to read
STEM = "answer"


def base(family: str, path: Path | str, **options: Any) -> str:
    """A tiny base model, saved: a policy and its reward model can stand on it."""
    return tiny.save(family, path, **options)


def policy(path: Path | str, seed: int = 1, **lora: Any) -> tuple[Any, Any]:
    """``(model, processor)``: a base with a policy adapter that is no longer new."""
    model, processor = load_model(path, lora=LoraOptions(**{"r": 2, "alpha": 4, **lora}))
    randomize(model, seed)
    return model, processor


def reward_run(
    on: Path | str,
    path: Path | str,
    *,
    seed: int = 0,
    captions: bool = False,
    train: dict[str, Any] | None = None,
    **lora: Any,
) -> str:
    """The folder of a reward model on a base; its adapter and head are random, and far from nothing.

    Args:
        on: the base, saved.
        path: becomes the folder.
        seed: of the weights.
        captions: whether it counts as trained with captions.
        train: options that its config holds.
        lora: options of its adapter.
    """
    model, processor = load_model(on, lora=LoraOptions(**{"r": 2, "alpha": 4, **lora}))
    randomize(model, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_head(model)
    model.save_pretrained(path)
    save_heads(model, path)
    processor.save_pretrained(path)
    JudgePrompt(TEMPLATE, STEM).save(path)
    facts = {"version": "0", "base_model": str(on), "load_in_4bit": False, "stem": STEM, "captions": captions}
    Path(path, "reward_model.json").write_text(json.dumps(facts))
    config = {"model": str(on), "train": train or {}}
    Path(path, "config.yaml").write_text("# vlm-grpo reward-train\n" + yaml.safe_dump(config))
    return str(path)


def randomize(model: Any, seed: int) -> None:
    """Weights of adapters that change what the model says; the caller's random state stays as it was."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def rows(family: str, texts: tuple[str, ...] = ("what color is this", "count", "how many squares")) -> list[dict]:
    """A row a text: media of each kind of the family in turn, the last one without any."""
    makers = {"image": tiny.image, "video": tiny.video, "audio": tiny.audio}
    kinds = tiny.KINDS[family]
    out = []
    for number, text in enumerate(texts):
        count = 0 if number == len(texts) - 1 else 2 if number == 0 else 1
        own = kinds[number % len(kinds)]
        media = {
            f"{kind}s": [makers[kind](10 * number + n) for n in range(count if kind == own else 0)] for kind in kinds
        }
        out.append({"prompt": tiny.prompt(text, images=0), **media})
        slots = [{"type": own}] * count
        out[-1]["prompt"][0]["content"] = [*slots, *out[-1]["prompt"][0]["content"]]
    return out


def call(judge: Any, some: list[dict[str, Any]], completions: list[Any], **more: Any) -> list[float]:
    """The reward called as TRL calls it."""
    columns = {name: [row.get(name) for row in some] for name in some[0] if name != "prompt"}
    return judge(prompts=[row["prompt"] for row in some], completions=completions, **columns, **more)
