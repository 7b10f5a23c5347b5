"""What the doctor finds, as plain data. None where it could not be found out; ``failures`` says why."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Gpu:
    """One CUDA device that torch sees.

    Attributes:
        total_gib, free_gib: its memory; free as the driver counts it, other processes' share taken off.
        capability: compute capability, such as ``(7, 5)`` of a T4.
        native_bf16: whether it computes bfloat16 itself. Emulated, it is many times slower.
        failure: why it cannot add two numbers with this torch, or an empty string.
    """

    name: str
    total_gib: float
    free_gib: float
    capability: tuple[int, int]
    native_bf16: bool
    failure: str = ""


@dataclass(frozen=True)
class Machine:
    """Found without torch.

    Attributes:
        cards: names of NVIDIA GPUs by the driver's own tool, whatever torch sees.
        driver: version of the NVIDIA driver, or an empty string.
        visible: ``CUDA_VISIBLE_DEVICES``; None where it is not set.
        processes: of a distributed launch, this one included.
        notebook: ``"Colab"``, ``"Kaggle"`` or an empty string.
        disk_gib: free space by what is kept there: ``"current folder"``, ``"Hugging Face cache"``.
        offline: which variable keeps the Hub away, or an empty string.
        programs: paths of programs that packages call, None where missing.
    """

    system: str
    python: str
    cpus: int
    memory_gib: float | None = None
    memory_free_gib: float | None = None
    cards: tuple[str, ...] = ()
    driver: str = ""
    visible: str | None = None
    processes: int = 1
    notebook: str = ""
    disk_gib: dict[str, float] = field(default_factory=dict)
    offline: str = ""
    programs: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Package:
    """One package that this project, or Unsloth, asks for.

    Attributes:
        version: installed; None where it is not.
        window: versions this project was tested with, as it asks for them; empty where any will do; None where
            neither its metadata nor its ``pyproject.toml`` says.
        inside: whether the version lies in the window; None where either is not known.
        unsloth: what the installed Unsloth asks for, where it does; ``inside_unsloth`` likewise.
        need: ``"run"`` (no run without it), ``"machine"`` (asked for on some machines, such as this), ``"extra"``,
            or ``"elsewhere"`` (asked for on other machines).
        extra: the extra that brings it.
        failure: why importing it fails, or an empty string; None where it was not tried.
    """

    name: str
    version: str | None
    window: str | None = ""
    inside: bool | None = None
    unsloth: str = ""
    inside_unsloth: bool | None = None
    need: str = "run"
    extra: str = ""
    failure: str | None = None


@dataclass(frozen=True)
class Torch:
    """What torch was built for, and sees. ``cuda``: version it was built with; empty for a CPU-only build."""

    version: str
    cuda: str
    available: bool
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Precision:
    """What a run computes in, and by which kernel.

    Attributes:
        weights: dtype that ``load_model(dtype="auto")`` gives weights that are not 4-bit.
        training: mixed precision of the trainers where none is asked for: bf16, fp16 or fp32.
        attention: what transformers picks for a model that leaves it open.
        flash_attention: whether flash_attention_2 could be asked for.
        flex_attention: whether ``group_attention="flex"`` has what it compiles by.
        overflowing: model types that overflow in fp16.
    """

    weights: str
    training: str
    attention: str
    flash_attention: bool
    flex_attention: bool
    overflowing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Backend:
    """What ``load_model(backend="auto")`` takes for a model with adapters, ``"unsloth"`` or ``"hf"``, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class PatchState:
    """One record of the ledger of patches, and how the library stands now."""

    name: str
    file: str
    why: str
    state: str


@dataclass(frozen=True)
class Facts:
    """Everything that was found.

    Attributes:
        backend: for a model with adapters, which is the usual case.
        trainer_failure: why ``vlm_grpo``'s trainer cannot be imported, or an empty string; None where it was not tried.
        failures: what could not be found out, by the name of the field: the first line of the reason.
    """

    machine: Machine
    packages: tuple[Package, ...] = ()
    torch: Torch | None = None
    precision: Precision | None = None
    backend: Backend | None = None
    patches: tuple[PatchState, ...] = ()
    trainer_failure: str | None = None
    failures: dict[str, str] = field(default_factory=dict)

    def package(self, name: str) -> Package | None:
        """The package of that name, if it is asked for at all."""
        return next((package for package in self.packages if package.name == name), None)

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """What torch sees; empty also where torch could not be asked."""
        return self.torch.gpus if self.torch else ()
