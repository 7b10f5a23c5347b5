"""What stands in the way of a run, and what to do: a pure function of the facts."""

from collections.abc import Iterator
from dataclasses import dataclass

from .facts import Facts, Package

# Below these (GiB) the sizes of models that people train here do not fit: a 2B model in 4-bit takes about 6 to train.
_LITTLE_GPU_MEMORY = 8.0
_LITTLE_MEMORY = 8.0  # weights pass through it on their way to the GPU
_LITTLE_DISK = 10.0  # one 3B model in 16-bit and a few checkpoints of its adapter
_NO_DISK = 1.0
_BUILT_FOR_TORCH = ("torchvision", "xformers", "bitsandbytes", "triton")


@dataclass(frozen=True)
class Problem:
    """One sentence or two: what, and what to do. ``blocks``: no run can start before it is solved."""

    text: str
    blocks: bool = False


def problems_of(facts: Facts) -> tuple[Problem, ...]:
    """Every problem, those that block a run first."""
    found = [*_of_gpus(facts), *_of_packages(facts), *_of_unsloth(facts), *_of_room(facts), *_of_answers(facts)]
    return tuple(sorted(found, key=lambda problem: not problem.blocks))


# ---- GPUs ------------------------------------------------------------------------------------------------------------


def _of_gpus(facts: Facts) -> Iterator[Problem]:
    if facts.torch is None:
        return
    if not facts.gpus:
        yield Problem(_no_gpu(facts))
    several = len(facts.gpus) > 1 and facts.machine.processes == 1
    if several:
        where = f" on {facts.machine.notebook}" if facts.machine.notebook else ""
        yield Problem(
            f"{len(facts.gpus)} GPUs are visible to one process{where}, which TRL refuses (it does not support "
            "DataParallel). Set CUDA_VISIBLE_DEVICES=0 before Python starts, or start with accelerate launch.",
            blocks=True,
        )
    for number, gpu in enumerate(facts.gpus):
        name = f"GPU {number} ({gpu.name})"
        if gpu.failure:
            yield Problem(
                f"{name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, cannot compute with torch "
                f"{facts.torch.version} ({gpu.failure}). Install a torch built for it, or hide it by "
                "CUDA_VISIBLE_DEVICES.",
                blocks=True,
            )
            continue
        if gpu.total_gib < _LITTLE_GPU_MEMORY:
            yield Problem(
                f"{name} has {gpu.total_gib:.1f} GiB of memory. Take a model below 1B parameters, load_in_4bit, "
                "max_completion_length 128 and gradient_checkpointing."
            )
        elif gpu.free_gib < 0.75 * gpu.total_gib:
            yield Problem(
                f"Of {name}'s {gpu.total_gib:.1f} GiB of memory {gpu.free_gib:.1f} are free. "
                "End the process that holds the rest (nvidia-smi lists it), such as another notebook's kernel."
            )
    yield from _of_half_precision(facts)


def _no_gpu(facts: Facts) -> str:
    machine, torch = facts.machine, facts.torch
    assert torch is not None
    card = machine.cards[0] if machine.cards else ""
    if card and not torch.cuda:
        asked = _asked(facts.package("torch") or Package("torch", None))
        return (
            f"This machine has a GPU ({card}) but torch {torch.version} is a CPU-only build. Install the default "
            f"build: pip install --force-reinstall {asked} torchvision."
        )
    if card and machine.visible in ("", "-1"):
        return (
            f"CUDA_VISIBLE_DEVICES={machine.visible!r} hides this machine's GPU ({card}). "
            "Unset it, and start Python anew."
        )
    if card:
        return (
            f"torch {torch.version} (CUDA {torch.cuda}) cannot use this machine's GPU ({card}, driver "
            f"{machine.driver or 'unknown'}). Update the driver, or install a torch built for an older CUDA."
        )
    where = {
        "Colab": "Choose one under Runtime, Change runtime type",
        "Kaggle": "Choose one under Settings, Accelerator",
    }.get(machine.notebook, "Take a machine with an NVIDIA GPU for models above 1B parameters")
    return f"There is no GPU: everything works, in float32 on {machine.cpus} CPU cores, and slowly. {where}."


def _of_half_precision(facts: Facts) -> Iterator[Problem]:
    halves = [gpu for gpu in facts.gpus if not gpu.native_bf16 and not gpu.failure]
    if not halves:
        return
    gpu = halves[0]
    families = facts.precision.overflowing if facts.precision else ()
    rest = (
        f"; model types that overflow in it ({', '.join(families)}) are loaded in bfloat16, slowly" if families else ""
    )
    yield Problem(
        f"{gpu.name} (compute capability {gpu.capability[0]}.{gpu.capability[1]}) only emulates bfloat16, so weights "
        f"and training take float16{rest}. Leave bf16 unset, and choose a model type that does not overflow."
    )


# ---- packages --------------------------------------------------------------------------------------------------------


