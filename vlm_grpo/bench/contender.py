"""One contender of a contest, in a process of its own: ``python -m vlm_grpo.bench.contender CASE.json LINES.jsonl``.

It loads the model and trains a few steps of every case. What it finds out it writes at once, a JSON object a line, so
that what was measured before a process ends, for whatever reason, is kept.
"""

import gc
import importlib
import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UnsupportedError
from .options import BenchOptions

Contender = Literal["trl", "unsloth", "ours", "ours-unsloth"]
_ON_UNSLOTH = ("unsloth", "ours-unsloth")


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        options: the prompts, completions and device; ``rounds`` steps are measured.
        contender: the trainer, and the library that loads its model.
        model: the model's folder.
        prompts_per_step: how many groups a generation batch has; several are measured one after the other.
        load_in_4bit: NF4 weights.
        memory_gib: limit of what torch may hold of the GPU's memory, or None.
        warm_up: prompts before the measured steps, in one step or more.
    """

    options: BenchOptions
    contender: Contender
    model: str
    prompts_per_step: tuple[int, ...] = (1,)
    load_in_4bit: bool = False
    memory_gib: float | None = None
    warm_up: int = 2

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Case":
        """What ``write`` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        options, groups = BenchOptions(**values.pop("options")), tuple(values.pop("prompts_per_step"))
        return cls(options=options, prompts_per_step=groups, **values)


class Lines:
    """A file of JSON objects, one a line, each on the disk as soon as it is said."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def say(self, event: str, **facts: Any) -> None:
        """Append one."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **facts}) + "\n")


class _Warnings(logging.Handler):
    """Our own warnings are part of what was measured: that sharing fell back, for one."""

    def __init__(self, lines: Lines) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.say("note", message=record.getMessage())


def run(case: Case, lines: Lines) -> None:
    """Load the model and train the steps of every case."""
    began = time.perf_counter()
    logging.getLogger("vlm_grpo").addHandler(_Warnings(lines))
    trainer_class = trainer_classes(case.contender)  # the first: it may import Unsloth, which comes before the rest
    import torch

    torch.set_num_threads(case.options.threads)
    limit_memory(case.memory_gib)
    model = load(case)
    lines.say("loaded", seconds=time.perf_counter() - began, peak=_peak(case.options.device))
    for groups in case.prompts_per_step:
        try:
            _measure(case, trainer_class, model, groups, lines)
        except torch.OutOfMemoryError as error:
            lines.say("error", prompts=groups, kind="out of memory", message=_first_line(error))
        gc.collect()
        if case.options.device == "cuda":
            torch.cuda.empty_cache()


def limit_memory(gib: float | None) -> None:
    """Let torch hold at most so much of the GPU's memory; the CUDA context, some 0.5 GiB, comes on top."""
    import torch

    if gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def load(case: Case) -> Any:
    """The model with adapters in the language model (and the vision tower), loaded as the contender does."""
    from ..config import LoraOptions
    from ..models import load_model
    from .compare import fill_adapters
    from .shapes import LORA

    on_unsloth = case.contender in _ON_UNSLOTH
    options = case.options
    model, _ = load_model(
        case.model,
        backend="unsloth" if on_unsloth else "hf",
        load_in_4bit=case.load_in_4bit,
        lora=LoraOptions(r=LORA["r"], alpha=LORA["lora_alpha"], vision=options.train_vision),
        dtype="bfloat16" if options.bf16 or case.load_in_4bit else "float32",
        max_seq_length=(options.target or options.media_tokens or 1024) + options.completion + 256,
        gradient_checkpointing="unsloth" if on_unsloth and options.device == "cuda" else True,
    )
    fill_adapters(model)
    return model


def trainer_classes(contender: Contender) -> tuple[Any, Any]:
    """``(trainer, config)`` classes."""
    if contender in _ON_UNSLOTH:
        from ..models.unsloth import why_not

        reason = why_not()  # imports it
        if reason:
            raise UnsupportedError(f"{contender}: {reason}.")
    if contender == "trl":
        from ..patches.trl import LOG_PROBS, own_grpo_config, own_grpo_trainer

        LOG_PROBS.ensure()
        return own_grpo_trainer(), own_grpo_config()
    if contender == "unsloth":
        trl = importlib.import_module("trl")

        from ..patches.trl import LOG_PROBS, own_grpo_trainer

        LOG_PROBS.ensure()
        if issubclass(trl.GRPOTrainer, own_grpo_trainer()):
            raise UnsupportedError("unsloth: it has left TRL's GRPOTrainer as it is here, so there is none of its own.")
        return trl.GRPOTrainer, trl.GRPOConfig
    from ..trainer import VLMGRPOTrainer
    from ..trainer_config import VLMGRPOConfig

    return VLMGRPOTrainer, VLMGRPOConfig


def _measure(case: Case, classes: tuple[Any, Any], model: Any, groups: int, lines: Lines) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, classes, model, groups, folder)
        trainer.lines, trainer.prompts = lines, groups
        trainer.train()


def warm_up_steps(prompts: int, each: int) -> int:
    """Steps of ``each`` prompts that so many make, rounded up; none for none."""
    return -(-prompts // each)


def make_trainer(case: Case, classes: tuple[Any, Any], model: Any, groups: int, folder: str) -> Any:
    """A trainer of the contender's class that takes its own time."""
    import torch
    from transformers import PrinterCallback

    from .compare import reward, trainer_arguments
    from .measure import time_processor
    from .observed import StepsSaid, timed
    from .prompts import build_prompts

    options, (cls, config_cls) = case.options, classes
    warm_up = warm_up_steps(case.warm_up, groups)
    steps = warm_up + options.rounds
    prompts = build_prompts(options, steps * groups)
    arguments = trainer_arguments(options, prompts, folder)
    arguments |= {"max_steps": steps, "gradient_accumulation_steps": groups, "temperature": 1.0}
    arguments |= {"loss_type": "dapo", "steps_per_generation": groups}
    ours = case.contender.startswith("ours")
    if ours:
        sharing = options.group_sharing
        arguments |= {"group_sharing": sharing, "flow_check": False, "gradient_check": False}
    trainer = timed(cls, torch.device(options.device))(
        model=model,
        reward_funcs=[reward],
        args=config_cls(**arguments),
        train_dataset=prompts.dataset,
        processing_class=prompts.processor,
        callbacks=[],
    )
    trainer.add_callback(StepsSaid(trainer, warm_up))
    trainer.remove_callback(PrinterCallback)
    if not ours:
        time_processor(trainer.processing_class, trainer.meter)
    return trainer


def _peak(device: str) -> tuple[int | None, int | None]:
    import torch

    from .memory import Highest

    return Highest(torch.device(device)).read()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]


def main(case_file: str, lines_file: str) -> int:
    """Exit code 1 after an error, which is the last line said."""
    lines = Lines(Path(lines_file))
    try:
        run(Case.read(Path(case_file)), lines)
    except Exception as error:
        kind = "out of memory" if type(error).__name__ == "OutOfMemoryError" else type(error).__name__
        lines.say("error", prompts=None, kind=kind, message=_first_line(error))
        if kind == "out of memory":
            return 1
        raise
    lines.say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
