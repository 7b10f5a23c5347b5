"""fp16 on a GPU, as cards without bf16 train: the loss scale that accelerate makes, and LoRA in float32."""

import math

import pytest
import recorder
import tiny
import torch
from datasets import Dataset
from test_exact import with_adapter
from test_trainer import logged, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_five_steps_of_lora_in_fp16(tmp_path):
    model, processor = tiny.build("qwen2_5_vl")
    model = with_adapter(model.half(), trained=True).to("cuda")
    args = recorder.config(
        tmp_path, fp16=True, bf16=False, learning_rate=1e-3, max_steps=5, group_sharing="auto", flow_check=True
    )
    trainer = recorder.Recorder(model, recorder.reward, args, Dataset.from_list(rows()), processing_class=processor)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    before = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    losses, scales = logged(trainer, "loss"), logged(trainer, "numbers/loss_scale")
    skipped = logged(trainer, "numbers/skipped_steps")
    assert len(losses) == len(scales) == 5 and all(map(math.isfinite, losses))
    assert scales[0] == 65536.0 / 2 ** skipped[0] and min(scales) >= 1
    assert sum(skipped) < 5, "some step was taken"
    moved = {name: p.detach().cpu() for name, p in model.named_parameters() if name in before}
    assert any(not torch.equal(before[name].cpu(), p) for name, p in moved.items())
    assert all(bool(p.isfinite().all()) for p in moved.values())
    print(f"loss scales {scales}, skipped {skipped}")
