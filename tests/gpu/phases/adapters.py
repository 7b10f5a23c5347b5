"""A 4-bit model through Unsloth: which adapters receive a gradient on step 1, with the vision tower's off and on."""

import tempfile
import time
from typing import Any

from common import Record, Settings, fill_adapters, run


def adapters(settings: Settings, record: Record) -> None:
    from vlm_grpo.bench.options import BenchOptions
    from vlm_grpo.bench.published import write_model

    small = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 256, "vision_hidden_size": 64, "vision_depth": 2}
    options = BenchOptions(
        prompt_tokens=300,
        max_completion_length=8,
        num_generations=4,
        device=settings.device,
        bf16=settings.on_gpu,
        **(small if settings.shape == "tiny" else {}),
    )
    began = time.perf_counter()
    model = write_model(settings.shape, options, settings.models, settings.device)
    record.put(shape=settings.shape, write_seconds=time.perf_counter() - began)
    for vision in (False, True):
        name = f"vision {'on' if vision else 'off'}"
        record.attempt(name, lambda vision=vision: one_step(settings, options, str(model), vision))
        found = record.found[name]
        record.check(f"{name}: every adapter has a gradient", found.get("adapters") and not found["without"])
        towers = found.get("by_tower", {})
        record.check(f"{name}: the towers", set(towers) == ({"vision", "language"} if vision else {"language"}))


def one_step(settings: Settings, options: Any, folder: str, vision: bool) -> dict[str, Any]:
    """Load, train one step, and look at every adapter's gradient."""
    from vlm_grpo.models.unsloth import why_not

    why_not()  # imports it, which comes before the rest
    import torch

    from vlm_grpo import LoraOptions, VLMGRPOConfig, VLMGRPOTrainer, load_model
    from vlm_grpo.bench.compare import reward, trainer_arguments
    from vlm_grpo.bench.prompts import build_prompts
    from vlm_grpo.bench.published import shaped
    from vlm_grpo.models.families import family_of, tower_of

    began = time.perf_counter()
    model, _ = load_model(
        folder,
        backend="unsloth",
        load_in_4bit=settings.on_gpu,
        lora=LoraOptions(r=16, alpha=16, vision=vision),
        dtype="bfloat16" if settings.on_gpu else "float32",
        max_seq_length=1024,
        gradient_checkpointing="unsloth",
    )
    loaded = time.perf_counter() - began
    fill_adapters(model)
    prompts = build_prompts(shaped(options, settings.shape), 1)

    class Kept(VLMGRPOTrainer):
        gradients: dict[str, float | None] = {}

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, *args, **kwargs)
            own = ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
            self.gradients = {n: None if p.grad is None else float(p.grad.abs().max()) for n, p in own}
            return loss

    with tempfile.TemporaryDirectory() as out:
        arguments = trainer_arguments(options, prompts, out) | {"gradient_report": True, "group_sharing": "auto"}
        trainer = Kept(model, reward, VLMGRPOConfig(**arguments), prompts.dataset, None, prompts.processor)
        trainer.train()
    family = family_of(trainer.model.config)
    without = sorted(name for name, largest in trainer.gradients.items() if not largest)
    towers: dict[str, int] = {}
    for name in trainer.gradients:
        tower = tower_of(family, name)
        towers[tower] = towers.get(tower, 0) + 1
    found = {"load_seconds": loaded, "adapters": len(trainer.gradients), "by_tower": towers, "without": without}
    if settings.on_gpu:
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


if __name__ == "__main__":
    run(adapters)
