"""What a run shows while it trains: one bar, or plain lines in a log file."""

import math
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerState

from .report import duration

# The most telling first: a narrow terminal cuts the end off.
SHOWN = {
    "reward": ("reward", "{:.3f}"),
    "completions/mean_length": ("length", "{:.0f}"),
    "kl": ("KL", "{:.2g}"),
    "accuracy": ("right", "{:.0%}"),
    "margin": ("margin", "{:.3f}"),
    "memory": ("memory", "{:.1f} GiB"),
    "loss": ("loss", "{:.3g}"),
}
_NARROW = 100  # columns; below, the description, the time gone and the loss make room for the rest


def peak_memory() -> float | None:
    """The most memory so far, in GiB: of tensors on this process's GPU, else of the process; None on Windows' CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class _StatusColumn(ProgressColumn):
    """``77/150 · 0:42 · 0:40 left · reward 0.842 …``, cut at the right edge of a narrow terminal."""

    def __init__(self, narrow: bool) -> None:
        super().__init__()
        self.narrow = narrow

    def render(self, task: Task) -> Text:
        gone = "" if self.narrow else f" · {duration(task.elapsed or 0)}"
        counts = f"{task.completed:.0f}/{task.total:.0f}{gone}"
        return Text(f"{counts}{task.fields['status']}", no_wrap=True, overflow="ellipsis")


class ProgressCallback(TrainerCallback):
    """One progress bar a run, with time left, reward, length, KL, memory and loss; plain lines without a terminal.

    Length is the mean of the completions in tokens, KL in nats (a token, or a completion for PPO), memory the most so
    far (``peak_memory``). Plain lines come every ten seconds or tenth of the run. Both go to the standard error stream.

    Args:
        description: what stands in front.
        console: where to draw.
        seconds_left: seconds until a time limit (``StopCallback.seconds_left``), which the estimate cannot exceed.
    """

    def __init__(
        self,
        description: str = "GRPO",
        console: Console | None = None,
        seconds_left: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.description, self.seconds_left = description, seconds_left
        self.console = console or Console(stderr=True)
        self._values: dict[str, str] = {}
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._evaluated = 0
        self._narrow = False

    def _is_live(self) -> bool:
        # rich draws nothing at all in a notebook without ipywidgets
        return find_spec("ipywidgets") is not None if self.console.is_jupyter else self.console.is_interactive

    def on_train_begin(self, args, state: TrainerState, control, **kwargs: Any):
        if not state.is_world_process_zero:
            return
        self._began, self._first = time.monotonic(), state.global_step
        self._printed, self._printed_step = self._began, state.global_step
        if self._is_live():
            width = self.console.width
            self._narrow = width < _NARROW
            bar = BarColumn(max(4, min(40, width - (72 if self._narrow else 108))))
            columns = (bar, _StatusColumn(self._narrow))
            if not self._narrow:
                columns = (TextColumn("[bold]{task.description}"), *columns)
            self._progress = Progress(*columns, console=self.console, refresh_per_second=2)
            self._progress.start()
            start = {"completed": state.global_step, "total": state.max_steps, "status": ""}
            self._task = self._progress.add_task(self.description, **start)
        else:
            begin = f", from step {state.global_step}" if state.global_step else ""
            self._print(f"{self.description}: {state.max_steps} steps{begin}")

    def on_log(self, args, state: TrainerState, control, logs: dict[str, Any] | None = None, **kwargs: Any):
        logs = {**(logs or {}), "memory": peak_memory()}
        for key, (name, form) in SHOWN.items():
            value = logs.get(key)
            if value is not None:
                self._values[name] = f"{name} {form.format(value)}"
        if self._progress is not None:
            self._progress.update(self._task, status=self._status(state))

    def on_step_end(self, args, state: TrainerState, control, **kwargs: Any):
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step, status=self._status(state))

    def on_step_begin(self, args, state: TrainerState, control, **kwargs: Any):
        # The plain line of a step waits for the next one to begin: its metrics are logged only after it has ended.
        if self._progress is None and state.is_world_process_zero:
            tenth = state.global_step - self._printed_step >= max(1, state.max_steps / 10)
            is_late = state.global_step > self._printed_step and time.monotonic() - self._printed >= 10
            if tenth or is_late:
                self._print_step(state)

    def on_prediction_step(self, args, state, control, eval_dataloader: Any = None, **kwargs: Any):
        if self._progress is not None:
            self._evaluated += 1
            total = f"/{len(eval_dataloader)}" if hasattr(eval_dataloader, "__len__") else ""
            self._progress.update(self._task, status=f" · evaluating {self._evaluated}{total}")

    def on_evaluate(self, args, state: TrainerState, control, **kwargs: Any):
        self._evaluated = 0
        if self._progress is not None:
            self._progress.update(self._task, status=self._status(state))

    def on_train_end(self, args, state: TrainerState, control, **kwargs: Any):
        if self._progress is None and state.is_world_process_zero and state.global_step > self._printed_step:
            self._print_step(state)
        self.close()

    def close(self) -> None:
        """Give the terminal back; for the way out after an exception, where ``on_train_end`` is not reached."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _status(self, state: TrainerState) -> str:
        """`` · 0:40 left · reward 0.842 · length 2 · KL 0.012 · memory 9.3 GiB``, or as much of it as is known."""
        done = state.global_step - self._first
        left = self.seconds_left()
        if done:
            left = min(left, (time.monotonic() - self._began) / done * (state.max_steps - state.global_step))
        parts = [f"{duration(left)} left"] if math.isfinite(left) else []
        values = [self._values[name] for name, _ in SHOWN.values() if name in self._values]
        if self._narrow:
            values = [value.removeprefix("memory ") for value in values if not value.startswith("loss ")]
        return "".join(f" · {part}" for part in [*parts, *values])

    def _print_step(self, state: TrainerState) -> None:
        share = f"{state.global_step / max(1, state.max_steps):.0%}"
        elapsed = duration(time.monotonic() - self._began)
        self._print(f"step {state.global_step}/{state.max_steps} ({share}) · {elapsed}{self._status(state)}")
        self._printed, self._printed_step = time.monotonic(), state.global_step

    def _print(self, line: str) -> None:
        print(line, file=self.console.file, flush=True)
