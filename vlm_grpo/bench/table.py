"""The table of one measurement."""

from typing import Any

from rich.console import Console
from rich.table import Table

TITLES = {
    "process": "process",
    "generate": "generate",
    "old_ref_logps": "old/ref log-probs",
    "forward_backward": "forward + backward",
    "other": "other",
}

_SHORT = dict(zip(TITLES, ("process", "generate", "logps", "fwd+bwd", "other"), strict=True))


def print_result(console: Console, result: dict[str, Any]) -> None:
    """Seconds per phase of both trainers, then memory and exactness."""
    console.print(_table(result))
    console.print(summary(result), markup=False, highlight=False, soft_wrap=True)


def _table(result: dict[str, Any]) -> Table:
    unit = "CPU seconds" if result["device"] == "cpu" else "seconds"
    count = result["rounds"]
    table = Table(title=f"{unit} a step, median of {count} round{'s' * (count != 1)}", title_justify="left")
    table.add_column("phase")
    for name in ("reference", "ours", "ratio"):
        table.add_column(name, justify="right")
    for phase, figures in result["phases"].items():
        if figures["reference"] or figures["ours"]:
            table.add_row(TITLES[phase], *_cells(figures))
    table.add_section()
    step = {side: result[f"seconds_{side}"] for side in ("reference", "ours")} | {"ratio": result["step_ratio"]}
    table.add_row("whole step", *_cells(step), style="bold")
    whose = "process" if result["device"] == "cpu" else "GPU"
    for key, ratio, name in (("peak", "memory", whose), ("tensor", "tensor_memory", "tensors")):
        if result[f"{ratio}_ratio"] is not None:
            peaks = [f"{result[f'{key}_bytes_{side}'] / 2**20:.0f} MiB" for side in ("reference", "ours")]
            table.add_row(f"peak, forward + backward ({name})", *peaks, f"{result[f'{ratio}_ratio']:.2f}x")
    return table


def _cells(figures: dict[str, Any]) -> tuple[str, str, str]:
    ratio = "" if figures["ratio"] is None else f"{figures['ratio']:.2f}x"
    return f"{figures['reference']:.3f}", f"{figures['ours']:.3f}", ratio


def summary(result: dict[str, Any]) -> str:
    """Two or three lines: how even the rounds are, and how exact."""
    rounds = ", ".join(f"{ratio:.2f}" for ratio in result["step_ratio_rounds"])
    sampled = "the same tokens" if result["same_tokens"] else f"{result['same_tokens_fraction']:.1%} of the same tokens"
    differences = [
        f"{name} {'unknown' if result[key] is None else f'{result[key]:.1e}'}"
        for key, name in (("max_logp_diff", "largest log-prob difference"), ("grad_rel_l2", "gradient relative L2"))
    ]
    return f"ratio of each round: {rounds}\nboth sampled {sampled}; {', '.join(differences)}"


def print_contest(console: Console, result: dict[str, Any]) -> None:
    """A table a number of prompts, one row a contender."""
    for prompts in dict.fromkeys(row["prompts_per_step"] for row in result["contenders"]):
        rows = [row for row in result["contenders"] if row["prompts_per_step"] == prompts]
        console.print(_contest(result, rows, prompts))
        for row in rows:
            if "error" in row:
                console.print(f"{row['name']}: {row['error']}", markup=False, highlight=False, soft_wrap=True)


def _contest(result: dict[str, Any], rows: list[dict[str, Any]], prompts: int) -> Table:
    unit = "CPU seconds" if result["device"] == "cpu" else "seconds"
    table = Table(title=f"{unit} a step of {prompts} prompt{'s' * (prompts != 1)}, medians", title_justify="left")
    table.add_column("trainer", no_wrap=True)
    shown = [p for p in TITLES if any(row.get("phases", {}).get(p) for row in rows)]
    memory = {"peak_bytes": "peak GiB", "peak_reserved_bytes": "held GiB"}
    memory = {key: title for key, title in memory.items() if any(row.get(key) for row in rows)}
    for name in (*(_SHORT[p] for p in shown), "step", *memory.values()):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        peaks = [_gib(row.get(key)) for key in memory]
        if "seconds" not in row:
            table.add_row(row["name"], *[""] * len(shown), "failed", *peaks)
            continue
        phases = [f"{row['phases'][p]:.2f}" for p in shown]
        table.add_row(row["name"], *phases, f"{row['seconds']:.2f}", *peaks)
    return table


def _gib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**30:.2f}"
