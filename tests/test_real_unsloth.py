"""Our trainer on models that the real Unsloth has loaded: images and video, the vision tower frozen and trained."""

import pytest
from real_unsloth import REPLACE_TRL, run_script

SCRIPT = (
    REPLACE_TRL
    + """
import json

import recorder
import tiny
import torch
from test_exact import rows, table

from vlm_grpo import LoraOptions, load_model

tiny.save("qwen2_5_vl", "model")
found = {}
for case, kind in (("one", "image"), ("several", "image"), ("mixed", "video")):
    for vision in (False, True):
        torch.manual_seed(0)
        model, processor = load_model(
            "model",
            backend="unsloth",
            dtype="float32",
            lora=LoraOptions(r=4, alpha=8, vision=vision),
            max_seq_length=512,
            gradient_checkpointing=True,
        )
        adapters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        data = rows(case, kind)
        options = recorder.config(
            "out", max_steps=2, gradient_checkpointing=True, learning_rate=1e-3, gradient_report=True
        )
        trainer = recorder.Recorder(model, recorder.reward, options, table(data), None, processor)
        trainer.train()
        after = dict(trainer.model.named_parameters())
        logs = [log for log in trainer.state.log_history if "group/prompt_tokens_saved" in log]
        found[f"{case} {kind}, vision {vision}"] = {
            "adapters": len(adapters),
            "still": sorted(n for n, before in adapters.items() if torch.equal(before, after[n])),
            "towers": sorted({"visual" if "visual" in n else "language" for n in adapters}),
            "saved": min(log["group/prompt_tokens_saved"] for log in logs),
            "finite": all(log["grad_norm"] > 0 for log in trainer.state.log_history if "grad_norm" in log),
        }
print(json.dumps(found))
"""
)


@pytest.mark.slow
def test_every_adapter_moves_for_every_kind_of_row(tmp_path, capsys):  # covers U2 U3 U4 U7
    found = run_script(SCRIPT, tmp_path)
    assert len(found) == 6
    for case, seen in found.items():
        with capsys.disabled():
            print(
                f"\n{case}: {seen['adapters'] - len(seen['still'])} of {seen['adapters']} adapter weights moved", end=""
            )
        assert seen["still"] == [] and seen["adapters"] > 0, case
        assert seen["towers"] == (["language", "visual"] if case.endswith("True") else ["language"])
        assert seen["saved"] > 0 and seen["finite"], case
