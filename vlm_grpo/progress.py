"""What a run shows while it trains: one bar, or plain lines in a log file."""

import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerState

from .report import duration

SHOWN = {
    "reward": ("reward", "{:.3f}"),
    "completions/mean_length": ("length", "{:.0f}"),
    "loss": ("loss", "{:.3g}"),
}


class _StatusColumn(ProgressColumn):
    """``77/150 · 0:42 · 0:40 left · reward 0.842 …``, cut at the right edge of a narrow terminal."""

    def render(self, task: Task) -> Text:
        counts = f"{task.completed:.0f}/{task.total:.0f} · {duration(task.elapsed or 0)}"
        return Text(f"{counts}{task.fields['status']}", no_wrap=True, overflow="ellipsis")


class ProgressCallback(TrainerCallback):
    """One progress bar a run, with reward, completion length, loss and time left; plain lines without a terminal.

    Plain lines come every ten seconds or tenth of the run. Both go to the standard error stream.

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

    def _is_live(self) -> bool:
        # rich draws nothing at all in a notebook without ipywidgets
        return find_spec("ipywidgets") is not None if self.console.is_jupyter else self.console.is_interactive

    def on_train_begin(self, args, state: TrainerState, control, **kwargs: Any):
        if not state.is_world_process_zero:
            return
        self._began, self._first = time.monotonic(), state.global_step
        self._printed, self._printed_step = self._began, state.global_step
        if self._is_live():
            bar = BarColumn(max(6, min(40, self.console.width - 80)))
            columns = (TextColumn("[bold]{task.description}"), bar, _StatusColumn())
            self._progress = Progress(*columns, console=self.console, refresh_per_second=2)
            self._progress.start()
            start = {"completed": state.global_step, "total": state.max_steps, "status": ""}
            self._task = self._progress.add_task(self.description, **start)
        else:
            begin = f", from step {state.global_step}" if state.global_step else ""
            self._print(f"{self.description}: {state.max_steps} steps{begin}")

    def on_log(self, args, state: TrainerState, control, logs: dict[str, Any] | None = None, **kwargs: Any):
        for key, (name, form) in SHOWN.items():
            value = (logs or {}).get(key)
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
        """`` · 0:40 left · reward 0.842 · length 2 · loss 0.0123``, or as much of it as is known."""
        done = state.global_step - self._first
        left = self.seconds_left()
        if done:
            left = min(left, (time.monotonic() - self._began) / done * (state.max_steps - state.global_step))
        parts = [f"{duration(left)} left"] if math.isfinite(left) else []
        return "".join(f" · {part}" for part in [*parts, *self._values.values()])

    def _print_step(self, state: TrainerState) -> None:
        share = f"{state.global_step / max(1, state.max_steps):.0%}"
        elapsed = duration(time.monotonic() - self._began)
        self._print(f"step {state.global_step}/{state.max_steps} ({share}) · {elapsed}{self._status(state)}")
        self._printed, self._printed_step = time.monotonic(), state.global_step

    def _print(self, line: str) -> None:
        print(line, file=self.console.file, flush=True)
