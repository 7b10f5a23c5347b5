"""The main job on an embedded default: a tiny Qwen2.5-VL learns to read real handwritten digits by GRPO.

Everything is real but small: scikit-learn's 1,797 scanned digits as PNG files, a model built here with random
weights, a supervised warm start on 100 labels, then GRPO from a correctness reward alone on the other rows. This file
writes the data, the model and the configs; ``run.py`` does the rest, exactly as for a user's own run.
"""

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .config import RunConfig
from .errors import ConfigError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "which digit is this ?"
SIDE = 56  # pixels; 4 image tokens of 28 x 28
TRAINING_ROWS, LABELS = 1347, 100

_SPECIALS = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
_MEDIA_TOKENS = ("<|image_pad|>", "<|video_pad|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
# Figures of the recipe; `warm` is deliberately short, so that the policy is mediocre and still explores.
_WARM = {
    "max_steps": 30,
    "per_device_train_batch_size": 48,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "completion_column": "answer",
    "per_device_eval_batch_size": 64,
}
_GRPO = {
    "max_steps": 200,
    "num_generations": 8,
    "per_device_train_batch_size": 256,
    "learning_rate": 4e-3,
    "warmup_steps": 20,
    "max_grad_norm": 1.0,
    "max_completion_length": 2,
    "save_steps": 50,
    "per_device_eval_batch_size": 64,
    "gradient_checkpointing": False,  # there is memory to spare, and not a second
}
_LORA = {"r": 32, "alpha": 32, "targets": "all-linear"}  # the projector too
_FULL = {"learning_rate": 1e-3}  # a quarter of the adapters' rate


def demo(
    modality: str = "image", seed: int = 0, output: str | None = None, as_json: bool = False, full: bool = False
) -> dict[str, Any]:
    """Warm start, GRPO, the warm start continued for the same time, and a table of held-out figures.

    Args:
        modality: ``image``.
        seed: of the weights, the choice of labels and all sampling; the held-out rows are always the same.
        output: folder for data, model and runs; by default ``runs/demo-image-SEED``.
        as_json: print one JSON object as the last line of stdout.
        full: train all weights by GRPO instead of a LoRA adapter.

    Returns:
        the object that ``as_json`` prints.
    """
    from . import run

    if modality != "image":
        raise ConfigError(f'demo: there is no modality "{modality}". Use image.')
    folder = Path(output or f"runs/demo-{modality}-{seed}")
    console = Console(stderr=as_json)
    write_digits(folder / "data", seed)
    save_tiny_model(folder / "model", seed)
    console.print("[bold]1/3[/] warm start on 100 labels")
    warm = _whole(run.sft(warm_config(folder, seed)))
    console.print("[bold]2/3[/] GRPO from a correctness reward")
    grpo = _whole(run.train(grpo_config(folder, seed, full)))
    console.print("[bold]3/3[/] for comparison: the warm start continued for the same time")
    continued = _whole(run.sft(continued_config(folder, seed, grpo.seconds)))
    figures = _figures(modality, seed, warm, grpo, continued)
    _draw_contact_sheet(folder, grpo.run_dir)
    _print_table(console, figures, grpo.evaluation["after"]["rows"])
    if as_json:
        print(json.dumps(figures))
    return figures


def _whole(result: Any) -> Any:
    """The result of a stage that nobody interrupted; the same demo again goes on with one that was."""
    if result.stopped in ("Ctrl-C", "SIGTERM"):
        raise KeyboardInterrupt
    return result


def warm_config(folder: Path, seed: int) -> RunConfig:
    """The supervised warm start."""
    return RunConfig.model_validate(
        {
            "model": str(folder / "model"),
            "data": {"train": str(folder / "data" / "labels.jsonl"), "eval": str(folder / "data" / "held-out.jsonl")},
            "rewards": ["accuracy"],
            "output": str(folder / "warm"),
            "train": {**_WARM, "seed": seed},
        }
    )


def grpo_config(folder: Path, seed: int, full: bool) -> RunConfig:
    """GRPO on the rows whose labels only the reward sees."""
    return RunConfig.model_validate(
        {
            "model": str(folder / "warm"),
            "lora": None if full else _LORA,
            "data": {"train": str(folder / "data" / "train.jsonl"), "eval": str(folder / "data" / "held-out.jsonl")},
            "rewards": ["accuracy"],
            "output": str(folder / "grpo"),
            "train": {**_GRPO, "seed": seed, **(_FULL if full else {})},
        }
    )


def continued_config(folder: Path, seed: int, seconds: float) -> RunConfig:
    """The warm start, gone on with for as long as GRPO took."""
    config = warm_config(folder, seed).model_dump()
    config |= {"model": str(folder / "warm"), "output": str(folder / "continued"), "max_minutes": seconds / 60}
    config["train"] |= {"max_steps": 100_000, "save_steps": 100_000}
    return RunConfig.model_validate(config)


def write_digits(folder: Path, seed: int) -> None:
    """scikit-learn's digits as PNG files and three JSON-lines files: labels, train, held-out."""
    import numpy as np
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            'The demo\'s digits come with scikit-learn. Install it: pip install "vlm-grpo[demo]".'
        ) from error
    digits: Any = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    train, held_out = order[:TRAINING_ROWS], order[TRAINING_ROWS:]
    train = np.random.RandomState(1000 + seed).permutation(train)
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    for index, scan in enumerate(digits.images):  # 8 x 8, 0 to 16
        pixels = np.clip(scan * 15.94, 0, 255).astype(np.uint8)
        picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGB")
        picture.save(folder / "digits" / f"{index:04d}.png")
    for name, rows in (("labels", train[:LABELS]), ("train", train[LABELS:]), ("held-out", held_out)):
        lines = (
            json.dumps(
                {
                    "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
                    "image": f"digits/{index:04d}.png",
                    "answer": DIGITS[digits.target[index]],
                }
            )
            for index in rows
        )
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def save_tiny_model(folder: Path, seed: int) -> None:
    """A Qwen2.5-VL with random weights, its processor and a tokenizer of the few words it needs."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    token = tokenizer.convert_tokens_to_ids
    width, wide = 64, 128
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    # The usual 0.02 hardly learns at this width.
    spread: dict[str, Any] = {"initializer_range": 0.08}
    config = Qwen2_5_VLConfig(
        text_config={
            **spread,
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": wide,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": token("<|im_start|>"),
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": rope,
        },
        vision_config={
            **spread,
            "depth": 2,
            "hidden_size": width,
            "out_hidden_size": width,
            "num_heads": 4,
            "intermediate_size": wide,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        **spread,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    assert model.generation_config is not None, "a model that generates has one"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def tiny_processor() -> Any:
    """Qwen2.5-VL's own processor classes around a word-level tokenizer."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    specials = [*_SPECIALS, *_MEDIA_TOKENS]
    words = ["<unk>", *specials, "user", "assistant", *QUESTION.split(), *DIGITS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    hf: Any = transformers  # its lazy names are invisible to type checkers
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )
    fast.add_tokens([AddedToken(word, special=True, normalized=False) for word in specials], special_tokens=True)
    patches: dict[str, Any] = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    return hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(**patches, size=size),
        fast,
        hf.Qwen2VLVideoProcessor(**patches, size=size),
        chat_template=_TEMPLATE,
    )


