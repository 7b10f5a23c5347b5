"""What a run records and obeys: metrics, samples, curves, saving, stopping. (What it shows: progress.py.)

``run.py`` hands these to the trainer; the trainer knows none of them.
"""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .media import Medium
from .report import MediaFolder, draw_curves, read_jsonl

Wish = TypeVar("Wish", bool, str | None)


_HISTORY = 200  # log entries that a checkpoint keeps


def append_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Append one line an object; NaN and infinity, which JSON does not have, become ``null``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)


def _plain(value: Any) -> Any:
    """The JSON form of a logged value: tensors and numpy scalars as numbers, what has no JSON form as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def cut_back(path: Path, step: int) -> int:
    """Cut a JSON-lines file back to the lines of ``step`` and before, as a run that continues from there needs it.

    Lines that a kill has torn go too. The file is written anew beside its name and renamed; a run that starts from
    nothing cuts back to step -1, because an evaluation before the first step is logged as step 0.

    Returns:
        The number of lines removed; 0 when there is no such file.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if len(kept) < len(lines):
        beside = path.with_name(f".{path.name}.new")
        with beside.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    return len(lines) - len(kept)


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _agreed(args: TrainingArguments, wish: Wish) -> Wish:
    """The first process's wish in all of them: clocks and signals differ, and one process alone would wait forever."""
    if args.world_size == 1:
        return wish
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([wish])[0]


