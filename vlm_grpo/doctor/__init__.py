"""What this machine and its packages can do for a run, and what to do about what they cannot.

Importing this package loads neither torch nor anything that needs it: those are asked in a process of their own, so
that a broken installation, or one that Unsloth changes while it is imported, leaves the caller as it was.
"""

from dataclasses import dataclass

from .asking import ask
from .facts import Backend, Facts, Gpu, Machine, Package, PatchState, Precision, Torch
from .judgement import Problem, problems_of
from .machine import look_around
from .packages import list_packages

__all__ = [
    "Backend",
    "Diagnosis",
    "Facts",
    "Gpu",
    "Machine",
    "Package",
    "PatchState",
    "Precision",
    "Problem",
    "Torch",
    "diagnose",
    "problems_of",
]


@dataclass(frozen=True)
class Diagnosis:
    """What was found, and what to do about it.

    Attributes:
        facts: as found, without a judgement.
        problems: those that block a run first.
    """

    facts: Facts
    problems: tuple[Problem, ...]

    @property
    def blocked(self) -> bool:
        """Whether a run cannot start here."""
        return any(problem.blocks for problem in self.problems)


def diagnose() -> Diagnosis:
    """Look at the machine, the packages and what they do together; half a minute where Unsloth has to be imported.

    Raises nothing for a broken installation: what fails is in the facts, with the first line of its reason.
    """
    facts = ask(Facts(machine=look_around(), packages=list_packages()))
    return Diagnosis(facts, problems_of(facts))