def _of_packages(facts: Facts) -> Iterator[Problem]:
    for package in facts.packages:
        if package.name.startswith("unsloth") or package.need == "elsewhere":
            continue
        if package.failure:
            yield _broken(package, facts)
        elif package.version is None:
            yield from _missing(package)
        elif package.inside is False:
            yield Problem(
                f"{package.name} {package.version} is outside the tested window ({package.window}). "
                f'Install one within it: pip install "{package.name}{package.window}".'
            )
    if facts.trainer_failure:
        yield Problem(
            f"The trainer cannot be imported ({facts.trainer_failure}). Bring the packages named here into the tested "
            "window, or install anew: pip install --upgrade vlm-grpo.",
            blocks=True,
        )


def _broken(package: Package, facts: Facts) -> Problem:
    torch = facts.package("torch")
    beside = f" beside torch {torch.version}" if torch and package.name in _BUILT_FOR_TORCH else ""
    what = f"{package.name} {package.version or ''}".rstrip() + f" is installed but cannot be imported{beside}"
    if package.name == "torchvision":
        todo = (
            "Reinstall both together (pip install --force-reinstall torch torchvision), or remove torchvision: "
            "transformers fails on a broken one, and only some models need it."
        )
    elif package.name == "bitsandbytes":
        todo = "Reinstall it (pip install --force-reinstall bitsandbytes), or train without load_in_4bit."
    elif package.need == "run":
        todo = f"Reinstall it: pip install --force-reinstall {_asked(package)}."
    else:
        todo = f"Reinstall or remove it: pip install --force-reinstall {_asked(package)}."
    return Problem(f"{what} ({package.failure}). {todo}", blocks=package.need == "run")


def _missing(package: Package) -> Iterator[Problem]:
    if package.name == "torchvision":
        yield Problem(
            "torchvision is not installed: models whose processors read pictures or videos through it (Qwen-VL and "
            "most that take videos) cannot be loaded, the others can. Install it: pip install torchvision."
        )
    elif package.name == "bitsandbytes":
        yield Problem(
            "bitsandbytes is not installed, so load_in_4bit is refused. Install it: pip install bitsandbytes."
        )
    elif package.need == "run":
        yield Problem(
            f"{package.name} is not installed, and no run starts without it. "
            f"Install it: pip install {_asked(package)}.",
            blocks=True,
        )


def _asked(package: Package) -> str:
    return f'"{package.name}{package.window}"' if package.window else package.name


def _of_unsloth(facts: Facts) -> Iterator[Problem]:
    unsloth = facts.package("unsloth")
    if unsloth is None or unsloth.need == "elsewhere":
        return
    if unsloth.version is None:
        if facts.gpus:
            yield Problem(
                "Unsloth is not installed, so transformers + PEFT will be used: the same training, slower and with "
                "more memory. Install it: pip install unsloth."
            )
        return
    if facts.torch is not None and not facts.gpus:
        yield Problem(
            "Unsloth is installed but there is no GPU: importing it would raise NotImplementedError, so it is left "
            'alone and transformers + PEFT will be used. Nothing to do; backend="unsloth" needs a GPU.'
        )
        return
    if facts.backend and facts.backend.name == "hf" and facts.gpus:
        yield Problem(
            f"Unsloth {unsloth.version} is not used: {facts.backend.reason}. transformers + PEFT will be used; "
            "reinstall Unsloth for its speed: pip install --upgrade unsloth unsloth_zoo."
        )
    if unsloth.inside is False:
        yield Problem(
            f"unsloth {unsloth.version} is outside the tested window ({unsloth.window}). "
            f"Install one within it: pip install {_asked(unsloth)}."
        )
    for package in facts.packages:
        if package.inside_unsloth is False:
            yield Problem(
                f"{package.name} {package.version} is outside what Unsloth {unsloth.version} takes "
                f'({package.unsloth}). Install one within it: pip install "{package.name}{package.unsloth}".'
            )


# ---- room, network, answers ------------------------------------------------------------------------------------------


def _of_room(facts: Facts) -> Iterator[Problem]:
    machine = facts.machine
    for place, gib in machine.disk_gib.items():
        if gib < _LITTLE_DISK:
            move = "HF_HOME" if "cache" in place else "--output"
            yield Problem(
                f"{gib:.1f} GiB of disk are free for the {place}. Make room, or name another disk by {move}.",
                blocks=gib < _NO_DISK,
            )
    free = machine.memory_free_gib
    if free is not None and free < _LITTLE_MEMORY:
        yield Problem(
            f"{free:.1f} GiB of memory are free, which a model's weights pass through when they are loaded. "
            "End other programs, or take a small model."
        )
    if machine.offline:
        yield Problem(
            f"{machine.offline} is set, so only models and data that are on this disk can be named. "
            "Unset it to fetch others from the Hugging Face Hub."
        )


def _of_answers(facts: Facts) -> Iterator[Problem]:
    broken = any(package.failure or package.version is None for package in facts.packages if package.need == "run")
    for name, reason in facts.failures.items():
        if name == "torch" and not broken:
            yield Problem(f"torch could not be asked for its GPUs ({reason}). Reinstall it: pip install torch.", True)
    for patch in facts.patches:
        if patch.state.startswith("cannot be probed"):
            yield Problem(
                f"The patch {patch.name} {patch.state}, so a run that needs it would stop. "
                "Bring the library it changes into the tested window."
            )
