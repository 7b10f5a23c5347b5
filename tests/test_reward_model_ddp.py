"""Two processes train a reward model, and a policy on its scores, as one process with twice the rows does."""

import os
import sys
from pathlib import Path
from typing import Any

import judges
import pytest
import recorder
import test_reward_model as pairwise
import tiny
import torch
from datasets import Dataset
from test_exact import table
from test_group_ddp import MIXED, ONE_SIDED, PATIENCE, WORLD, Scripted, distance, finished, spawned

from vlm_grpo import VLMRewardTrainer
from vlm_grpo.models import heads
from vlm_grpo.rewards.judge import JudgeReward

FIGURES = ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "grad_norm")
SGD = {"learning_rate": 0.5, "lr_scheduler_type": "constant", "optim": "sgd", "use_cpu": True, "ddp_timeout": PATIENCE}
SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
VISION = r".*(self_attn\.(q|v)_proj|attn\.qkv)"

# Rows a process and micro-batch, and the options that matter.
REWARD: dict[str, dict[str, Any]] = {
    "pairs": {"batch": 2},
    "pairs shared in checkpoints": {"batch": 2, "gradient_checkpointing": True, "steps": 2, "vision": True},
    "pairs with pictures for one": {"batch": 2, "data": [0, 1, 2, 2], "vision": True, "group_sharing": False},
}
JUDGED: dict[str, dict[str, Any]] = {
    "judged": {"batch": 2, "generations": 4, "beta": 0.1},
    "judged in checkpoints": {"batch": 2, "generations": 2, "beta": 0.1, "gradient_checkpointing": True},
    "judged with pictures for one": {"batch": 2, "generations": 2, "data": ONE_SIDED, "vision": True},
}


class Scored(Scripted):
    """Keeps the rewards of all processes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rewards: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        self.rewards.append(super()._calculate_rewards(*args))
        return self.rewards[-1]


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def pairs(processes: int, path: Path, batch: int, steps: int = 1, vision: bool = False, **options: Any) -> Any:
    """A reward trainer of pairs."""
    rows = pairwise.rows()
    data = [rows[place] for place in options.pop("data", range(4))]
    model, processor = pairwise.adapted(target_modules=VISION if vision else r".*self_attn\.(q|v)_proj")
    size = {"per_device_train_batch_size": batch * WORLD // processes, "gradient_accumulation_steps": steps}
    args = pairwise.config(path, **{**SGD, **SAVED, **size, "train_sampling_strategy": "sequential", **options})
    return VLMRewardTrainer(model, args, Dataset.from_list(data * steps), None, processor, judge=pairwise.JUDGE)


def judged(processes: int, path: Path, batch: int, generations: int, **options: Any) -> Any:
    """A GRPO trainer whose only reward is a reward model."""
    data = options.pop("data", MIXED)
    model, processor = judges.policy(path.parent / "base", vision=options.pop("vision", False))
    size = {"per_device_train_batch_size": batch * WORLD // processes, "num_generations": generations}
    size |= {"steps_per_generation": 1, "gradient_accumulation_steps": 1, "shuffle_dataset": False}
    args = recorder.config(path, **{**SGD, **SAVED, "learning_rate": 0.05, **size, **options})
    judge = JudgeReward(path.parent / "judge")
    trainer = Scored(model, [judge], args, table(data), None, processor)
    assert judge.on_policy
    return trainer


def run(name: str, processes: int, folder: Path) -> dict[str, Any]:
    """Two steps, and the second one again from its checkpoint: what they changed, the figures and who wrote heads."""
    make, case = (pairs, REWARD[name]) if name in REWARD else (judged, JUDGED[name])
    path, written = folder / f"{name} {processes}", []
    save = heads.save_file
    heads.save_file = lambda values, file: written.append(file) or save(values, file)  # type: ignore[assignment]
    trainer = make(processes, path, **case)
    before = trained(trainer.model)
    trainer.train()
    after = trained(trainer.model)
    again = make(processes, path, **case)
    again.train(resume_from_checkpoint=str(path / "checkpoint-1"))
    heads.save_file = save
    resumed = trained(again.model)
    rewards = getattr(trainer, "rewards", [])
    return {
        "update": {n: after[n] - p for n, p in before.items()},
        "before": before,
        "rewards": rewards,
        "rewards again": getattr(again, "rewards", []),
        "logs": [{n: log[n] for n in (*FIGURES, "kl") if n in log} for log in trainer.state.log_history[:2]],
        "same": all(torch.equal(value, resumed[n]) for n, value in after.items()),
        "written": [str(file.relative_to(path)) for file in written],
        "files": sorted(str(file.relative_to(path)) for file in path.rglob("head.safetensors")),
    }


def check(names: list[str], folder: Path, largest: Any) -> dict[str, tuple[dict, list[dict]]]:
    base = tiny.save("qwen2_5_vl", folder / "base")
    judges.reward_run(base, folder / "judge", vision=True)
    processes = spawned([(name, True) for name in names], folder, __file__)
    try:
        one = {name: run(name, 1, folder) for name in names}
    finally:
        finished(processes, folder, PATIENCE * (1 + len(names)))
    out = {}
    for name, expected in one.items():
        found = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(WORLD)]
        assert all(torch.equal(found[0]["update"][n], found[1]["update"][n]) for n in expected["update"])
        assert distance(found[0]["before"], expected["before"]) == 0
        assert sum(u.square().sum() for u in expected["update"].values()) > 1e-6, "something was learned"
        gap = distance(found[0]["update"], expected["update"])
        largest(f"{name}, two processes and one", "update", gap)
        assert gap <= 1e-5, name
        for two, alone in zip(found[0]["logs"], expected["logs"], strict=True):
            assert two.keys() == alone.keys() and two == pytest.approx(alone, abs=1e-5, rel=1e-5), name
        assert expected["same"] and all(result["same"] for result in found), "as if nothing had happened"
        assert not found[1]["written"] and found[0]["written"] == expected["written"], "by the first process alone"
        assert found[0]["files"] == expected["files"]
        assert bool(expected["files"]) == (name in REWARD), "a judge's head stays in its own folder"
        out[name] = expected, found
    return out


@pytest.mark.slow
def test_two_processes_train_a_reward_model_as_one(tmp_path, largest):  # covers L3 U9
    for name, (expected, _) in check(list(REWARD), tmp_path, largest).items():
        assert len(expected["logs"]) == 2 and set(FIGURES) <= expected["logs"][0].keys(), name
        assert expected["files"] == ["checkpoint-1/head.safetensors", "checkpoint-2/head.safetensors"]


@pytest.mark.slow
def test_two_processes_are_judged_as_one(tmp_path, largest):  # covers A3 L5 O3
    for name, (expected, found) in check(list(JUDGED), tmp_path, largest).items():
        scores = torch.cat(expected["rewards"])
        assert scores.std() > 0.01
        for result in found:
            assert (torch.cat(result["rewards"]) - scores).abs().max() <= 1e-5, name
            assert torch.equal(torch.cat(result["rewards again"]), torch.cat(result["rewards"][1:]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in sys.argv[2:]:
        name = job.rpartition("=")[0]
        torch.save(run(name, WORLD, Path(sys.argv[1])), Path(sys.argv[1]) / f"{name}-{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
