"""What a step shared and where its seconds went, as metrics."""

from collections.abc import Callable

from transformers import TrainerCallback

from ..stopwatch import Stopwatch
from .sharing import GroupSharing


class SharingReport(TrainerCallback):
    """Logs, per optimizer step, ``group/prompt_tokens_saved``, ``group/encodes_saved`` and ``seconds/{phase}``.

    Prompt tokens and encoded media are counted against one prompt per completion. The phases are ``process`` (media
    opened and processed), ``generate``, ``logps`` (old and reference) and ``update`` (everything else: rewards,
    forward, backward, optimizer).

    Args:
        sharing: counts.
        watch: times.
        log: called with a metric's name and value.
    """

    def __init__(self, sharing: GroupSharing, watch: Stopwatch, log: Callable[[str, float], None]) -> None:
        self.sharing, self.watch, self.log = sharing, watch, log

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.sharing.saved = dict.fromkeys(self.sharing.saved, 0)
        self.watch.start()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.sharing.moved.note(model)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.sharing.release()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        for name, count in self.sharing.saved.items():
            self.log(f"group/{name}_saved", float(count))
        seconds = self.watch.stop()
        for phase in ("process", "generate", "logps", "update"):
            self.log(f"seconds/{phase}", seconds.get(phase, 0.0))
