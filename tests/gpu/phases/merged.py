"""A run over the weights that a card takes, exported as merged 16-bit weights, loaded again and asked the same."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import Record, Settings, run, tiny_folder

REWARD = """
def differs(completions, completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]
"""


def merged(settings: Settings, record: Record) -> None:
    from vlm_grpo.models.unsloth import why_not

    reason = why_not()  # imports it, which comes before the rest
    for backend in ("hf", "unsloth"):
        if backend == "unsloth" and reason:
            record.skip(backend, reason)
            continue
        record.attempt(backend, lambda backend=backend: exported(settings, backend))
        found = record.found[backend]
        record.check(f"{backend}: the adapter changes the logits", (found.get("effect") or 0) > 1e-2)
        record.check(f"{backend}: the export is the run", found.get("difference", 1e9) <= found.get("tolerance", 0))


def exported(settings: Settings, backend: str) -> dict[str, Any]:
    """Train a few steps through the run that every command takes, then export."""
    import tiny

    from vlm_grpo.config import load_config
    from vlm_grpo.export import export_run
    from vlm_grpo.run import train

    home = Path(settings.work) / f"merged-{backend}"
    home.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(8):
        tiny.image(i).save(home / f"{i}.png")
        lines.append(json.dumps({"prompt": tiny.prompt(f"count {i}"), "image": str(home / f"{i}.png")}))
    (home / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (home / "reward.py").write_text(REWARD, encoding="utf-8")
    config = load_config(
        None,
        None,
        {
            "model": tiny_folder(settings, "qwen2_5_vl"),
            "data.train": str(home / "rows.jsonl"),
            "rewards": [f"{home / 'reward.py'}:differs"],
            "output": str(home / "run"),
            "backend": backend,
            "load_in_4bit": settings.on_gpu,
            "lora.r": 8,
            "max_steps": 6,
            "seed": 1,
            "num_generations": 4,
            "max_completion_length": 8,
            "learning_rate": 2e-2,
            "lr_scheduler_type": "constant",
        },
    )
    train(config, fresh=True)
    report = export_run(home / "run", "merged_16bit", home / "merged", max_new_tokens=8, overwrite=True)
    paths = ("run", "output", "base")
    return {name: value for name, value in asdict(report).items() if name not in paths}


if __name__ == "__main__":
    run(merged)
