"""Two trainers side by side in one process, in turns, on the same prompts and seeds; and what that shows."""

import contextlib
import copy
import gc
import importlib.metadata
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from transformers import PrinterCallback

from .. import __version__
from ..errors import ConfigError
from ..patches.trl import LOG_PROBS, own_grpo_config
from ..trainer import VLMGRPOTrainer
from ..trainer_config import VLMGRPOConfig
from .measure import PHASES, Step, Watched, measured, reference_class, time_processor
from .options import BenchOptions
from .prompts import Prompts, build_prompts
from .shapes import build_model, describe, lora_config

Say = Callable[[str], None]
WARM_UP = 2  # our trainer computes the first two prompts of a kind both ways
Pair = tuple[Step, Step]  # reference, ours


def run_bench(options: BenchOptions, say: Say = lambda text: None, now: Say = lambda text: None) -> dict[str, Any]:
    """Measure one case: rounds that warm up, ``rounds`` measured ones, and two for the memory.

    Both trainers have models of equal weights, and a learning rate of 0 keeps them equal. Which one goes first
    changes from round to round.

    Args:
        options: the case.
        say: is told what has been measured, a line each.
        now: is told what is running.

    Returns:
        what ``vlm-grpo bench --json`` prints: seconds are medians over the rounds, ratios are reference / ours, medians
        of the rounds' own ratios (``step_ratio_rounds``), exactness is the worst of all rounds.

    Raises:
        ConfigError: options that cannot work, or a device that is missing.
        VLMGRPOError: what our trainer raises, such as where ``group_sharing`` is true and cannot be.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device="cuda": torch sees no GPU here. Leave --device out, or install torch for CUDA.')
    with _undisturbed(options.threads), tempfile.TemporaryDirectory() as folder:
        now("building models and prompts")
        prompts = build_prompts(options, options.rounds + WARM_UP + 2)
        trainers = _trainers(options, prompts, folder)
        reference = _name_of_reference(options)
        say(_heading(options, prompts, reference))
        pairs: list[Pair] = []
        rounds = [f"round {number + 1} of {options.rounds}" for number in range(options.rounds)]
        titles = ["warm-up"] * WARM_UP + rounds
        for number, title in enumerate([*titles, "memory", "tensors"]):
            watch: Watched = "memory" if title == "memory" else "tensors" if title == "tensors" else None
            steps: list[Step] = [Step(), Step()]
            for index in (0, 1) if number % 2 else (1, 0):
                now(f"{title}: {('reference', 'ours')[index]}")
                steps[index] = trainers[index].one_step(number, watch)
            pairs.append((steps[0], steps[1]))
            say(f"{title}: {_line(pairs[-1], watch)}")
    facts = {"reference": reference, "model": describe(options), "media_tokens": prompts.media_tokens}
    facts |= {"source": prompts.source, "versions": versions()}
    return _result(options, pairs[WARM_UP:-2], pairs[-2], pairs[-1]) | facts


def versions() -> dict[str, str]:
    """Of everything that the figures depend on."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")}
    return {"python": platform.python_version(), **packages, "vlm_grpo": __version__}


@contextlib.contextmanager
def _undisturbed(threads: int) -> Iterator[None]:
    """So many threads of torch, and a garbage collector that does not look through the libraries every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gc.collect()  # else what an earlier case has left behind would be kept
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


def _trainers(options: BenchOptions, prompts: Prompts, folder: str) -> list[Any]:
    """The reference and ours."""
    LOG_PROBS.ensure()
    device = torch.device(options.device)
    trainers = []
    for theirs in (True, False):
        cls = reference_class(options.modality) if theirs else VLMGRPOTrainer
        is_trl = not issubclass(cls, VLMGRPOTrainer)
        arguments = trainer_arguments(options, prompts, folder)
        if is_trl:
            config = own_grpo_config()(**arguments)
        else:  # the two checks are for a run's first step only
            sharing = False if theirs else options.group_sharing
            config = VLMGRPOConfig(**arguments, group_sharing=sharing, flow_check=False, gradient_check=False)
        trainer = measured(cls, device)(
            model=build_model(options, prompts.processor),
            reward_funcs=reward,
            args=config,
            train_dataset=prompts.dataset,
            processing_class=copy.deepcopy(prompts.processor),
            peft_config=lora_config(options),
        )
        trainer.remove_callback(PrinterCallback)  # transformers', which prints to stdout
        if is_trl:
            time_processor(trainer.processing_class, trainer.meter)
        fill_adapters(trainer.model)
        trainers.append(trainer)
    return trainers


def _name_of_reference(options: BenchOptions) -> str:
    from trl.trainer import utils

    head: Any = vars(utils)["_ChunkedLogProbFunction"]
    if options.modality == "image":
        is_ours = options.device == "cpu" and head.__module__.startswith(__name__.split(".")[0])
        note = ", given our plain log-prob head, since its own needs Triton and so a GPU" if is_ours else ""
        return f"TRL {importlib.metadata.version('trl')} GRPOTrainer{note}"
    return (
        "vlm-grpo without sharing: every completion's prompt read, encoded, prefilled and scored by itself "
        f"(TRL trains without the {options.modality})"
    )


def trainer_arguments(options: BenchOptions, prompts: Prompts, folder: str) -> dict[str, Any]:
    specials = sorted(prompts.processor.tokenizer.all_special_ids)
    return {
        "output_dir": folder,
        "per_device_train_batch_size": options.num_generations,
        "num_generations": options.num_generations,
        "max_completion_length": options.completion,
        "beta": options.beta,
        "learning_rate": 0.0,
        "max_steps": 1,
        "bf16": options.bf16,
        "use_cpu": options.device == "cpu",
        "gradient_checkpointing": options.gradient_checkpointing,
        # No completion ends before its last token.
        "generation_kwargs": {"min_new_tokens": options.completion, "suppress_tokens": specials},
        "shuffle_dataset": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": options.seed,
    }


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Depends on nothing but the tokens, and differs within a group."""
    return [float(sum(ids) % 97) for ids in completion_ids]


