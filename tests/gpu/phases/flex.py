"""``group_attention="flex"`` against "reference": outputs, gradients, seconds and memory of one packed attention."""

import time
from statistics import median
from typing import Any

from common import Record, Settings, free, run

# (prompt, completions, tokens of each), query heads, key heads, width of a head: those of the 3B and the 7B model.
LARGE = {"3b": ((1000, 8, 200), 16, 2, 128), "7b": ((1000, 8, 200), 28, 4, 128), "long": ((3000, 8, 512), 28, 4, 128)}
SMALL = {"tiny": ((64, 3, 16), 4, 2, 16)}
WARM_UP, REPEATS = 3, 10


def flex(settings: Settings, record: Record) -> None:
    for name, case in (LARGE if settings.on_gpu else SMALL).items():
        dtypes = ("float32", "bfloat16") if settings.on_gpu else ("float32",)
        for dtype in dtypes:
            title = f"{name}, {dtype}"
            record.attempt(title, lambda case=case, dtype=dtype: compared(settings, case, dtype))
            found = record.found[title]
            tolerance = 2e-3 if dtype == "float32" else 3e-2  # relative; TF32 rounds as bfloat16 does, so it is off
            record.check(f"{title}: the same outputs", found.get("output_rel_l2", 1) <= tolerance)
            record.check(f"{title}: the same gradients", found.get("gradient_rel_l2", 1) <= tolerance)


def compared(settings: Settings, case: Any, dtype: str) -> dict[str, Any]:
    """Both ways on the same inputs."""
    import torch

    from vlm_grpo.group.attention import packed_attention
    from vlm_grpo.group.flex import flex_packed_attention
    from vlm_grpo.group.layout import Layout, Packed

    torch.backends.cuda.matmul.allow_tf32 = False
    (prefix, suffixes, width), heads, shared, size = case
    layout = Layout(prefix, suffixes, width)
    draw = torch.Generator(settings.device).manual_seed(0)
    shapes = [(1, count, layout.length, size) for count in (heads, shared, shared)]
    options = {"generator": draw, "device": settings.device}
    values = [torch.randn(shape, **options).to(getattr(torch, dtype)) for shape in shapes]
    weights = torch.randn(shapes[0], **options).to(getattr(torch, dtype))
    packed = Packed.of(layout, lambda n: None)
    found: dict[str, Any] = {"layout": [prefix, suffixes, width], "heads": [heads, shared, size]}
    results = {}
    for name, attend in (("reference", packed_attention), ("flex", flex_packed_attention)):
        results[name], found[name] = once(settings, attend, values, weights, packed)
    for key, index in (("output_rel_l2", slice(0, 1)), ("gradient_rel_l2", slice(1, 4))):
        pairs = list(zip(results["reference"][index], results["flex"][index], strict=True))
        off = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
        found[key] = (off / sum(float(a.double().square().sum()) for a, _ in pairs)) ** 0.5
    if settings.on_gpu:
        found["speed_up"] = found["reference"]["seconds"] / found["flex"]["seconds"]
    return found


def once(settings: Settings, attend: Any, values: Any, weights: Any, packed: Any) -> tuple[list[Any], dict[str, Any]]:
    """(output and gradients, figures) of forward and backward."""
    import torch

    seconds, kept = [], []
    free()
    for _ in range(WARM_UP + REPEATS if settings.on_gpu else 1):
        own = [value.clone().requires_grad_() for value in values]
        if settings.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        out = attend(*own, packed, None)
        (out * weights).sum().backward()
        if settings.on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        kept = [out.detach(), *(value.grad for value in own)]
    figures: dict[str, Any] = {"first_seconds": seconds[0]}
    if settings.on_gpu:
        figures |= {"seconds": median(seconds[WARM_UP:]), "peak_bytes": torch.cuda.max_memory_allocated()}
    return kept, figures


if __name__ == "__main__":
    run(flex)
