"""What fits a card of so much memory: models, completions, their length, pixels; under a limit that torch keeps to."""

import tempfile
import time
from typing import Any

from common import Record, Settings, free, run

LIMITS = (16, 24)  # GiB
# (tokens of a prompt, most of them a picture's; C; G), each at least as large as the one before in every way.
CASES = ((500, 128, 4), (1000, 200, 8), (1000, 512, 8), (2000, 512, 8), (2000, 512, 16))
SOUNDS = ((400, 128, 4), (760, 200, 8), (760, 512, 8), (760, 512, 16))  # half a minute has 750 tokens
TINY = ((120, 4, 2), (120, 6, 3))


def fit(settings: Settings, record: Record) -> None:
    from pathlib import Path

    import torch

    from vlm_grpo.bench.contender import Case, limit_memory, load, trainer_classes
    from vlm_grpo.bench.options import BenchOptions
    from vlm_grpo.bench.published import SHAPES, shaped, write_model

    began, tiny = time.monotonic(), settings.shape == "tiny"
    contender = settings.options["contender"]
    small = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 128, "vision_hidden_size": 64, "vision_depth": 1}
    modality = "image" if tiny else SHAPES[settings.shape].modality
    cases = TINY if tiny else CASES if modality == "image" else SOUNDS
    base = {"modality": modality, "device": settings.device, "bf16": settings.on_gpu, "rounds": 1}
    base |= {"group_sharing": "auto", **(small if tiny else {})}
    prompt, completion, _ = cases[-1]
    largest = shaped(BenchOptions(prompt_tokens=prompt, max_completion_length=completion, **base), settings.shape)
    classes = trainer_classes(contender)  # it may import Unsloth, which comes before the rest
    model_folder = write_model(settings.shape, largest, settings.models, settings.device)
    loaded = Case(largest, contender, str(model_folder), load_in_4bit=settings.on_gpu, warm_up=0)
    limits: tuple[int | None, ...] = LIMITS if settings.on_gpu else (None,)
    limit_memory(limits[-1])
    free()
    if settings.on_gpu:  # else the peak would be that of drawing the weights
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    model = load(loaded)
    load_peak = held()
    found: list[dict[str, Any]] = []
    record.put(shape=settings.shape, contender=contender, limits=limits, load_peak_bytes=load_peak, cases=found)
    record.put(load_seconds=time.perf_counter() - started)
    for prompt, completion, group in cases:
        row: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion, "num_generations": group}
        found.append(row)
        if time.monotonic() - began > settings.seconds - 30 and not tiny:
            row["fits"] = "not reached"
            record.put()
            continue
        options = BenchOptions(prompt_tokens=prompt, max_completion_length=completion, num_generations=group, **base)
        case = Case(shaped(options, settings.shape), contender, str(model_folder), warm_up=0)
        try_limits(case, classes, model, limits, row, Path(settings.work))
        record.put()
        if row["fits"] is False:
            break  # what follows is larger in every way
    record.check("a case was tried", any(isinstance(row.get("fits"), (bool, int)) for row in found))
    record.check("no other error than the lack of memory", not any("error" in row for row in found))


def try_limits(case: Any, classes: Any, model: Any, limits: Any, row: dict[str, Any], work: Any) -> None:
    """Fill in the least limit under which one step runs; ``fits`` is False where none does, True without a limit."""
    import torch

    from vlm_grpo.bench.contender import Lines, limit_memory, make_trainer

    for limit in limits:
        free()
        limit_memory(limit)
        began = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                trainer = make_trainer(case, classes, model, 1, folder)
                trainer.lines, trainer.prompts = Lines(work / "fit.jsonl"), 1
                trainer.train()
        except torch.OutOfMemoryError:
            row.setdefault("out_of_memory_at", []).append(limit)
            row["fits"] = False
            continue
        except Exception as error:
            row["error"], row["fits"] = f"{type(error).__name__}: {error}"[:300], "failed"
            return
        finally:
            trainer = None
        row |= {"fits": True if limit is None else limit, "seconds": time.perf_counter() - began, "peak_bytes": held()}
        return


def held() -> int | None:
    """The most that torch's tensors took on the GPU."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


if __name__ == "__main__":
    run(fit)
