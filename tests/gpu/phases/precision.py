"""Training steps in bf16 and in fp16: finite losses and gradients, and adapters that move."""

import math
import tempfile
from typing import Any

from common import NEEDS_CUDA, Record, Settings, fill_adapters, rows, run, table, tiny_folder

STEPS = 4


def precision(settings: Settings, record: Record) -> None:
    from vlm_grpo.models.unsloth import why_not

    reason = why_not()  # imports it, which comes before the rest
    for backend in ("hf", "unsloth"):
        for kind in ("bf16", "fp16"):
            name = f"{backend}, {kind}"
            if backend == "unsloth" and reason:
                record.skip(name, reason)
            elif kind == "fp16" and not settings.on_gpu:
                record.skip(name, NEEDS_CUDA)
            else:
                record.attempt(name, lambda backend=backend, kind=kind: trained(settings, backend, kind))
                found = record.found[name]
                record.check(f"{name}: finite", found.get("finite"))
                record.check(f"{name}: every adapter moves", found.get("adapters") and not found.get("still"))


def trained(settings: Settings, backend: str, kind: str) -> dict[str, Any]:
    """A few steps with 4-bit weights on a GPU, and with whole ones elsewhere."""
    import recorder

    from vlm_grpo import LoraOptions, VLMGRPOTrainer, load_model

    whole = {"bf16": "bfloat16", "fp16": "float16"}[kind]
    model, processor = load_model(
        tiny_folder(settings, "qwen2_5_vl"),
        backend=backend,
        load_in_4bit=settings.on_gpu,
        lora=LoraOptions(r=8, alpha=8, vision=True),
        dtype=whole if settings.on_gpu else "float32",
        max_seq_length=1024,
        gradient_checkpointing=True,
    )
    fill_adapters(model)
    options: dict[str, Any] = {"bf16": kind == "bf16", "fp16": kind == "fp16", "use_cpu": not settings.on_gpu}
    options["group_sharing"] = "auto" if settings.on_gpu else True
    with tempfile.TemporaryDirectory() as out:
        # The loss scale of fp16 begins high: the first steps may be skipped while it comes down.
        args = recorder.config(out, max_steps=STEPS if kind == "bf16" else 4 * STEPS, **options)
        args.learning_rate = 1e-3
        trainer = VLMGRPOTrainer(model, recorder.reward, args, table(rows("image")), None, processor)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
    after = dict(trainer.model.named_parameters())
    still = sorted(name for name, value in before.items() if bool((after[name] == value).all()))
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    norms = [float(log["grad_norm"]) for log in logs]
    losses = [float(log["loss"]) for log in logs]
    ended = all(bool(value.isfinite().all()) for value in after.values() if value.is_floating_point())
    finite = [norm for norm in norms if math.isfinite(norm)]
    return {
        "losses": losses,
        "gradient_norms": norms,
        "steps_skipped_by_the_loss_scale": len(norms) - len(finite),
        "finite": ended and all(map(math.isfinite, losses)) and len(finite) >= STEPS,
        "adapters": len(before),
        "still": still,
    }


if __name__ == "__main__":
    run(precision)
