"""Seconds and memory of whole trainers on the same prompts, as ``vlm-grpo bench --against`` measures them."""

import time
from pathlib import Path

from common import Record, Settings, run


def contest(settings: Settings, record: Record) -> None:
    from vlm_grpo.bench.contest import Contest, run_contender, summary
    from vlm_grpo.bench.options import BenchOptions
    from vlm_grpo.bench.published import write_model

    began, options = time.monotonic(), settings.options
    tiny = settings.shape == "tiny"
    small = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 128, "vision_hidden_size": 64, "vision_depth": 1}
    case = Contest(
        BenchOptions(
            prompt_tokens=120 if tiny else 1000,
            max_completion_length=6 if tiny else 200,
            num_generations=3 if tiny else 8,
            rounds=1 if tiny else 3,
            device=settings.device,
            bf16=settings.on_gpu,
            group_sharing="auto",  # where it falls back the figures say so, and are kept
            **(small if tiny else {}),
        ),
        ("trl", "unsloth", "ours", "ours-unsloth"),
        settings.shape,
        tuple(options["prompts_per_step"]),
        load_in_4bit=settings.on_gpu,
        warm_up=1 if tiny else 2,
    )
    model = write_model(settings.shape, case.options, settings.models, settings.device)
    work = Path.cwd()
    rows: list[dict] = []
    record.put(shape=settings.shape, rows=rows, prompt_tokens=case.options.target)
    record.put(completion_tokens=case.options.completion, num_generations=case.options.num_generations)
    for number, name in enumerate(case.contenders):
        left = settings.seconds - 10 - (time.monotonic() - began)
        object.__setattr__(case, "limit", max(10.0, left / (len(case.contenders) - number)))
        lines = run_contender(case, name, model, work)
        rows += [summary(name, count, lines) for count in case.prompts_per_step]
        record.put(rows=rows)
        first = next(row for row in rows if row["contender"] == name)
        record.check(f"{name} was measured", "seconds" in first)
    lengths = {row["completion_tokens"] for row in rows if "seconds" in row}
    record.check("all completions have one length", lengths == {case.options.completion})


if __name__ == "__main__":
    run(contest)
