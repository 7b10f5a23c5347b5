"""The README's table of what was measured on GPUs, from the results alone."""

from typing import Any

NOT_YET = "not yet measured"
_GIB = 2**30


def markdown(results: list[dict[str, Any]]) -> str:
    """One block of tables a GPU; without results that hold figures, a sentence that says so.

    Args:
        results: as ``suite.py`` writes them.
    """
    blocks = [text for result in results if (text := _block(result))]
    return "\n\n".join(blocks) or f"On a GPU: {NOT_YET}."


def _block(result: dict[str, Any]) -> str:
    phases = result.get("phases", {})
    if result.get("device") != "cuda":
        return ""  # a rehearsal
    about = phases.get("environment", {})
    parts = [_speed(phases.get("contest", {})), _fits([p for n, p in sorted(phases.items()) if n.startswith("fit")])]
    parts = [part for part in parts if part]
    if not parts or "versions" not in about:
        return ""
    names = ("torch", "transformers", "trl", "unsloth", "bitsandbytes")
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in names if name in about["versions"])
    head = f"{about['gpu']} ({about['memory_gib']:.0f} GiB), {result['date'][:10]}: {versions}."
    return "\n\n".join([head, *parts])


def _speed(contest: dict[str, Any]) -> str:
    rows = contest.get("rows", [])
    if not any("seconds" in row for row in rows):
        return ""
    title = (
        f"Seconds a step of {contest['shape']} in 4 bits, random weights, P {contest['prompt_tokens']}, "
        f"C {contest['completion_tokens']}, G {contest['num_generations']}:"
    )
    lines = [
        "| trainer | prompts a step | generate | old/ref log-probs | forward + backward | step | peak GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "seconds" in row:
            phases = [f"{row['phases'][name]:.2f}" for name in ("generate", "old_ref_logps", "forward_backward")]
            cells = [*phases, f"{row['seconds']:.2f}", f"{row['peak_bytes'] / _GIB:.1f}"]
        else:
            cells = ["", "", "", row.get("error_kind", "failed"), ""]
        lines.append(f"| {row['name']} | {row['prompts_per_step']} | {' | '.join(cells)} |")
    return title + "\n\n" + "\n".join(lines)


def _fits(phases: list[dict[str, Any]]) -> str:
    lines = []
    for phase in phases:
        for row in phase.get("cases", []):
            fits = row.get("fits")
            if isinstance(fits, bool):
                text = "nothing tried" if fits else f"not in {max(row['out_of_memory_at'])} GiB"
            elif isinstance(fits, int):
                text = f"{fits} GiB"
            else:
                continue  # not reached, or failed for another reason
            peak = f"{row['peak_bytes'] / _GIB:.1f}" if row.get("peak_bytes") else ""
            sizes = [str(row[name]) for name in ("prompt_tokens", "completion_tokens", "num_generations")]
            lines.append(f"| {phase['shape']} | {phase['contender']} | {' | '.join(sizes)} | {text} | {peak} |")
    if not lines:
        return ""
    head = "| model, 4-bit | trainer | P | C | G | fits | peak GiB |\n| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    return "Under a limit on what torch may hold:\n\n" + "\n".join([head, *lines])
