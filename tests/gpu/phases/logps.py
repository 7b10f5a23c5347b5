"""Our log-probabilities, and those of Unsloth's own scorer, against transformers' plain forward of each row alone."""

import copy
import tempfile
from typing import Any

from common import Record, Settings, fill_adapters, free, rows, run, table, tiny_folder

CASES = {
    "image": ("qwen2_5_vl", "image", 1),
    "several images": ("qwen2_5_vl", "image", 2),
    "video": ("qwen2_5_vl", "video", 1),
    "audio": ("qwen2_audio", "audio", 1),
}
# Nats, at random weights: the largest of all tokens in 32 bits (kernels of a GPU may round as TF32), the mean in 16.
EXACT, EXACT_ON_GPU, ROUNDED = 1e-3, 1e-2, 5e-2


def logps(settings: Settings, record: Record) -> None:
    from vlm_grpo.models.unsloth import why_not

    reason = why_not()  # imports it, which comes before the rest
    exact = EXACT_ON_GPU if settings.on_gpu else EXACT
    for name, case in CASES.items():
        record.attempt(f"hf, {name}", lambda case=case: ours(settings, case, "hf", "float32"))
        check(record, f"hf, {name}", "largest", exact)
    dtype, figure, tolerance = ("bfloat16", "mean", ROUNDED) if settings.on_gpu else ("float32", "largest", exact)
    for name, case in CASES.items():
        if reason:
            record.skip(f"unsloth, {name}", reason)
            continue
        record.attempt(f"unsloth, {name}", lambda case=case: ours(settings, case, "unsloth", dtype))
        check(record, f"unsloth, {name}", figure, tolerance)
        if case[1] != "image":
            record.skip(
                f"Unsloth's own scorer, {name}",
                "it has no audio" if case[1] == "audio" else "it reads videos from files by itself",
            )
            continue
        record.attempt(f"Unsloth's own scorer, {name}", lambda case=case: theirs(settings, case, dtype))


def check(record: Record, name: str, figure: str, tolerance: float) -> None:
    """A claim about what was found under ``name``."""
    value = record.found[name].get(figure)
    record.check(f"{name}: {figure} at most {tolerance:g}", value is not None and value <= tolerance)


def load(settings: Settings, case: Any, backend: str, dtype: str) -> tuple[Any, Any]:
    """A tiny model with adapters that do something."""
    from vlm_grpo import LoraOptions, load_model

    model, processor = load_model(
        tiny_folder(settings, case[0]),
        backend=backend,
        lora=LoraOptions(r=8, alpha=8, vision=case[1] != "audio"),
        dtype=dtype,
        max_seq_length=1024,
        gradient_checkpointing=True,
    )
    fill_adapters(model)
    return model, processor


def ours(settings: Settings, case: Any, backend: str, dtype: str) -> dict[str, Any]:
    """One step of our trainer, sharing on, against a plain forward of each row of the same weights."""
    import recorder

    model, processor = load(settings, case, backend, dtype)
    data = rows(case[1], case[2])
    with tempfile.TemporaryDirectory() as out:
        options = {"bf16": dtype == "bfloat16", "use_cpu": not settings.on_gpu}
        args = recorder.config(out, **options, group_sharing="auto" if settings.on_gpu else True)
        trainer = recorder.Recorder(model, recorder.reward, args, table(data), None, processor)
        trainer.train()
    scored = [(row.prompt, row.completion, row.logps) for batch in trainer.rows for row in batch]
    del trainer, model
    free()
    return differences(settings, case, dtype, data, processor, scored, 0.8)


def theirs(settings: Settings, case: Any, dtype: str) -> dict[str, Any]:
    """What Unsloth's own trainer scores a rollout with, against the same plain forward."""
    import importlib

    trl = importlib.import_module("trl")
    model, processor = load(settings, case, "unsloth", dtype)
    scored: list[Any] = []

    class Kept(trl.GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, model: Any, ids: Any, mask: Any, width: int, *a: Any, **k: Any):
            out = super()._get_per_token_logps_and_entropies(model, ids, mask, width, *a, **k)
            if out[0] is not None and not scored:  # the first is of the policy; what follows may be of a reference
                for row, seen, values in zip(ids, mask.bool(), out[0][:, -width:], strict=True):
                    prompt, length = row[:-width][seen[:-width]].tolist(), int(seen[-width:].sum())
                    scored.append((prompt, row[-width:][:length].tolist(), values[:length].detach().clone()))
            return out

    data = rows(case[1], case[2])
    with tempfile.TemporaryDirectory() as out:
        trainer = Kept(
            model=model,
            reward_funcs=[_reward],
            args=trl.GRPOConfig(**_unsloth_options(out, dtype, settings)),
            train_dataset=_as_unsloth_reads(data),
            processing_class=copy.deepcopy(processor),
        )
        trainer.train()
    assert scored, "it scored no rollout"
    del trainer, model
    free()
    return differences(settings, case, dtype, data, processor, scored, 0.8)


def _reward(completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def _unsloth_options(out: str, dtype: str, settings: Settings) -> dict[str, Any]:
    return {
        "output_dir": out,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 1,  # less than that: then the rollout is scored before it is trained on
        "max_completion_length": 6,
        "max_steps": 1,
        "temperature": 0.8,
        "learning_rate": 0.0,
        "beta": 0.0,
        "bf16": dtype == "bfloat16",
        "fp16": False,
        "use_cpu": not settings.on_gpu,
        "save_strategy": "no",
        "report_to": "none",
    }


def _as_unsloth_reads(data: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": row["prompt"], "images": row["images"]} for row in data])


def differences(
    settings: Settings, case: Any, dtype: str, data: Any, processor: Any, scored: Any, temperature: float
) -> dict[str, Any]:
    """Of ``scored`` (prompt ids, completion ids, log-probs) from transformers' model with the same adapters."""
    import reference
    import torch

    model, _ = load(settings, case, "hf", dtype)
    model.eval()
    encoded = {tuple(e["input_ids"][0].tolist()): e for e in (reference.encode(processor, row) for row in data)}
    found = []
    with torch.no_grad(), torch.device(settings.device):
        for prompt, completion, values in scored:
            inputs = {
                key: value.to(settings.device) if isinstance(value, torch.Tensor) else value
                for key, value in encoded[tuple(prompt)].items()
            }
            expected = reference.logps(model, inputs, completion, temperature)
            found.append((values.to(expected.device).float() - expected.float()).abs())
    of_all = torch.cat(found)
    return {
        "rows": len(scored),
        "tokens": of_all.numel(),
        "largest": float(of_all.max()),
        "mean": float(of_all.mean()),
        "dtype": dtype,
    }


if __name__ == "__main__":
    run(logps)
