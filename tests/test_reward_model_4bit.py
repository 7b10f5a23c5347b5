"""4-bit weights under a reward model and under a policy that it judges: one base in memory, the same scores."""

import json

import judges
import pytest
import recorder
import test_reward_model as pairwise
import tiny
from datasets import Dataset
from test_rewards_judge import Written, same_scores, train_rows

from vlm_grpo import load_model
from vlm_grpo.config import LoraOptions
from vlm_grpo.models.adapters import parameters_by_role
from vlm_grpo.rewards import standing
from vlm_grpo.rewards.judge import JudgeReward


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_reward_model_on_4bit_weights_judges_a_policy_on_them(tmp_path, monkeypatch, caplog, checkpointing):
    # covers A3 L3 L5 O3
    base = tiny.save("qwen2_5_vl", tmp_path / "base", layers=1, hidden=64)
    lora = LoraOptions(r=4, alpha=8, vision=True)
    model, processor = load_model(base, load_in_4bit=True, lora=lora)
    before = {n: v.clone() for n, v in model.state_dict().items() if "lora_" not in n}
    options = {"learning_rate": 2e-2, "max_steps": 12, "gradient_checkpointing": checkpointing}
    trainer = pairwise.train(tmp_path / "training", None, model, processor, **options)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < 0.5 * losses[0]
    assert all(v.equal(model.state_dict()[n]) for n, v in before.items()), "4-bit weights stay"
    run = tmp_path / "judge"
    trainer.save_model(str(run))
    assert json.loads((run / "reward_model.json").read_text())["load_in_4bit"] is True

    policy, processor = load_model(base, load_in_4bit=True, lora=lora, gradient_checkpointing=checkpointing)
    judges.randomize(policy, 1)
    judge = JudgeReward(run, name="judge")
    with monkeypatch.context() as patch:
        patch.setattr(standing, "load_model", None)  # the base is there already
        args = recorder.config(
            tmp_path / "grpo", max_steps=4, beta=0.1, learning_rate=1e-2, gradient_checkpointing=checkpointing
        )
        grpo = Written(policy, [judge], args, Dataset.from_list(train_rows()), processing_class=processor)
        assert judge.on_policy and set(policy.peft_config) == {"default", "ref", "reward"}
        counts = parameters_by_role(policy)
        plain = tiny.build("qwen2_5_vl", layers=1, hidden=64)[0]
        assert counts["base"] == sum(p.numel() for p in plain.parameters()), "one base in memory"
        others = {n: v.clone() for n, v in policy.state_dict().items() if ".default." not in n}
        grpo.train()
    assert all(v.equal(policy.state_dict()[n]) for n, v in others.items())
    assert "stands on the" not in caplog.text, "no warning about other weights"
    same_scores(grpo, str(run))