def _figures(modality: str, seed: int, warm: Any, grpo: Any, continued: Any) -> dict[str, Any]:
    """The JSON object: held-out accuracies with 95% intervals, and the reward of the first and last steps."""
    rewards = [record["reward"] for record in _records(grpo.run_dir / "metrics.jsonl") if "reward" in record]
    few = max(1, len(rewards) // 15)
    before, after = warm.evaluation["after"], grpo.evaluation["after"]
    return {
        "modality": modality,
        "algorithm": "grpo",
        "seed": seed,
        "accuracy_before": before["accuracy"],
        "ci95_before": before["ci95"],
        "accuracy_after": after["accuracy"],
        "ci95_after": after["ci95"],
        "accuracy_sft_only": continued.evaluation["after"]["accuracy"],
        "accuracy_control": grpo.evaluation["control"]["accuracy"],
        "reward_first": math.fsum(rewards[:few]) / few,
        "reward_last": math.fsum(rewards[-few:]) / few,
        "steps": grpo.steps,
        "seconds": round(grpo.seconds, 1),
        "run_dir": str(grpo.run_dir),
    }


def _records(path: Path) -> list[dict[str, Any]]:
    from .report import read_jsonl

    return list(read_jsonl(path))


def _draw_contact_sheet(folder: Path, run_dir: Path, shown: int = 60) -> None:
    """The first held-out digits with the trained model's answers."""
    from .data import load_data, to_sample
    from .encode import encode
    from .evaluate import greedy
    from .models import load_model
    from .report import contact_sheet

    model, processor = load_model(str(run_dir))
    rows: list[Any] = list(load_data(str(folder / "data" / "held-out.jsonl"), limit=shown))
    samples = [to_sample(row) for row in rows]
    answers = greedy(model.eval(), processor, [encode(processor, sample) for sample in samples], 2)
    correct = [answer == row["answer"] for answer, row in zip(answers, rows, strict=True)]
    captions = [
        answer if right else f"{answer} ({row['answer']})"
        for answer, right, row in zip(answers, correct, rows, strict=True)
    ]
    pictures = [sample.media[0].open() for sample in samples]
    contact_sheet(pictures, captions, correct, run_dir / "held-out.png", title="Held-out digits after GRPO")


def _print_table(console: Console, figures: dict[str, Any], rows: int) -> None:
    def percent(value: float, interval: list[float] | None = None) -> str:
        between = f"  [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
        return f"{100 * value:.1f}%{between}"

    table = Table(title=f"{rows} held-out digits, greedy ({figures['steps']} GRPO steps, {figures['seconds']:.0f} s)")
    table.add_column("model")
    table.add_column("accuracy  [95% interval]", justify="right")
    table.add_row("warm start, 100 labels", percent(figures["accuracy_before"], figures["ci95_before"]))
    table.add_row("warm start continued as long", percent(figures["accuracy_sft_only"]))
    table.add_row("after GRPO", percent(figures["accuracy_after"], figures["ci95_after"]), style="bold green")
    table.add_row("after GRPO, images blanked", percent(figures["accuracy_control"]))
    console.print(table)
    console.print(f"curves.png, held-out.png, samples.jsonl: {figures['run_dir']}", highlight=False)
