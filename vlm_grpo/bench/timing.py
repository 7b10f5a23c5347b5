"""Where the seconds of a GRPO trainer's step go."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from .memory import Highest

PHASES: tuple[str, ...] = ("process", "generate", "old_ref_logps", "forward_backward", "other")


class Meter:
    """Seconds by phase; a stretch of code counts for the innermost phase that is open.

    On the CPU these are CPU seconds of the whole process, on a GPU seconds until it has finished.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._open: list[str] = []
        self._since = 0.0

    def reset(self) -> None:
        """Begin a new step."""
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside counts for ``name``."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = self._now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


class PhaseMeter(Meter):
    """As ``Meter``, and the highest memory of each phase: ``peaks`` maps it to ``(allocated, reserved)`` bytes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.memory = Highest(device)
        self.peaks: dict[str, tuple[int | None, int | None]] = {}
        self._began = 0.0

    def reset(self) -> None:
        """Begin a new step, now."""
        super().reset()
        self.peaks = {}
        self.memory.forget()
        self._since = self._began = self._now()

    def finish(self) -> float:
        """Seconds since ``reset``; what belongs to no phase, such as the optimizer, counts for ``other``."""
        with self.phase("other"):
            whole = self._now() - self._began
        self.seconds["other"] += max(0.0, whole - sum(self.seconds.values()))
        return whole

    def _charge(self) -> None:
        super()._charge()
        phase = self._open[-1] if self._open else "other"
        before, now = self.peaks.get(phase, (None, None)), self.memory.read()
        self.peaks[phase] = tuple(  # type: ignore[assignment]
            max((value for value in pair if value is not None), default=None) for pair in zip(before, now, strict=True)
        )
        self.memory.forget()


_Trainer: Any = object  # a base class at run time only


class Timed(_Trainer):
    """Stands before a GRPO trainer's class, TRL's or one made from it, and takes the time of its methods."""

    meter: Meter

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("process"):  # where a dataset decodes its pictures
            return super().get_batch_samples(*args, **kwargs)

    def _encoded_rows(self, *args: Any, **kwargs: Any) -> Any:  # ours only
        with self.meter.phase("process"):
            return super()._encoded_rows(*args, **kwargs)

    def _tokenize_prompts(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("process"):
            return super()._tokenize_prompts(*args, **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("generate"):
            return super()._generate_single_turn(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("forward_backward" if torch.is_grad_enabled() else "old_ref_logps"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("other"):
            return super()._prepare_inputs(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("forward_backward"):
            return super().training_step(*args, **kwargs)
