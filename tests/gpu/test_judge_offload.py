"""A reward model beside a policy on a GPU: one base in memory, or off the GPU between uses."""

import judges
import pytest
import tiny
import torch

from vlm_grpo.models.adapters import parameters_by_role
from vlm_grpo.rewards import show_model
from vlm_grpo.rewards.judge import JudgeReward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_reward_model_of_its_own_is_off_the_gpu_between_uses(tmp_path):  # covers A3
    base = tiny.save("qwen2_5_vl", tmp_path / "base", hidden=256)
    run, rows = judges.reward_run(base, tmp_path / "judge"), judges.rows("qwen2_5_vl")
    staying, waiting = JudgeReward(run, offload=False), JudgeReward(run)
    expected = judges.call(staying, rows, ["one", "two", "red"])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        assert judges.call(waiting, rows, ["one", "two", "red"]) == pytest.approx(expected, abs=1e-2)
        model = waiting._standing.model
        assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"cpu"}
        assert torch.cuda.memory_allocated() - before < 2**20
    staying._standing.model.to("cpu")
    assert torch.cuda.memory_allocated() < before, "the one that stays is on the GPU"


def test_on_the_base_of_the_policy_it_adds_its_adapter_only(tmp_path):  # covers L5
    base = tiny.save("qwen2_5_vl", tmp_path / "base", hidden=256)
    run = judges.reward_run(base, tmp_path / "judge")
    model, _ = judges.policy(base)
    before = torch.cuda.memory_allocated()
    judge = JudgeReward(run)
    show_model([judge], model)
    added, counts = torch.cuda.memory_allocated() - before, parameters_by_role(model)
    assert judge.on_policy and 4 * counts["reward"] <= added < 4 * counts["reward"] + 2**20 < 4 * counts["base"]
