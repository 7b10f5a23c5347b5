"""How much memory a stretch of code needs at its peak."""

import ctypes
import gc
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """From its making to ``read``: the most that was in use at a time, above what was in use at the beginning.

    On a GPU what torch allocated; on Linux the resident memory of the process; elsewhere unknown.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        elif sys.platform == "linux" and _forget_peak():
            self._before = _status("VmRSS")

    def read(self) -> int | None:
        """Bytes, or None where nothing tells."""
        if self._before is None:
            return None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return _status("VmHWM") - self._before


class Highest:
    """The most memory in use since ``forget``, in all: not above what was in use before.

    Attributes:
        is_gpu: torch's allocator is asked, and else the resident memory of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_gpu = device, device.type == "cuda"
        self._known = self.is_gpu or (sys.platform == "linux" and _CLEAR.exists())

    def forget(self) -> None:
        """Begin anew."""
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._known:
            _CLEAR.write_text("5")

    def read(self) -> tuple[int | None, int | None]:
        """Bytes ``(allocated, reserved)``: of a GPU, what torch's tensors take and what torch holds for them.

        On a CPU the process's resident memory and None; both are None where the system does not tell.
        """
        if self.is_gpu:
            return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        return (_status("VmHWM") if self._known else None), None


class PeakTensors:
    """As ``PeakMemory``, of torch's own tensors on the CPU alone: exact, the same every time, and slow.

    The process's memory also holds what the C library keeps of freed tensors, which differs from run to run.
    """

    def __init__(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at the first use: it would tell of its start and end
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def read(self) -> int:
        """Bytes."""
        self._profile.stop()
        assert self._profile.profiler is not None, "it has run"
        events: Any = self._profile.profiler.kineto_results
        changes = [(event.start_ns(), event.nbytes()) for event in events.events() if event.name() == "[memory]"]
        held = itertools.accumulate(change for _, change in sorted(changes, key=lambda change: change[0]))
        return max(held, default=0)


def _forget_peak() -> bool:
    """Hand freed memory back to the system and let its record begin anew; False where the system does not let us."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed earlier would be used again unseen
    except (OSError, AttributeError):  # another C library than glibc
        return False
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found, f"{_STATUS} has no {name}"
    return int(found[1]) * 1024
