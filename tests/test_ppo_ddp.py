"""Two processes train by PPO as one process with twice the rows does: values, whitening and the KL are over both."""

import os
import sys
from pathlib import Path
from typing import Any

import judges
import pytest
import recorder
import tiny
import torch
from test_exact import table
from test_group_ddp import MIXED, ONE_SIDED, PATIENCE, WORLD, Scripted, distance, finished, spawned

from vlm_grpo import VLMPPOConfig, VLMPPOTrainer
from vlm_grpo.models.heads import heads_of

FIGURES = (
    *("loss", "grad_norm", "values", "returns", "advantages", "kl", "kl_coef", "score", "explained_variance"),
    *("approx_kl", "loss/policy", "loss/value", "clipfrac", "vf_clipfrac"),
)
SGD = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "optim": "sgd", "use_cpu": True, "ddp_timeout": PATIENCE}
# The first three are scored by their first update, the last one ahead of it.
CASES: dict[str, dict[str, Any]] = {
    "one completion a prompt": {"batch": 2, "generations": 1},
    "in checkpoints": {"batch": 2, "generations": 2, "gradient_checkpointing": True, "normalize_scores": True},
    "with pictures for one": {"batch": 2, "generations": 2, "data": ONE_SIDED, "vision": True, "whiten_rewards": True},
    "in two micro-batches": {"batch": 2, "generations": 2, "parts": 2},
}


class ScriptedPPO(Scripted, VLMPPOTrainer):
    """Each process samples what one process would."""


def run(name: str, processes: int, folder: Path) -> dict[str, Any]:
    """Four steps, two of a rollout: what they changed, and the figures."""
    case = dict(CASES[name])
    parts = case.pop("parts", 1)
    batch, generations, data = case.pop("batch"), case.pop("generations"), case.pop("data", MIXED)
    model, processor = judges.policy(folder / "base", vision=case.pop("vision", False))
    args = VLMPPOConfig(
        output_dir=str(folder / f"{name} {processes}"),
        per_device_train_batch_size=batch * WORLD // processes,
        num_generations=generations,
        steps_per_generation=parts,
        gradient_accumulation_steps=parts,
        num_iterations=2,
        max_steps=4,
        max_completion_length=6,
        shuffle_dataset=False,
        kl_target=0.01,
        kl_horizon=20,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        **{"gradient_checkpointing": False, **SGD, **case},
    )
    trainer = ScriptedPPO(model, recorder.reward, args, table(data), None, processor)
    torch.manual_seed(7)  # a head of zeros says nothing of the adapter below it
    torch.nn.init.normal_(heads_of(model)["value"].weight, std=0.2)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(model.named_parameters())
    # Means of micro-batches, as TRL's: which rows one holds is shuffled, in each process by itself.
    figures = [n for n in FIGURES if parts == 1 or n not in ("approx_kl", "clipfrac")]
    logs = [{n: log[n] for n in figures if n in log} for log in trainer.state.log_history if "loss" in log]
    return {"update": {n: after[n].detach() - p for n, p in before.items()}, "before": before, "logs": logs}


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, largest):  # covers L5 Q11
    tiny.save("qwen2_5_vl", tmp_path / "base")
    processes = spawned([(name, True) for name in CASES], tmp_path, __file__)
    try:
        one = {name: run(name, 1, tmp_path) for name in CASES}
    finally:
        finished(processes, tmp_path, PATIENCE * (1 + len(CASES)))
    for name, expected in one.items():
        found = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(WORLD)]
        assert all(torch.equal(found[0]["update"][n], found[1]["update"][n]) for n in expected["update"]), name
        assert distance(found[0]["before"], expected["before"]) == 0
        for role in ("default", "value"):
            own = [u for n, u in expected["update"].items() if f".{role}." in n]
            assert own and sum(float(u.square().sum()) for u in own) > 1e-9, f"{role} learns"
        gap = distance(found[0]["update"], expected["update"])
        largest(f"PPO {name}, two processes and one", "update", gap)
        assert gap <= 1e-4, name
        for two, alone in zip(found[0]["logs"], expected["logs"], strict=True):
            assert two.keys() == alone.keys() and two == pytest.approx(alone, abs=1e-5, rel=1e-4), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in sys.argv[2:]:
        name = job.rpartition("=")[0]
        torch.save(run(name, WORLD, Path(sys.argv[1])), Path(sys.argv[1]) / f"{name}-{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