class MetricsCallback(TrainerCallback):
    """Appends every log to a JSON-lines file: ``step``, ``epoch``, ``seconds`` of training, then the metrics.

    Args:
        path: the file; ``seconds`` goes on from its last line, so it is the run's and not this process's.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._before, self._began = 0.0, time.monotonic()

    def seconds(self) -> float:
        """Seconds of training so far, over all resumes."""
        return self._before + time.monotonic() - self._began

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._before, self._began = 0.0, time.monotonic()
        if self.path.exists():
            for record in read_jsonl(self.path):
                self._before = float(record.get("seconds") or self._before)

    def on_log(self, args, state: TrainerState, control, logs: dict[str, Any] | None = None, **kwargs: Any):
        # The closing summary counts this process only, which is wrong after a resume.
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        head = {"step": state.global_step, "epoch": state.epoch, "seconds": round(self.seconds(), 3)}
        append_jsonl(self.path, [{**head, **logs}])
        # Every checkpoint writes the history anew; the file above holds all of it.
        del state.log_history[:-_HISTORY]


class SamplesCallback(TrainerCallback):
    """Appends completions to a JSON-lines file: of the newest rollout at every log, each rollout at most once.

    A line holds ``step, prompt, completion, answer, rewards, advantage, media``: texts with the media's labels in
    place of the media, and what rewards logged by TRL's ``log_extra`` under its own name; under ``media_files`` it
    names small copies of the media, ``{"kind", "file"}``, that a ``MediaFolder`` keeps beside the file.

    Args:
        path: the file, in the run folder.
        trainer: TRL's GRPOTrainer or a child of it, whose ``_logs`` hold the newest rollout.
        per_step: the first so many completions of a rollout are written, so whole groups.
    """

    def __init__(self, path: Path, trainer: Any, per_step: int = 16) -> None:
        self.path, self.trainer, self.per_step = Path(path), trainer, per_step
        self.media = MediaFolder(self.path.parent, getattr(trainer, "media", None))
        self._seen: Any = None
        self._pending: list[dict[str, Any]] = []

    def _newest(self) -> Any:
        advantages = self.trainer._logs["advantages"]
        return advantages[-1] if advantages else None

    def on_step_end(self, args, state: TrainerState, control, **kwargs: Any):
        # Taken here and not in on_log: an evaluation before the next log would overwrite the rollout. Every rollout
        # brings new float objects, and the one held here cannot be recycled: identity tells a new rollout.
        newest = self._newest()
        if newest is not self._seen and state.is_world_process_zero:
            self._seen = newest
            self.media.begin(state.global_step / state.max_steps if state.max_steps > 0 else 1.0)
            self._pending = self._rows(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs: Any):
        self._seen = self._newest()

    def on_log(self, args, state: TrainerState, control, logs: dict[str, Any] | None = None, **kwargs: Any):
        if self._pending:
            append_jsonl(self.path, self._pending)
            self._pending = []

    def _rows(self, step: int) -> list[dict[str, Any]]:
        logs = self.trainer._logs
        count = len(logs["prompt"])
        extra = {name: list(values) for name, values in logs["extra"].items() if len(values) == count}
        count = min(count, self.per_step)
        files = self.media.keep([media_of(prompt) for prompt in list(logs["prompt"])[:count]])
        rows = []
        for index in range(count):
            prompt, media = transcript(logs["prompt"][index])
            rows.append(
                {name: values[index] for name, values in extra.items()}
                | {"step": step, "prompt": prompt, "completion": transcript(logs["completion"][index])[0]}
                | {"rewards": {name: values[index] for name, values in logs["rewards"].items()}}
                | {"advantage": logs["advantages"][index], "media": media, "media_files": files[index]}
            )
        return rows


def media_of(conversation: str | list[dict[str, Any]]) -> list[Medium]:
    """The media of a conversation, in order; those of a templated text stand elsewhere."""
    contents = [] if isinstance(conversation, str) else [message.get("content") for message in conversation]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part[part["type"]] for part in parts if isinstance(part.get(part["type"]), Medium)]


def transcript(conversation: str | list[dict[str, Any]]) -> tuple[str, list[str]]:
    """A conversation as text, with ``[label]`` in place of each medium, and the labels; roles if there are several."""
    if isinstance(conversation, str):
        return conversation, []
    texts, labels = [], []
    for message in conversation:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        pieces = []
        for part in parts:
            if part["type"] == "text":
                pieces.append(part["text"])
                continue
            medium = part.get(part["type"])
            label = getattr(medium, "label", None) or (medium if isinstance(medium, str) else part["type"])
            labels.append(label)
            pieces.append(f"[{label}]")
        if message.get("tool_calls"):
            pieces.append(json.dumps(_plain(message["tool_calls"]), ensure_ascii=False))
        body = " ".join(piece for piece in pieces if piece)
        texts.append(body if len(conversation) == 1 else f"{message['role']}: {body}")
    return "\n".join(texts), labels


class CurvesCallback(TrainerCallback):
    """Redraws the curves when a checkpoint is saved, at most every ``every`` seconds, and at the end."""

    def __init__(self, metrics_file: Path, out: Path, every: float = 30.0) -> None:
        self.metrics_file, self.out, self.every = Path(metrics_file), Path(out), every
        self._drawn = -math.inf

    def on_save(self, args, state: TrainerState, control, **kwargs: Any):
        if state.is_world_process_zero and time.monotonic() - self._drawn >= self.every:
            draw_curves(self.metrics_file, self.out)
            self._drawn = time.monotonic()

    def on_train_end(self, args, state: TrainerState, control, **kwargs: Any):
        if state.is_world_process_zero:
            draw_curves(self.metrics_file, self.out)


class SaveEvery(TrainerCallback):
    """Asks for a checkpoint when so many seconds have passed since the last one."""

    def __init__(self, seconds: float = 120.0) -> None:
        self.seconds = seconds
        self._last = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs: Any):
        self._last = time.monotonic()

    def on_save(self, args, state, control, **kwargs: Any):
        self._last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state, control: TrainerControl, **kwargs: Any):
        if _agreed(args, time.monotonic() - self._last >= self.seconds):
            control.should_save = True


class StopCallback(TrainerCallback):
    """Saves and stops after the step in which the time ran out or a signal arrived.

    Args:
        max_minutes: limit of training time; ``None`` for none.
        clock: seconds of training so far, by default of this process; ``MetricsCallback.seconds`` counts all resumes.

    Attributes:
        reason: ``"time limit"``, ``"SIGTERM"``, ``"Ctrl-C"`` or ``None``: why training stops or has stopped early.
    """

    def __init__(self, max_minutes: float | None = None, clock: Callable[[], float] | None = None) -> None:
        self.limit = math.inf if max_minutes is None else 60 * max_minutes
        self.reason: str | None = None
        self._began = time.monotonic()
        self._clock = clock or (lambda: time.monotonic() - self._began)

    def seconds_left(self) -> float:
        """Seconds until the time limit; infinite without one."""
        return max(0.0, self.limit - self._clock()) if math.isfinite(self.limit) else math.inf

    def on_train_begin(self, args, state, control, **kwargs: Any):
        self._began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.reason is None and self.seconds_left() == 0 and state.global_step < state.max_steps:
            self.reason = "time limit"
        self.reason = _agreed(args, self.reason)
        if self.reason is not None:
            control.should_log = control.should_save = control.should_training_stop = True


@contextmanager
def graceful_signals(callback: StopCallback) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a save and a stop after the running step; a second Ctrl-C interrupts at once.

    The previous handlers come back at the end. Outside the main thread, where Python allows no handlers, nothing
    happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a forked data worker: Ctrl-C is the parent's affair, SIGTERM is the parent's order
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if name == "Ctrl-C" and callback.reason is not None:
            raise KeyboardInterrupt
        callback.reason = callback.reason or name
        # Not print: the signal may have come in the middle of one, which Python's buffers do not survive.
        os.write(2, f"\n{name}: saving after this step. Press Ctrl-C again to stop without saving.\n".encode())

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
