"""Training log-probabilities after shuffle and split equal an independent forward of each row alone, unpadded."""

import copy

import pytest
import recorder
import reference
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from vlm_grpo import LoraOptions
from vlm_grpo.models.families import family_of, lora_targets

TEXTS = ("count one", "count two", "count three", "count four")


def rows(case: str) -> list[dict]:
    """Four rows; their texts differ, so that a row can be told from its tokens."""
    sizes = [(56, 56), (84, 56), (56, 112), (112, 84)] if case in ("sizes", "mixed") else [(56, 56)] * 4
    counts = {"one": [1] * 4, "several": [2] * 4, "sizes": [1] * 4, "counts": [1, 2, 3, 1], "mixed": [1, 0, 2, 0]}[case]
    out = []
    for i, (text, count) in enumerate(zip(TEXTS, counts, strict=True)):
        slots = [{"type": "image", "text": None}] * count
        out.append(
            {
                "prompt": [{"role": "user", "content": [*slots, {"type": "text", "text": text}]}],
                "images": [tiny.image(10 * i + j, sizes[(i + j) % 4]) for j in range(count)],
            }
        )
    return out


def train(model, processor, data, path, cls=recorder.Recorder, **options):
    trainer = cls(model, recorder.reward, recorder.config(path, **options), Dataset.from_list(data), None, processor)
    trainer.train()
    return trainer


def differences(trainer, processor, data, model=None, attribute="logps") -> list[float]:
    """The largest difference from the reference, per row of every micro-batch."""
    model = model or trainer.model
    model.eval()
    encoded = {tuple(e["input_ids"][0].tolist()): e for e in (reference.encode(processor, row) for row in data)}
    out = []
    with torch.no_grad():
        for row in (row for batch in trainer.rows for row in batch):
            expected = reference.logps(model, encoded[tuple(row.prompt)], row.completion, 0.8)
            out.append(float((getattr(row, attribute) - expected).abs().max()))
    return out