def fill_adapters(model: Any) -> None:
    """B of a new adapter is zero, and then A has no gradient that could differ."""
    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)


def _heading(options: BenchOptions, prompts: Prompts, reference: str) -> str:
    changed = ", ".join(f"{name} {value} (usually {usual})" for name, (usual, value) in options.changes().items())
    kind = f"{options.modality} {prompts.source}"
    return (
        f"{describe(options)}\n"
        f"P {prompts.prompt_tokens} ({prompts.media_tokens} of the {kind}), C {options.completion}, "
        f"G {options.num_generations}, beta {options.beta:g}, {'bf16' if options.bf16 else 'fp32'}, "
        f"{'GPU' if options.device == 'cuda' else f'CPU, {options.threads} thread' + 's' * (options.threads > 1)}\n"
        f"changed from the fixed shape: {changed or 'nothing'}\n"
        f"reference: {reference}"
    )


def _line(pair: Pair, watch: Watched) -> str:
    theirs, ours = pair
    if watch is not None:
        if theirs.peak_bytes is None or ours.peak_bytes is None:
            return "the peak is unknown on this system"
        return f"reference {theirs.peak_bytes / 2**20:.0f} MiB, ours {ours.peak_bytes / 2**20:.0f} MiB"
    return f"reference {theirs.total:.2f} s, ours {ours.total:.2f} s, ratio {theirs.total / ours.total:.2f}"


def _result(options: BenchOptions, pairs: list[Pair], memory: Pair, tensors: Pair) -> dict[str, Any]:
    ratios = [theirs.total / ours.total for theirs, ours in pairs]
    phases = {phase: _phase(pairs, phase) for phase in PHASES}
    peaks, exact = ([step.peak_bytes for step in pair] for pair in (memory, tensors))
    return {
        "step_ratio": median(ratios),
        "step_ratio_rounds": ratios,
        "memory_ratio": peaks[0] / peaks[1] if peaks[0] and peaks[1] else None,
        "tensor_memory_ratio": exact[0] / exact[1] if exact[0] and exact[1] else None,
        **_exactness([*pairs, memory, tensors]),
        "phases": phases,
        "seconds_reference": median(theirs.total for theirs, _ in pairs),
        "seconds_ours": median(ours.total for _, ours in pairs),
        "peak_bytes_reference": peaks[0],
        "peak_bytes_ours": peaks[1],
        "tensor_bytes_reference": exact[0],
        "tensor_bytes_ours": exact[1],
        "modality": options.modality,
        "prompt_tokens": pairs[0][0].prompt_tokens,
        "completion_tokens": pairs[0][0].completions.shape[1],
        "num_generations": options.num_generations,
        "beta": options.beta,
        "train_vision": options.train_vision,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": options.threads,
        "rounds": options.rounds,
        "options": asdict(options),
    }


def _phase(pairs: list[Pair], phase: str) -> dict[str, float | None]:
    both = [(theirs.seconds[phase], ours.seconds[phase]) for theirs, ours in pairs]
    return {
        "reference": median(theirs for theirs, _ in both),
        "ours": median(ours for _, ours in both),
        "ratio": median(theirs / ours for theirs, ours in both) if all(ours > 0 for _, ours in both) else None,
    }


def _exactness(pairs: list[Pair]) -> dict[str, Any]:
    """The worst over all rounds; log-probabilities are compared for completions that both have sampled."""
    shares, logps, gradients = [], [], []
    for theirs, ours in pairs:
        same_shape = theirs.completions.shape == ours.completions.shape
        shares.append((theirs.completions == ours.completions).float().mean().item() if same_shape else 0.0)
        common = theirs.logps.keys() & ours.logps.keys()
        logps += [(theirs.logps[key] - ours.logps[key]).abs().max().item() for key in common]
        if shares[-1] == 1.0:  # else the two are gradients of different things
            gradients.append(relative_l2(theirs.gradients, ours.gradients))
    return {
        "same_tokens": min(shares) == 1.0,
        "same_tokens_fraction": min(shares),
        "max_logp_diff": max(logps, default=None),
        "grad_rel_l2": max(gradients, default=None),
    }


def relative_l2(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> float:
    """|expected - actual| / |expected| over all tensors as one vector; a missing one counts as zeros."""
    off, whole = 0.0, 0.0
    for name in expected.keys() | actual.keys():
        either = expected[name] if name in expected else actual[name]
        a, b = (side.get(name, torch.zeros_like(either)).double() for side in (expected, actual))
        off, whole = off + (a - b).square().sum().item(), whole + a.square().sum().item()
    return (off / whole) ** 0.5 if whole else float("inf") if off else 0.0
