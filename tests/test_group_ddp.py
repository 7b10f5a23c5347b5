"""Two processes train as one process with twice the rows: what a process holds of a group is a smaller group."""

import os
import random
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import recorder
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_exact import rows, table

from vlm_grpo import LoraOptions, VLMGRPOTrainer
from vlm_grpo.errors import ConfigError, SharingError, UnsupportedError
from vlm_grpo.group import GroupSharing
from vlm_grpo.group.reasons import Unshareable
from vlm_grpo.models.families import family_of, lora_targets
from vlm_grpo.preparation import check_processes

WORLD = 2
PATIENCE = 60  # seconds, and as many for four runs: processes that wait for each other are a failure
MIXED = rows("mixed") + rows("sizes")  # a picture, none, two pictures, none, and then one each
ONE_SIDED = [MIXED[i] for i in (0, 2, 1, 3)]  # with two prompts a process, the second process sees no picture
WORDS = range(20, 100)  # ids, none of which ends a completion or stands for a medium

VISION_IN_CHECKPOINTS = {"vision": True, "gradient_checkpointing": True}

# Rows a process and micro-batch, completions a prompt, micro-batches a step, and the options that matter.
QUICK: dict[str, dict[str, Any]] = {
    "half a group": {"batch": 2, "generations": 4, "steps": 1, "beta": 0.1},
}
SLOW: dict[str, dict[str, Any]] = {
    "a group each and pictures for one": {"batch": 2, "generations": 2, "data": ONE_SIDED, **VISION_IN_CHECKPOINTS},
    # Two forwards on the first process, the later one without pictures, and one on the second.
    "one and a half but one falls back": {"batch": 6, "generations": 4, "steps": 1, "vision": True, "falls_back": 1},
    "two groups": {"batch": 4, "generations": 2, "gradient_checkpointing": True, "beta": 0.1},
    "two groups in forwards of their own": {"batch": 4, "generations": 2, "vision": True, "family": "qwen3_5"},
    "parts that meet by chance": {"batch": 6, "generations": 4, "vision": True},
    "without adapters": {"batch": 4, "generations": 2, "adapters": False, "beta": 0.1, "num_iterations": 2},
    "AdamW": {"batch": 2, "generations": 2, "vision": True, "optim": "adamw_torch", "learning_rate": 1e-3},
    "rows that need forwards of their own": {"batch": 4, "generations": 2, "family": "mllama", "vision": True},
}


class Scripted(VLMGRPOTrainer):
    """Each process samples from a seed of its own: here a completion depends on its prompt, its place and the step."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        super()._generate_single_turn(prompt_ids, *args, **kwargs)  # with its prefill and its check
        first = self.accelerator.process_index * len(prompt_ids)
        return [self._completion(number, ids) for number, ids in enumerate(prompt_ids, first)], None

    def _completion(self, number: int, ids: list[int]) -> list[int]:
        draw = random.Random(f"{self.state.global_step} {number} {ids}")
        return [draw.choice(WORDS) for _ in range(draw.randint(2, 6))]


def adapted(model: Any, vision: bool) -> Any:
    """LoRA whose B matrices are not zero, on the language model and perhaps on the vision tower."""
    torch.manual_seed(0)
    targets = lora_targets(family_of(model.config), model, LoraOptions(vision=vision))
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
    return model


def run(
    processes: int,
    sharing: Any,
    path: Path,
    batch: int,
    generations: int,
    steps: int = 2,
    family: str = "qwen2_5_vl",
    adapters: bool = True,
    vision: bool = False,
    data: list[dict] | None = None,
    falls_back: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Two optimizer steps: what they changed in each parameter, and the prompt tokens that were saved."""
    rank = int(os.environ.get("RANK", 0))
    alone = processes > 1 and rank == falls_back and sharing
    model, processor = tiny.build(family)
    model = adapted(model, vision) if adapters else model
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    defaults = {"learning_rate": 0.5, "lr_scheduler_type": "constant", "optim": "sgd", "ddp_timeout": PATIENCE}
    args = recorder.config(
        path,
        per_device_train_batch_size=batch * WORLD // processes,
        num_generations=generations,
        steps_per_generation=steps,
        gradient_accumulation_steps=steps,
        max_steps=2,
        shuffle_dataset=False,
        group_sharing="auto" if alone else sharing,
        use_cpu=True,
        **{**defaults, **options},
    )
    trainer = Scripted(model, recorder.reward, args, table(data or MIXED), None, processor)
    if alone:
        trainer.sharing._check = refused  # type: ignore[method-assign]
    trainer.train()
    assert trainer.sharing.off == bool(alone or sharing is False)
    after = dict(trainer.model.named_parameters())
    saved = sum(entry.get("group/prompt_tokens_saved", 0) for entry in trainer.state.log_history)
    return {"update": {n: after[n].detach() - p for n, p in before.items()}, "before": before, "saved": saved}


