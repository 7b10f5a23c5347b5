"""A diagnosis as a page for a terminal of any width."""

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .facts import Facts, Machine, Package
from .judgement import Problem

_STATES = {"needed": "needed: a run that meets the fault applies it"}


def page(facts: Facts, problems: tuple[Problem, ...]) -> RenderableType:
    """Everything found, and what to do about it at the end, where a terminal leaves the reader."""
    parts: list[RenderableType] = []
    for title, body in (
        ("Machine", _rows(_machine(facts))),
        ("Packages", _packages(facts)),
        ("Precision and attention", _rows(_precision(facts))),
        ("Backend", _rows(_backend(facts))),
        ("Patches to other libraries", _patches(facts)),
        ("Extras and programs", _rows(_extras(facts))),
        ("Problems", _problems(problems)),
    ):
        parts += [Text(title, style="bold"), body, Text()]
    return Group(*parts[:-1])


def show(facts: Facts, problems: tuple[Problem, ...], console: Console) -> None:
    """Print the page."""
    console.print(page(facts, problems), highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, show_header=bool(columns), padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _rows(rows: Iterator[tuple[str, str]]) -> Table:
    table = _table()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(f"  {name}"), Text(value))
    return table


def _machine(facts: Facts) -> Iterator[tuple[str, str]]:
    machine = facts.machine
    yield "system", f"{machine.system}, Python {machine.python}"
    yield "processors", f"{machine.cpus} CPU cores{_memory(machine)}"
    for number, gpu in enumerate(facts.gpus):
        major, minor = gpu.capability
        bf16 = "bf16 native" if gpu.native_bf16 else "bf16 emulated"
        held = f"{gpu.total_gib:.1f} GiB, {gpu.free_gib:.1f} free"
        yield f"GPU {number}", gpu.failure or f"{gpu.name}, {held}, compute capability {major}.{minor}, {bf16}"
    if not facts.gpus:
        seen = f"; the driver knows {', '.join(machine.cards)}" if machine.cards else ""
        yield "GPU", f"none that torch can use{seen}"
    yield "torch", _torch(facts)
    if machine.driver:
        yield "NVIDIA driver", machine.driver
    if machine.visible is not None:
        yield "CUDA_VISIBLE_DEVICES", machine.visible or "set to nothing"
    if machine.notebook:
        yield "notebook", machine.notebook
    for place, gib in machine.disk_gib.items():
        yield "disk", f"{gib:.0f} GiB free for the {place}"
    yield "Hugging Face Hub", f"{machine.offline} is set: not asked" if machine.offline else "asked where needed"


def _memory(machine: Machine) -> str:
    if machine.memory_gib is None or machine.memory_free_gib is None:
        return ""
    return f", {machine.memory_gib:.1f} GiB of memory, {machine.memory_free_gib:.1f} free"


def _torch(facts: Facts) -> str:
    if facts.torch is None:
        return _unknown(facts, "torch")
    return f"{facts.torch.version}, {f'built for CUDA {facts.torch.cuda}' if facts.torch.cuda else 'CPU-only build'}"


def _unknown(facts: Facts, name: str) -> str:
    return f"could not be found out: {facts.failures.get(name, 'it was not asked')}"


def _packages(facts: Facts) -> Table:
    table = _table("  package", "version", "tested window", "", "Unsloth asks for")
    for package in facts.packages:
        if package.need in ("run", "machine"):
            verdict, style = _verdict(package)
            window = "unknown" if package.window is None else package.window or "any"
            unsloth = f"{package.unsloth}{' (outside)' if package.inside_unsloth is False else ''}"
            table.add_row(
                Text(f"  {package.name}"),
                Text(package.version or "-"),
                Text(window),
                Text(verdict, style=style),
                Text(_short(unsloth)),
            )
    return table


def _short(window: str) -> str:
    """Bounds without the single versions that are left out, which may be a dozen."""
    parts = window.split(",")
    kept = [part for part in parts if not part.startswith("!=")]
    return ",".join(kept or parts)


def _verdict(package: Package) -> tuple[str, str]:
    if package.failure:
        return f"broken: {package.failure}", "red"
    if package.version is None:
        return "missing", "red" if package.need == "run" else "yellow"
    if package.inside is False:
        return "outside", "yellow"
    return ("inside", "green") if package.inside else ("", "")


def _precision(facts: Facts) -> Iterator[tuple[str, str]]:
    precision = facts.precision
    if precision is None:
        yield "both", _unknown(facts, "precision")
        return
    yield "weights", f'{precision.weights} (dtype "auto")'
    yield "training", f"{precision.training}, where neither bf16 nor fp16 is given"
    flash = "flash_attention_2 can be asked for" if precision.flash_attention else "flash_attention_2 is not installed"
    yield "attention", f"{precision.attention}; {flash}"
    flex = "flex can be asked for" if precision.flex_attention else "flex has no GPU and Triton to run on here"
    yield "a group's attention", f"reference; {flex}"


def _backend(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.backend is None:
        yield "auto", _unknown(facts, "backend")
        return
    name = {"unsloth": "Unsloth", "hf": "transformers + PEFT"}[facts.backend.name]
    yield "auto", f"{name}, because {facts.backend.reason}"


def _patches(facts: Facts) -> RenderableType:
    if not facts.patches:
        return Text(f"  {_unknown(facts, 'patches')}")
    return _rows((patch.name, _STATES.get(patch.state, patch.state)) for patch in facts.patches)


def _extras(facts: Facts) -> Iterator[tuple[str, str]]:
    for extra in dict.fromkeys(package.extra for package in facts.packages if package.extra):
        parts = [package for package in facts.packages if package.extra == extra]
        missing = [package for package in parts if package.version is None or package.failure]
        names = ", ".join(f"{package.name} {package.version or 'missing'}" for package in parts)
        yield extra, names + (f': pip install "vlm-grpo[{extra}]"' if missing else "")
    for program, path in facts.machine.programs.items():
        yield program, path or "missing; Triton's kernels, which a GPU runs, need one"


def _problems(problems: tuple[Problem, ...]) -> RenderableType:
    if not problems:
        return Text("  none", style="green")
    table = _table()
    for problem in problems:
        mark = Text("  blocks", style="bold red") if problem.blocks else Text("  note", style="yellow")
        table.add_row(mark, Text(problem.text))
    return table
