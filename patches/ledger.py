"""The ledger: what each change to another library is, why it is there, and when it may go.

``python -m vlm_grpo.patches.ledger`` prints the table of README.md.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["needed", "not needed", "applied", "cannot be tried here"]


@dataclass(frozen=True)
class Patch:
    """One change to another library's behaviour.

    Attributes:
        name: short, unique, in the table and in messages.
        why: what goes wrong without it, one sentence.
        reference: where the behaviour sits upstream.
        remove_when: what must be true upstream before this record can be deleted.
        probe: does the library, as it stands now, show the fault? Tried, never read off a version number. None where
            it cannot be tried, because the library is missing or does not work on this machine.
        in_place: whether the change is in force in this process now.
        apply: make the change; a second call does nothing. Raises when the place to change is gone.
        undo: put the library back; without a change in place, does nothing.
    """

    name: str
    why: str
    reference: str
    remove_when: str
    probe: Callable[[], bool | None]
    in_place: Callable[[], bool]
    apply: Callable[[], object]
    undo: Callable[[], object]

    def state(self) -> State:
        """How things stand in this process. Tries the library, imports it if need be, changes nothing."""
        if self.in_place():
            return "applied"
        needed = self.probe()
        return "cannot be tried here" if needed is None else "needed" if needed else "not needed"

    def ensure(self) -> bool:
        """Apply the change if the probe finds the fault; whether it did."""
        needed = bool(self.probe())
        if needed:
            self.apply()
        return needed


def patches() -> list[tuple[str, Patch]]:
    """``(file name, record)`` of every record in this folder, in the order of the table."""
    package = importlib.import_module(__package__ or "vlm_grpo.patches")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [(name, importlib.import_module(f"{package.__name__}.{name}")) for name in names if name != "ledger"]
    return [(f"{name}.py", patch) for name, module in modules for patch in module.PATCHES]


def table() -> str:
    """The table of README.md; the probe's column is the first line of its docstring, or its name."""
    rows = [("name", "file", "why", "reference", "probe", "remove when"), ("---",) * 6]
    for file, patch in patches():
        probe = (patch.probe.__doc__ or patch.probe.__name__.replace("_", " ")).strip().partition("\n")[0]
        rows.append((f"`{patch.name}`", f"`{file}`", patch.why, patch.reference, probe, patch.remove_when))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


if __name__ == "__main__":
    print(table())