def refused(*args: Any) -> None:
    raise Unshareable("this process finds a difference")


def spawned(jobs: list[tuple[str, bool]], folder: Path, script: str = __file__) -> list[subprocess.Popen]:
    """Processes that do the jobs of a script together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, script, str(folder), *(f"{name}={int(sharing)}" for name, sharing in jobs)]
    out = []
    for rank in range(WORLD):
        env = {k: str(v) for k, v in {**world, "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}.items()}
        with (folder / f"{rank}.log").open("w") as log:
            out.append(subprocess.Popen(command, env={**os.environ, **env}, stdout=log, stderr=subprocess.STDOUT))
    return out


def finished(processes: list[subprocess.Popen], folder: Path, seconds: float) -> None:
    """Wait for all of them; the first failure, or too long a wait, ends the others."""
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if any(process.poll() for process in processes):
            break
        time.sleep(0.1)
    late = [process.poll() is None for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    logs = "".join(f"\n--- process {rank}\n{(folder / f'{rank}.log').read_text()[-3000:]}" for rank in range(WORLD))
    assert not any(process.returncode for process in processes), f"failed, or waited for each other {late}:{logs}"


def distance(found: dict, expected: dict) -> float:
    """Relative L2."""
    assert found.keys() == expected.keys()
    gap = sum((found[n].double() - e.double()).square().sum() for n, e in expected.items()) ** 0.5
    return float(gap / sum(e.double().square().sum() for e in expected.values()) ** 0.5)


def check(cases: dict[str, dict[str, Any]], sharings: tuple[bool, ...], folder: Path, largest: Any) -> None:
    jobs = [(name, sharing) for name in cases for sharing in sharings]
    processes = spawned(jobs, folder)
    try:
        one = {job: run(1, job[1], folder / "one", **cases[job[0]]) for job in jobs}
    finally:
        finished(processes, folder, PATIENCE * (1 + len(jobs) / 4))
    for (name, sharing), expected in one.items():
        found = [torch.load(folder / f"{name}-{sharing}-{rank}.pt") for rank in range(WORLD)]
        assert all(torch.equal(found[0]["update"][n], found[1]["update"][n]) for n in expected["update"])
        assert distance(found[0]["before"], expected["before"]) == 0
        assert sum(u.square().sum() for u in expected["update"].values()) > 1e-6, "something was learned"
        gap = distance(found[0]["update"], expected["update"])
        largest(f"{name}, two processes and one", f"sharing={sharing}", gap)
        assert gap <= 1e-5, name
        moved = {n: p + found[0]["update"][n] for n, p in expected["before"].items()}
        due = {n: p + expected["update"][n] for n, p in expected["before"].items()}
        assert distance(moved, due) <= 1e-5, name
        assert [result["saved"] > 0 for result in found] == [sharing] * WORLD


def test_group_two_processes(tmp_path, largest):
    # covers U1
    check(QUICK, (True,), tmp_path, largest)


@pytest.mark.slow
def test_group_two_processes_more(tmp_path, largest):
    check(SLOW, (True, False), tmp_path, largest)


@pytest.mark.slow
def test_group_two_processes_without_sharing(tmp_path, largest):
    check(QUICK, (False,), tmp_path, largest)


@pytest.mark.parametrize(("split", "sharing"), [(True, "auto"), (True, True), (False, True)])
def test_group_what_processes_cannot_do(split, sharing):
    """FSDP and DeepSpeed take part in every forward; DDP looks for unused parameters in the graph of the forward."""
    model, _ = tiny.build("qwen2_5_vl")
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    args = SimpleNamespace(world_size=WORLD, ddp_find_unused_parameters=True, **checkpointing)
    shared = GroupSharing(family_of(model.config), sharing, (), nullcontext)
    trainer: Any = SimpleNamespace(
        model=model, args=args, sharing=shared, is_fsdp_enabled=split, is_deepspeed_enabled=False
    )
    if not split:
        with pytest.raises(ConfigError, match="reentrant.*Set use_reentrant to False"):
            check_processes(trainer)
        args.ddp_find_unused_parameters = False
        check_processes(trainer)
    elif sharing is True:
        with pytest.raises(SharingError, match="FSDP and DeepSpeed"):
            check_processes(trainer)
    else:
        check_processes(trainer)
        assert shared.off
        trainer.model, _ = tiny.build("mllama")
        with pytest.raises(UnsupportedError, match="Train it with DDP, or with one process"):
            check_processes(trainer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in sys.argv[2:]:
        name, _, sharing = job.rpartition("=")
        result = run(WORLD, bool(int(sharing)), Path(sys.argv[1]) / "two", **(QUICK | SLOW)[name])
        torch.save(result, Path(sys.argv[1]) / f"{name}-{bool(int(sharing))}-{os.environ['RANK']}.pt")
    torch.distributed.barrier()  # or one process takes the connection away while the other still uses it
    torch.distributed.destroy_process_group()