@pytest.mark.parametrize("case", ["one", "several", "sizes", "counts", "mixed"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exact_logps(family, case, tmp_path, largest):
    # covers U1 U10
    model, processor = tiny.build(family)
    data = rows(case)
    trainer = train(model, processor, data, tmp_path)
    found = differences(trainer, processor, data)
    largest(family, case, max(found))
    assert len(found) == 8, "4 prompts x 2 completions, each in one micro-batch"
    assert {tuple(row.prompt) for batch in trainer.rows for row in batch} == {
        tuple(reference.encode(processor, row)["input_ids"][0].tolist()) for row in data
    }
    assert max(found) <= 1e-5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exact_swapping_the_image_moves_logps(family, tmp_path):
    """The equality above would be empty if images did not matter."""
    model, processor = tiny.build(family)
    data = rows("sizes")
    trainer = train(model, processor, data, tmp_path)
    swapped = [{**row, "images": [tiny.image(99, image.size) for image in row["images"]]} for row in data]
    assert min(differences(trainer, processor, swapped)) > 1e-2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exact_bf16(family, tmp_path, largest):
    """bf16's error against float64 is at most 1.5 times the plain path's."""
    model, processor = tiny.build(family)
    data = rows("sizes")
    exact, model = copy.deepcopy(model).double(), model.to(torch.bfloat16)
    trainer = train(model, processor, data, tmp_path)
    model.eval()
    encoded = {tuple(e["input_ids"][0].tolist()): e for e in (reference.encode(processor, row) for row in data)}
    ours, plain = [], []
    with torch.no_grad():
        for row in (row for batch in trainer.rows for row in batch):
            inputs = encoded[tuple(row.prompt)]
            truth = reference.logps(exact, inputs, row.completion, 0.8)
            ours.append((row.logps - truth).square().mean())
            plain.append((reference.logps(model, inputs, row.completion, 0.8) - truth).square().mean())
    error, baseline = torch.stack(ours).mean().sqrt(), torch.stack(plain).mean().sqrt()
    largest(family, "bf16 / plain", error / baseline)
    assert baseline > 0
    assert error <= 1.5 * baseline


OPTIONS = {  # every pair of values of every two options occurs at least once
    "lora": ("none", "fresh", "pretrained"),
    "checkpointing": (False, True),
    "beta": (0.0, 0.1),
    "num_iterations": (1, 2),
    "padding_side": ("left", "right"),
}
PAIRWISE = [
    ("none", False, 0.0, 1, "left"),
    ("none", True, 0.1, 2, "right"),
    ("fresh", False, 0.1, 1, "right"),
    ("fresh", True, 0.0, 2, "left"),
    ("pretrained", False, 0.0, 2, "right"),
    ("pretrained", True, 0.1, 1, "left"),
    ("pretrained", False, 0.1, 2, "left"),
    ("none", True, 0.0, 1, "right"),
]


def test_pairwise_covers_every_pair():
    names = list(OPTIONS)
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            wanted = {(a, b) for a in OPTIONS[names[i]] for b in OPTIONS[names[j]]}
            assert wanted == {(case[i], case[j]) for case in PAIRWISE}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize(("lora", "checkpointing", "beta", "iterations", "side"), PAIRWISE)
def test_exact_options(family, lora, checkpointing, beta, iterations, side, tmp_path, largest):
    # covers U2 U4 U7 U9; ratio 1 and KL 0 at step 0, also for a warm-started model in memory
    model, processor = tiny.build(family)
    if lora != "none":
        model = with_adapter(model, trained=lora == "pretrained")
    processor.tokenizer.padding_side = side
    initial = copy.deepcopy(model)
    data = rows("mixed")
    trainer = train(
        model, processor, data, tmp_path, gradient_checkpointing=checkpointing, beta=beta, num_iterations=iterations
    )
    assert processor.tokenizer.padding_side == side, "the user's processor is never changed"
    found = differences(trainer, processor, data)
    largest(f"{family} options", f"{lora} gc={checkpointing}", max(found))
    assert max(found) <= 1e-5
    scored = [row for batch in trainer.rows for row in batch]
    for row in scored:
        if row.old is not None:
            assert torch.allclose(row.old, row.logps, atol=1e-6, rtol=0), "importance ratio 1 before the first update"
        assert (row.ref is not None) == (beta > 0), "beta=0 never runs the reference, beta>0 always does"
        if row.ref is not None:
            assert torch.allclose(row.ref, row.logps, atol=1e-6, rtol=0), "KL 0 before the first update"
    if beta:
        assert max(differences(trainer, processor, data, initial, "ref")) <= 1e-5
        assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-9)


def with_adapter(model, trained: bool):
    """A LoRA adapter on both towers; ``trained`` moves its B matrices away from zero."""
    options = LoraOptions(r=4, alpha=8, vision=True)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets(model, options)))
    if trained:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def targets(model, options):
    return lora_targets(family_of(model.config), model, options)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("beta", "iterations", "checkpointing"), [(0.0, 1, True), (0.1, 2, False)])
def test_exact_4bit(family, beta, iterations, checkpointing, tmp_path, largest):
    # covers U2; also after generate() has put the quantized layers through eval mode
    from vlm_grpo import load_model

    tiny.save(family, tmp_path / "model", hidden=128)
    options = LoraOptions(r=4, alpha=8, vision=True)
    model, processor = load_model(
        str(tmp_path / "model"), backend="hf", load_in_4bit=True, lora=options, gradient_checkpointing=checkpointing
    )
    data = rows("mixed")
    options = {"beta": beta, "num_iterations": iterations, "gradient_checkpointing": checkpointing}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = train(model, processor, data, tmp_path, **options)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}, "no bf16 adapters where bf16 is not native"
    assert all(torch.equal(before[n], p) for n, p in trained.items()), "learning rate 0 and no rounding"
    found = differences(trainer, processor, data)
    largest(family, f"4-bit beta={beta}", max(found))
    assert max(found) <= 1e-4
    assert trainer.state.log_history[0]["grad_norm"] > 0
