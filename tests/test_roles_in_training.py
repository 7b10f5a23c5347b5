"""GRPO with its reference and its reward model on one base: only the policy's adapter moves."""

import judges
import pytest
import tiny
from datasets import Dataset
from torch import Tensor

from vlm_grpo import VLMGRPOConfig, VLMGRPOTrainer, load_model
from vlm_grpo.config import LoraOptions
from vlm_grpo.models.adapters import parameters_by_role
from vlm_grpo.rewards.judge import JudgeReward

STEPS = 10


def frozen(model) -> dict[str, Tensor]:
    """Every weight but the policy's, copied."""
    return {n: v.detach().clone() for n, v in model.state_dict().items() if ".default." not in n}


def trained(folder: str, reward, data: Dataset, tmp_path, **options) -> VLMGRPOTrainer:
    load = {"load_in_4bit": options.pop("load_in_4bit", False)}
    model, processor = load_model(folder, lora=LoraOptions(r=2, alpha=4, vision=True), **load)
    judges.randomize(model, 1)
    args = VLMGRPOConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        **options,
    )
    return VLMGRPOTrainer(model, reward, args, data, processing_class=processor)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="as it is"),
        pytest.param(
            {"gradient_checkpointing": False, "group_sharing": False}, id="nothing shared", marks=pytest.mark.slow
        ),
        pytest.param(
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, id="reentrant", marks=pytest.mark.slow
        ),
        pytest.param({"load_in_4bit": True}, id="4-bit", marks=pytest.mark.slow),
        pytest.param({"num_iterations": 2, "steps_per_generation": 2}, id="twice", marks=pytest.mark.slow),
    ],
)
def test_ten_steps_leave_base_reference_and_reward_model_as_they_were(tmp_path, options):
    # covers A3, L5, O4, hold 2
    folder = judges.base("qwen2_5_vl", tmp_path / "base", layers=1, hidden=64)
    judge = JudgeReward(judges.reward_run(folder, tmp_path / "judge", vision=True))
    data = Dataset.from_list([{"prompt": tiny.prompt("count"), "images": [tiny.image(i)]} for i in range(4)])
    trainer = trained(folder, [judge], data, tmp_path, beta=0.1, **options)
    model = trainer.model
    assert judge.on_policy and set(model.peft_config) == {"default", "ref", "reward"}
    counts = parameters_by_role(model)
    plain = tiny.build("qwen2_5_vl", layers=1, hidden=64)[0]
    assert counts["base"] == sum(p.numel() for p in plain.parameters()), "one base in memory"
    assert counts["ref"] == counts["default"] and counts["reward"] == counts["default"] + 65, "with its head"
    before, policy = frozen(model), {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert policy and all(".default." in name for name in policy)
    scores = judges.call(judge, [{"prompt": tiny.prompt("count"), "images": [tiny.image(9)]}], ["two"])
    trainer.train()
    after = frozen(model)
    assert before.keys() == after.keys()
    assert [name for name, value in before.items() if not value.equal(after[name])] == []
    assert all(not value.equal(model.get_parameter(name)) for name, value in policy.items() if "lora_B" in name)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == policy.keys()
    again = judges.call(judge, [{"prompt": tiny.prompt("count"), "images": [tiny.image(9)]}], ["two"])
    assert again == pytest.approx(scores, abs=1e-6), "the same judge as before"
    logs = [log for log in trainer.state.log_history if "kl" in log]
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-6) and logs[-1]["kl"] > 1e-6
    assert any(log["reward_std"] > 0 for log in logs)
